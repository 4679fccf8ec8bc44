"""Look into trained models, and at a task whose answer we know; logs, a table and pictures.

    python results/diagnose.py recall        the value of a key seen before (MQAR, arXiv:2312.04927)
    python results/diagnose.py positions     loss by position in the window: who wins late?
    python results/diagnose.py positions-512 the same in windows of 512 tokens
    python results/diagnose.py taps          what each delayed tap is worth: reach used, not nominal
    python results/diagnose.py all           all of them
    python results/diagnose.py --table-only  table and pictures again, from the logs alone

recall trains small models on made-up sequences, new ones at each step. The others take models of
the grid (reproduce.py), and train them if their checkpoints are not in out/reproduce. In more
terminals each takes the next free log.
"""

import copy
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import mean, median
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import neighbours  # noqa: E402, F401
import reproduce  # noqa: E402

from hsm import GPT, BadInput, GPTConfig  # noqa: E402
from prepare_data import parse, run  # noqa: E402
from sample import load  # noqa: E402
from train import TrainConfig, Windows, learning_rate, make_optimizers, train  # noqa: E402

CPU = torch.device("cpu")

# ---- Recall: a made-up task ----------------------------------------------------------------------

SIZES = (4, 8, 16, 32)  # pairs to keep in mind
RATES = (5e-4, 1e-3, 2e-3)  # learning rates
LEARNERS = {  # four layers; the shifts of "heads": 1, 2, 4, 8 in the first, 2, 4 .. in the second
    "shift-softmax": "shift-softmax",
    "hybrid-shift": "ab,ab,shift-softmax,ab",
    "hybrid": "ab,ab,softmax,ab",
    "softmax": "softmax",
    "ab": "ab",
}
STEPS, EVERY, GOAL = 2000, 50, 0.99  # most steps; steps between looks; the accuracy that ends it
TOKENS = 2048  # a step


def recall_task(n, size, generator, n_keys=64):
    """`size` pairs key value, then questions: one of these keys, any of them again, and its value.

    Returns tokens (N, T + 1), and which of them can be known. 32 pairs with the questions, or twice
    the size. Were each key asked once, half could be had by leaving out what has been told, and
    softmax learned that and no more.
    """
    n_pairs = max(32, 2 * size)
    keys = torch.rand(n, n_keys, generator=generator).argsort(dim=1)[:, :size]  # (N, size)
    values = torch.randint(n_keys, 2 * n_keys, (n, size), generator=generator)
    asked = torch.randint(size, (n, n_pairs - size), generator=generator)
    which = torch.cat([torch.arange(size).expand(n, size), asked], dim=1)  # (N, n_pairs)
    idx = torch.stack([keys.gather(1, which), values.gather(1, which)], dim=2).flatten(1)
    known = torch.zeros_like(idx, dtype=torch.bool)
    known[:, 2 * size + 1 :: 2] = True
    return idx, known


@torch.no_grad()
def accuracy(model, size):
    """Share of right tokens among those that can be known, on 256 sequences never trained on."""
    idx, known = recall_task(256, size, torch.Generator().manual_seed(2**20))
    right = model(idx[:, :-1])[0].argmax(dim=-1) == idx[:, 1:]
    return right[known[:, 1:]].float().mean().item()


