"""Look into trained models, and at tasks whose answer we know; a log and a picture for each.

    python results/diagnose.py positions     loss by position in the window: who wins late?
    python results/diagnose.py taps          what each delayed tap is worth: reach used, not nominal
    python results/diagnose.py weights       learned (a, b) of each layer and head
    python results/diagnose.py copy          what stands a fixed distance back
    python results/diagnose.py repeat        a block that repeats, with a period of its own
    python results/diagnose.py recall        the value of a key seen before (MQAR, arXiv:2312.04927)
    python results/diagnose.py all           all of them
    python results/diagnose.py --table-only  the pictures again, from the logs alone

The first three take models of the grid (reproduce.py), and train them if their checkpoints are not
in out/reproduce. The others train small models on made-up sequences, new ones at each step.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import reproduce  # noqa: E402
import tables  # noqa: E402

from hsm import GPT, BadInput, GPTConfig, load_checkpoint, model_from  # noqa: E402
from prepare_data import parse, run  # noqa: E402
from train import TrainConfig, Windows, learning_rate, make_optimizer, train  # noqa: E402

TRAINED = ("softmax-learned", "softmax-rope", "ab-in", "hybrid-deep")
TAPPED = ("ab-in", "ab-in-layer")
CPU = torch.device("cpu")


def trained(name, seed):
    """(model, validation Windows) of a run of the grid on Shakespeare, trained now if need be."""
    its = reproduce.make_runs("cpu", (name,), ("shakespeare",), seed, 0, "out/reproduce")[-1]
    meta = reproduce.data_of(its.config.data)
    path = Path(its.config.out) / "ckpt.pt"
    resume = reproduce.can_resume(its)
    if not resume or load_checkpoint(path)["step"] < its.config.steps:
        print(f"{its.name} has no finished checkpoint here: training it")
        train(replace(its.config, resume=resume))
    model = model_from(load_checkpoint(path)).eval()
    return model, Windows(its.config.data, "val", meta, its.config.model.block_size, CPU)


# ------------------------------------------------------------------------------------------------
# Trained models


@torch.no_grad()
def losses(model, windows, starts):
    """Loss of each token of these windows, (N, T), in nats."""
    rows = []
    for some in starts.split(64):
        idx, targets = windows.at(some)
        logits = model(idx)[0].transpose(1, 2)  # (N, V, T)
        rows.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(rows)


def positions(seed):
    """Mean loss at 1, 2, 3-4, 5-8 .. tokens of context, over windows that overlap by 7 eighths."""
    for name in TRAINED:
        model, windows = trained(name, seed)
        T = model.config.block_size
        starts = torch.arange(0, windows.n_tokens - T, T // 8)
        loss = losses(model, windows, starts).mean(dim=0)  # (T,)
        for first, last in [(1, 1), *((2**i + 1, 2 ** (i + 1)) for i in range(T.bit_length() - 1))]:
            its = loss[first - 1 : last].mean().item()
            yield {"model": name, "first": first, "last": last, "loss": its}


def without(model, taps):
    """Silence taps, (layer, head) pairs: z = 0 there. Returns the hooks; remove them to undo it."""

    def silence(heads, n_head):
        def hook(_, inputs):
            x, z = inputs
            keep = torch.ones(n_head, dtype=z.dtype)
            keep[heads] = 0
            return x, z * keep.repeat_interleave(z.size(-1) // n_head)

        return hook

    hooks = []
    for layer, block in enumerate(model.blocks):
        heads = [h for its, h in taps if its == layer]
        if heads:
            hook = silence(heads, model.config.n_head)
            hooks.append(block.mixer.pair.register_forward_pre_hook(hook))
    return hooks


def taps(seed):
    """Validation loss without each tap; without all taps of s or more; with all of them."""
    for name in TAPPED:
        model, windows = trained(name, seed)
        config, starts = model.config, windows.evenly(50_000)
        every = {
            (layer, head): shifts[head % len(shifts)]
            for layer, (_, shifts) in enumerate(config.layers)
            for head in range(config.n_head)
        }
        cuts = [2**i for i in range((config.block_size - 1).bit_length())]
        sets = [("none", 0, [])]
        sets += [("from", cut, [tap for tap, s in every.items() if s >= cut]) for cut in cuts]
        sets += [("one", s, [tap]) for tap, s in every.items()]
        for kind, shift, silent in tqdm(sets, desc=name):
            hooks = without(model, silent)
            loss = losses(model, windows, starts).mean().item()
            for hook in hooks:
                hook.remove()
            layer, head = silent[0] if kind == "one" else (None, None)
            row = {"model": name, "kind": kind, "shift": shift, "layer": layer, "head": head}
            yield {**row, "loss": loss}


def weights(seed):
    """The numbers (a, b) that each head of each layer learned."""
    for name in TAPPED:
        model, _ = trained(name, seed)
        for layer, ((_, shifts), block) in enumerate(
            zip(model.config.layers, model.blocks, strict=True)
        ):
            a, b = block.mixer.pair.a.tolist(), block.mixer.pair.b.tolist()
            for head in range(model.config.n_head):
                row = {"model": name, "layer": layer, "head": head}
                shift = shifts[head % len(shifts)]
                yield {**row, "shift": shift, "a": a[head], "b": b[head]}


# ------------------------------------------------------------------------------------------------
# Made-up tasks. Each returns tokens (N, T + 1), and which of them can be known, the same shape.


def repeat_blocks(n, lengths, T, generator, n_letters=26):
    """Different letters, repeated after lengths (N, 1); known once the first has come again."""
    block = torch.rand(n, n_letters, generator=generator).argsort(dim=1)
    t = torch.arange(T + 1)
    return block.gather(1, t % lengths), (t > lengths)


def copy_task(n, size, generator):
    """A letter, as it stood `size` places back."""
    lengths = torch.full((n, 1), size)
    return repeat_blocks(n, lengths, 3 * size, generator)


def repeat_task(n, size, generator):
    """The same, each sequence with a period of its own from size / 3 to size."""
    lengths = torch.randint(size // 3, size + 1, (n, 1), generator=generator)
    return repeat_blocks(n, lengths, 3 * size, generator)


def recall_task(n, size, generator, n_keys=64, n_pairs=32):
    """`size` pairs key value, then questions: one of these keys, any of them again, and its value.

    n_pairs with the questions. Were each key asked once, half could be had by leaving out what has
    been told, and softmax learned that and no more.
    """
    keys = torch.rand(n, n_keys, generator=generator).argsort(dim=1)[:, :size]  # (N, size)
    values = torch.randint(n_keys, 2 * n_keys, (n, size), generator=generator)
    asked = torch.randint(size, (n, n_pairs - size), generator=generator)
    which = torch.cat([torch.arange(size).expand(n, size), asked], dim=1)  # (N, n_pairs)
    idx = torch.stack([keys.gather(1, which), values.gather(1, which)], dim=2).flatten(1)
    known = torch.zeros_like(idx, dtype=torch.bool)
    known[:, 2 * size + 1 :: 2] = True
    return idx, known


@dataclass
class Task:
    """A made-up task: how it is made, at which sizes, of how many tokens, for how many steps."""

    make: object
    sizes: tuple
    vocab_size: int
    steps: int
    every: int = 100  # steps between looks at the accuracy
    lr: float = 4e-3  # the highest


TASKS = {
    "copy": Task(copy_task, (13,), 26, 500, every=10),
    "repeat": Task(repeat_task, (12,), 26, 1000),
    "recall": Task(recall_task, (4, 8, 16), 128, 2000, lr=1e-3),  # softmax needs the lower rate
}
LEARNERS = {  # four layers; "heads": shifts of 1, 2, 4 .. in each layer
    "softmax-rope": "softmax",
    "ab": "ab",
    "mult": "mult",
    "hybrid": "ab,ab,softmax,ab",
}
TOKENS = 2048  # a step


@torch.no_grad()
def accuracy(model, task, size):
    """Share of right tokens among those that can be known, on 256 sequences never trained on."""
    idx, known = task.make(256, size, torch.Generator().manual_seed(2**20))
    right = model(idx[:, :-1])[0].argmax(dim=-1) == idx[:, 1:]
    return right[known[:, 1:]].float().mean().item()


def learn(task, size, mixers, seed):
    """Train a small model until it is right, or to the end; yields (step, accuracy).

    A loop of its own: train.py's counts every token, and here most cannot be known.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    T = task.make(1, size, generator)[0].size(1) - 1
    shape = GPTConfig(vocab_size=task.vocab_size, block_size=T, n_layer=4, mixers=mixers)
    config = TrainConfig(model=shape, steps=task.steps, lr=task.lr, eval_tokens=T)
    model = GPT(shape)
    optimizer = make_optimizer(model, config, CPU)
    with tqdm(total=config.steps, desc=f"{mixers}, {size}, seed {seed}") as bar:
        for step in range(1, config.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step - 1)
            idx, known = task.make(TOKENS // T, size, generator)
            loss = model(idx[:, :-1], idx.where(known, -1)[:, 1:])[1]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            bar.update()
            if step % task.every == 0 or step == config.steps:
                right = accuracy(model, task, size)
                bar.set_postfix_str(f"loss {loss.item():.3f}, right {right:.3f}")
                yield step, right
                if right > 0.999:
                    return


def made_up(name, seed):
    """Rows of a task: each size, each model, each evaluation."""
    task = TASKS[name]
    for size in task.sizes:
        for model, mixers in LEARNERS.items():
            for step, right in learn(task, size, mixers, seed):
                yield {"size": size, "model": model, "step": step, "accuracy": round(right, 5)}


# ------------------------------------------------------------------------------------------------
# Pictures, from the rows of a log


def draw_positions(rows, figure):
    """Loss by context, and how far from rotary softmax; means over seeds."""
    left, right = figure.subplots(1, 2)
    by_model = {}
    for row in rows:
        spans = by_model.setdefault(row["model"], {})
        spans.setdefault((row["first"], row["last"]), []).append(row["loss"])
    zero = [mean(its) for its in by_model["softmax-rope"].values()]
    for name, spans in by_model.items():
        colour, style = tables.STYLES[name]
        middle = [(first * last) ** 0.5 for first, last in spans]
        loss = [mean(its) for its in spans.values()]
        left.plot(middle, loss, style, color=colour, label=reproduce.MODELS[name].about)
        over = [100 * (a / b - 1) for a, b in zip(loss, zero, strict=True)]
        right.plot(middle, over, style, color=colour)
    left.set(ylabel="validation loss, nats a character")
    left.legend(fontsize=8)
    right.set(ylabel="% over rotary softmax")
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set(xlabel="characters of context")
        panel.grid(alpha=0.3)


def draw_taps(rows, figure):
    """How much higher the loss is without a tap, and without all of a shift or more. Seed 1."""
    rows = [row for row in rows if row["seed"] == 1]
    panels = figure.subplots(1, 3, width_ratios=(3, 3, 4))
    for panel, name in zip(panels, TAPPED, strict=False):
        its = [row for row in rows if row["model"] == name]
        whole = next(row["loss"] for row in its if row["kind"] == "none")
        ones = [row for row in its if row["kind"] == "one"]
        n_layer, n_head = (1 + max(row[key] for row in ones) for key in ("layer", "head"))
        gain = np.zeros((n_layer, n_head))
        shifts = np.zeros((n_layer, n_head), dtype=int)
        for row in ones:
            gain[row["layer"], row["head"]] = row["loss"] - whole
            shifts[row["layer"], row["head"]] = row["shift"]
        panel.imshow(gain, origin="lower", cmap="Blues", vmin=0, aspect="auto")
        for (layer, head), value in np.ndenumerate(gain):
            colour = "white" if value > 0.6 * gain.max() else "black"
            text = f"s={shifts[layer, head]}\n{value:+.3f}"
            panel.text(head, layer, text, ha="center", va="center", fontsize=7, color=colour)
        panel.set(title=reproduce.MODELS[name].about, xlabel="head", xticks=range(n_head))
        panel.set(yticks=range(n_layer))
        colour = "#0072b2" if name == TAPPED[0] else "#d55e00"
        cuts = [(row["shift"], row["loss"]) for row in its if row["kind"] == "from"]
        style = {"color": colour, "label": reproduce.MODELS[name].about}
        panels[2].plot(*zip(*cuts, strict=True), "o-", **style)
        panels[2].axhline(whole, color=colour, ls=":")
    panels[0].set_ylabel("layer")
    panels[2].set_xscale("log", base=2)
    panels[2].xaxis.set_major_formatter("{x:g}")
    panels[2].set(xlabel="all taps of this shift or more silent (dotted: none)")
    panels[2].set(ylabel="validation loss, nats a character")
    panels[2].grid(alpha=0.3)
    panels[2].legend(fontsize=8)


def draw_weights(rows, figure):
    """|b| beside |a|: how much of the past each head takes, by its shift. Seed 1."""
    rows = [row for row in rows if row["seed"] == 1]
    panels = figure.subplots(1, 2, sharey=True)
    for panel, name in zip(panels, TAPPED, strict=True):
        its = [row for row in rows if row["model"] == name]
        layers = [row["layer"] for row in its]
        share = [abs(row["b"]) / (abs(row["a"]) + abs(row["b"])) for row in its]
        dots = panel.scatter([row["shift"] for row in its], share, c=layers, cmap="viridis", s=40)
        panel.axhline(0.5, color="grey", ls=":")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set(title=reproduce.MODELS[name].about, xlabel="shift", ylim=(0, 1))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of the past: |b| / (|a| + |b|)")
    figure.colorbar(dots, ax=panels, label="layer")


def draw_made_up(rows, figure):
    """A panel a size: accuracy by steps, a line a seed."""
    sizes = sorted({row["size"] for row in rows})
    colours = {"softmax-rope": "#000000", "ab": "#0072b2", "mult": "#009e73", "hybrid": "#d55e00"}
    for panel, size in zip(
        np.atleast_1d(figure.subplots(1, len(sizes), sharey=True)), sizes, strict=True
    ):
        for (name, seed), its in grouped(rows, size).items():
            points = [(0, 0.0), *((row["step"], row["accuracy"]) for row in its)]
            label = f"{name} ({LEARNERS[name]})" if seed == 1 else None
            panel.plot(*zip(*points, strict=True), color=colours[name], label=label, alpha=0.8)
            panel.plot(*points[-1], "o", color=colours[name], ms=4)
        panel.set(title=f"size {size}", xlabel="steps", ylim=(-0.02, 1.05))
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("right tokens among those that can be known")
    figure.axes[-1].legend(fontsize=8)


def grouped(rows, size):
    """(model, seed) -> rows of that size."""
    groups = {}
    for row in rows:
        if row["size"] == size:
            groups.setdefault((row["model"], row["seed"]), []).append(row)
    return groups


# ------------------------------------------------------------------------------------------------
# The command

PARTS = {  # name: (rows, models in them, picture, its size)
    "positions": (positions, TRAINED, draw_positions, (11, 4)),
    "taps": (taps, TAPPED, draw_taps, (15, 5)),
    "weights": (weights, TAPPED, draw_weights, (9, 3.8)),
    **{
        name: (partial(made_up, name), LEARNERS, draw_made_up, (4 * len(task.sizes) + 1, 3.8))
        for name, task in TASKS.items()
    },
}


@dataclass
class DiagnoseConfig:
    """What the command line takes. What has a log is not measured again: delete it for that."""

    part: tyro.conf.Positional[Literal[(*PARTS, "all")]] = "all"
    seeds: int = 1  # seeds 1 .. N
    table_only: bool = False  # measure nothing: draw the pictures from the logs
    dir: str = str(HERE)  # where logs/ and the pictures lie


def read_part(path, name):
    """(head, rows) of a log. BadInput where it is damaged, or of other models than PARTS names."""
    head, rows = reproduce.read_log(path)
    if {row["model"] for row in rows} != set(PARTS[name][1]):
        raise BadInput(f"{path.name} is of other models")
    return head, rows


def read_rows(name, folder):
    """Rows of all logs of a part, each with its seed; what cannot be used is named, left out."""
    rows = []
    for path in sorted(Path(folder).glob(f"{name}.s*.jsonl")):
        try:
            head, its = read_part(path, name)
        except BadInput as error:
            print(f"warning: {error}: not counted")
            continue
        rows += [{"seed": head["seed"], **row} for row in its]
    return rows


def main(arguments=None):
    about = "Look into trained models, and at tasks whose answer we know."
    config = parse(DiagnoseConfig, sys.argv[1:] if arguments is None else arguments, about)
    if config.seeds < 1:
        raise BadInput(f"seeds must be at least 1, not {config.seeds}")
    torch.set_num_threads(1)
    logs = Path(config.dir) / "logs" / "diagnose"
    for name in PARTS if config.part == "all" else (config.part,):
        measure, _, draw, size = PARTS[name]
        for seed in () if config.table_only else range(1, config.seeds + 1):
            path = logs / f"{name}.s{seed}.jsonl"
            try:
                if path.is_file() and read_part(path, name):
                    continue
            except BadInput as error:
                print(f"warning: {error}: not counted; measuring it again")
            rows = list(measure(seed=seed))
            head = {"part": name, "seed": seed, **reproduce.surroundings(CPU)}
            reproduce.write_log(path, head, rows)
        rows = read_rows(name, logs)
        if rows:
            tables.save_picture(draw, rows, Path(config.dir) / f"{name}.png", size)
        else:
            print(f"{name}: not yet measured")


if __name__ == "__main__":
    run(main)