def learn(size, mixers, lr, seed, steps=STEPS):
    """Train a small model until it is right, or to the end; yields (step, accuracy).

    A loop of its own: train.py's counts every token, and here most cannot be known. The rate stays
    after the warm-up, so that the steps to the goal do not depend on the most steps.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    T = recall_task(1, size, generator)[0].size(1) - 1
    shape = GPTConfig(vocab_size=128, block_size=T, n_layer=4, mixers=mixers)
    config = TrainConfig(model=shape, steps=steps, lr=lr, lr_end=1.0, eval_tokens=T)
    model = GPT(shape)
    (optimizer,) = make_optimizers(model, config, CPU)
    for step in tqdm(range(1, steps + 1), desc=f"{mixers}, {size} pairs, lr {lr}, seed {seed}"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step - 1)
        idx, known = recall_task(TOKENS // T, size, generator)
        loss = model(idx[:, :-1], idx.where(known, -1)[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        if step % EVERY == 0 or step == steps:
            right = accuracy(model, size)
            yield step, right
            if right >= GOAL:
                return


def recall(size, name, seed):
    """Rows of a log: each learning rate, each look."""
    for lr in RATES:
        for step, right in learn(size, LEARNERS[name], lr, seed):
            yield {"size": size, "model": name, "lr": lr, "step": step, "accuracy": right}


# ---- Trained models ------------------------------------------------------------------------------

TRAINED = ("softmax-learned", "softmax-rope", "ab-in", "hybrid-deep")
TAPPED = ("ab-in", "ab-in-layer")


@torch.no_grad()
def losses(model, windows, starts):
    """Loss of each token of these windows, (N, T), in nats."""
    rows = []
    for some in np.split(starts, range(64, len(starts), 64)):
        idx, targets = windows.at(some)
        logits = model(idx)[0].transpose(1, 2)  # (N, V, T)
        rows.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(rows)


def trained(setting, name, seed):
    """(model, validation Windows) of a run of the grid, trained now if need be."""
    config = reproduce.make_run(setting, name, seed)
    meta, step = reproduce.data_of(config.data), reproduce.saved_step(config)
    if step != config.steps:
        print(f"{config.out} has no finished checkpoint: training it")
        train(replace(config, resume=step is not None))
    model, _ = load(config.out, which="last")
    return model, Windows(config.data, "val", meta, model.config.block_size, CPU)


def positions(seed, setting="shakespeare", names=TRAINED):
    """Mean loss at 1, 2, 3-4, 5-8 .. tokens of context, over windows that overlap by 7 eighths."""
    for name in names:
        model, windows = trained(setting, name, seed)
        T = model.config.block_size
        starts = np.arange(0, windows.n_starts, T // 8)
        starts = starts[:: max(1, len(starts) * T // 2_000_000)]
        loss = losses(model, windows, starts).mean(dim=0)  # (T,)
        for first, last in [(1, 1), *((2**i + 1, 2 ** (i + 1)) for i in range(T.bit_length() - 1))]:
            span = loss[first - 1 : last].mean().item()
            yield {"model": name, "first": first, "last": last, "loss": span}


def without(model, taps):
    """A copy of a model of `ab` with silent taps, (layer, head) pairs: b = 0 there."""
    model = copy.deepcopy(model)
    for layer, head in taps:
        model.blocks[layer].mixer.pair.b.data[head] = 0
    return model


def taps(seed):
    """Validation loss without all taps of s tokens or more; with all of them (an infinite s)."""
    for name in TAPPED:
        model, windows = trained("shakespeare", name, seed)
        config, starts = model.config, windows.evenly(50_000)
        every = {
            (layer, head): shifts[head % len(shifts)]
            for layer, (_, shifts) in enumerate(config.layers)
            for head in range(config.n_head)
        }
        cuts = [2**i for i in range((config.block_size - 1).bit_length())]
        for shift in tqdm([*cuts, math.inf], desc=name):
            cut = without(model, [tap for tap, s in every.items() if s >= shift])
            row = {"model": name, "kind": "from" if shift < math.inf else "none", "shift": shift}
            yield {**row, "loss": losses(cut, windows, starts).mean().item()}


# ---- A table and pictures, from the rows of logs -------------------------------------------------


def recall_table(rows):
    """Median steps to the goal, at the rate where that is lowest; in brackets this rate, seeds."""
    last, results = {(r["model"], r["size"], r["lr"], r["seed"]): r for r in rows}.values(), {}
    of_a_rate = itemgetter("model", "size", "lr")
    for (name, size, lr), runs in groupby(sorted(last, key=of_a_rate), of_a_rate):
        ends = [(row["step"], row["accuracy"]) for row in runs]
        steps = median(step if right >= GOAL else math.inf for step, right in ends)
        right = max(right for _, right in ends)
        cell = f"{steps:.0f}" if steps < math.inf else f"never: {right:.2f}"
        cell = (steps, -right, f"{cell} ({lr:g}; {len(ends)})")
        results[name, size] = min(cell, results.get((name, size), cell))
    lines = [[f"`{name}`", *(results.get((name, n), "-")[-1] for n in SIZES)] for name in LEARNERS]
    return reproduce.table(("model", *(f"{size} pairs" for size in SIZES)), *lines)


def draw_positions(rows, figure):
    """How far over plain softmax, by context; means over seeds."""
    panel, by_model = octaves(figure, "tokens of context"), {}
    for row in rows:
        spans = by_model.setdefault(row["model"], {})
        spans.setdefault((row["first"], row["last"]), []).append(row["loss"])
    base = next(name for name in ("softmax-deep", "softmax-rope") if name in by_model)
    panel.axhline(0, color="grey", lw=1)
    for name in [name for name in by_model if name != base]:
        middle = [(first * last) ** 0.5 for first, last in by_model[name]]
        pairs = zip(by_model[name].values(), by_model[base].values(), strict=True)
        over = [100 * (mean(one) / mean(zero) - 1) for one, zero in pairs]
        panel.plot(middle, over, color=reproduce.COLOURS.get(name, "#cc79a7"), label=name)
    panel.set_ylabel(f"loss, % over {base}")
    figure.legend(loc="outside lower center", ncols=4)


def draw_taps(rows, figure):
    """Loss without the taps of a shift or more, and with all (dotted). Seed 1."""
    panel = octaves(figure, "all taps of this shift or more silent (dotted: none)")
    for name, colour in zip(TAPPED, ("#0072b2", "#d55e00"), strict=True):
        mine = [row for row in rows if (row["model"], row["seed"]) == (name, 1)]
        cuts = [(row["shift"], row["loss"]) for row in mine if row["kind"] == "from"]
        panel.plot(*zip(*cuts, strict=True), "o-", color=colour, label=name)
        panel.axhline(next(r["loss"] for r in mine if r["kind"] == "none"), color=colour, ls=":")
    panel.set_ylabel("validation loss, nats a character")
    panel.legend()


def octaves(figure, words):
    """A panel whose axis has a step for each doubling."""
    panel = figure.subplots()
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel(words)
    panel.grid(alpha=0.3)
    return panel


# ---- The command ---------------------------------------------------------------------------------

LONG = partial(positions, setting="code-512", names=reproduce.PICKS)
PARTS = {  # name: (log -> how its rows are measured, given the seed; picture)
    "recall": ({f"{n}.{name}": partial(recall, n, name) for n in SIZES for name in LEARNERS}, None),
    "positions": ({"positions": positions}, draw_positions),
    "positions-512": ({"positions-512": LONG}, draw_positions),
    "taps": ({"taps": taps}, draw_taps),
}


@dataclass
class DiagnoseConfig:
    """What the command line takes. What has a log is not measured again: delete it for that."""

    part: tyro.conf.Positional[Literal[(*PARTS, "all")]] = "all"
    seeds: int = 1  # seeds 1 .. N
    table_only: bool = False  # measure nothing: table and pictures from the logs
    dir: str = str(HERE)  # where logs/ and the pictures lie
    out: str = "out/diagnose"  # where terminals say what they are at

    def __post_init__(self):
        if self.seeds < 1:
            raise BadInput(f"seeds must be at least 1, not {self.seeds}")


def main(arguments=None):
    config = parse(DiagnoseConfig, arguments, __doc__.splitlines()[0])
    torch.set_num_threads(1)
    for part in PARTS if config.part == "all" else (config.part,):
        measures, draw = PARTS[part]
        folder = Path(config.dir, "logs", "diagnose" if draw else "recall")
        for seed in range(1, 1 if config.table_only else 1 + config.seeds):
            for name, measure in measures.items():
                path = folder / f"{name}.s{seed}.jsonl"
                with reproduce.claim(Path(config.out) / path.name) as free:
                    if free and not reproduce.read_log(path):
                        rows = list(measure(seed=seed))
                        head = {"part": part, "seed": seed, **reproduce.surroundings()}
                        reproduce.write_log(path, head, rows)
        paths = [path for name in measures for path in sorted(folder.glob(f"{name}.s*.jsonl"))]
        logs = [log for log in map(reproduce.read_log, paths) if log]
        rows = [{"seed": head["seed"], **row} for head, rows in logs for row in rows]
        if not rows:
            print(f"{part}: not yet measured")
        elif draw:
            reproduce.save_picture(draw, rows, Path(config.dir) / f"{part}.png", (7, 4.5))
        elif (page := Path(config.dir) / "README.md").is_file():
            reproduce.fill(page, "recall", recall_table(rows))


if __name__ == "__main__":
    run(main)
