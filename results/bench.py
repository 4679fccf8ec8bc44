"""Measure time and memory against sequence length: HSM beside softmax attention.

    python results/bench.py --quick         small sizes: a minute of two cores
    python results/bench.py --out results   the sizes of bench.md here: half an hour of two cores
    python results/bench.py --table         bench.md and bench.png anew, from the log alone

Both models have equally many parameters and the same inputs, and take turns, round after round. A
ratio is the median of the rounds' ratios, with the middle half of them in brackets: what slows the
machine for a while slows both. Softmax has the kernel that PyTorch picks (FlashAttention, where it
can), no key more than it needs, and no positions to compute. On CUDA a decoded token is a CUDA
graph, as in generate. OUT/logs/bench.jsonl gets a line for each measurement as soon as it is done.
"""

import json
import math
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
from hsm import GPT, BadInput, GPTConfig, as_graph, use_fast  # noqa: E402
from prepare_data import atomic_write, parse, run  # noqa: E402
from train import pick_device, pick_dtype  # noqa: E402

Part = Literal["train", "decode", "forward", "backward"]  # forward, backward: mixing alone


@dataclass
class BenchConfig:
    """What the command line takes. Raises BadInput where a field is out of range."""

    out: str = "out/bench"  # folder for log, table and picture
    parts: tuple[Part, ...] = ("train", "decode", "forward", "backward")
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)  # T; of decode the tokens in the cache
    tokens: int = 4096  # in a step, where T is not longer
    batch: int = 1  # sequences that decode together
    mixer: str = "ab"  # HSM's, tiled over its layers; the other model has softmax in all
    n_layer: int = 6  # blocks
    n_head: int = 6  # heads
    n_embd: int = 384  # width
    rounds: int = 5  # turns that each model takes
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best that is there
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: what it computes best
    compile: bool = False  # each model under torch.compile takes turns, too
    fast: bool = False  # HSM in the Triton kernel takes turns, too
    quick: bool = False  # small sizes, three rounds
    table: bool = False  # measure nothing: write table and picture from the log

    def __post_init__(self):
        if min(*self.lengths, self.batch, self.tokens, self.rounds - 1) < 1:
            raise BadInput("lengths, batch and tokens must be at least 1, and rounds 2")

    def models(self, part, T):
        """What takes turns, {name: GPTConfig}; names may end in " kernel", and in " compiled"."""
        hsm = GPTConfig(256, T, self.n_layer, self.n_head, self.n_embd, self.mixer, pos_emb="none")
        names = ["hsm", *["hsm kernel"] * (self.fast and part != "decode"), "softmax"]
        names += [f"{name} compiled" for name in names] * self.compile
        names += ["copy"] * (part in ("forward", "backward"))
        return {n: replace(hsm, mixers="softmax") if "softmax" in n else hsm for n in names}


def seconds(call, repeats, device):
    """Mean time of a call over `repeats` of them, until the device has done them all."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else int
    wait()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - began) / repeats


def race(makers, rounds, device):
    """Time calls by turns. makers: {name: function that returns a call and bytes}. Facts by name:

    seconds of a call, one a round, None for errors; of all until the first was done; bytes, or
    where they are None the peak of a call with its weights (CUDA).
    """
    calls, facts = {}, {"seconds": {}, "first": {}, "bytes": {}, "errors": {}}
    memory, reset = torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats
    memory, reset = (memory, reset) if device.type == "cuda" else (int, int)
    for name, make in makers.items():
        try:
            reset()
            before, began = memory(), time.perf_counter()
            call, size = make()
            seconds(call, 1, device)
            facts["first"][name] = round(time.perf_counter() - began, 3)
            reset()
            repeats = max(1, math.ceil(0.05 / seconds(call, 1, device)))
            facts["bytes"][name] = memory() - before if size is None else size
            calls[name], facts["seconds"][name] = partial(seconds, call, repeats, device), []
        except Exception as error:  # too little memory, or a kernel that does not compile
            facts["errors"][name] = " ".join(str(error).split())[:80]
            facts["seconds"][name] = call = None
    for _ in range(rounds):
        for name, timed in calls.items():
            facts["seconds"][name].append(float(f"{timed():.4g}"))
    return facts


# ---- What takes turns ----------------------------------------------------------------------------


def build(name, shape, like):
    """The model, like a tensor in type and device, and torch.compile, or what changes nothing."""
    model = GPT(shape).to(like)
    if "kernel" in name:
        use_fast(model)
    return model, torch.compile if "compiled" in name else lambda function: function


def train(name, shape, B, like, part):
    """A training step: forward, backward, AdamW. Its bytes are what the first half keeps."""
    model, way = build(name, shape, like.float())
    idx, on = torch.randint(256, (B, shape.block_size), device=like.device), like.device.type
    forward, size = way(model), saved_bytes(model, idx) if on == "cpu" else None
    optimizer = torch.optim.AdamW(model.parameters(), fused=on != "mps")

    def step():
        with torch.autocast(on, like.dtype, enabled=like.dtype != torch.float32):
            loss = forward(idx, idx)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, size


def saved_bytes(model, idx):
    """Bytes that the forward pass keeps for the backward pass, weights not counted."""
    kept = []  # the tensors themselves, so that no address comes twice
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(idx, idx)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(sizes[address] for address in sizes.keys() - weights)


@torch.no_grad()
def decode(name, shape, B, like, part):
    """A token after T others: the model's call and the likeliest token, fed back."""
    model, way = build(name, shape, like)
    cache, T = model.eval().init_cache(B), shape.block_size
    for chunk in torch.randint(256, (B, T), device=like.device).split(1024, dim=1):
        idx = model(chunk, cache=cache, last_only=True)[0].argmax(-1)  # (B, 1)
    step = partial(way(model), cache=cache)
    step = as_graph(step, idx) if like.is_cuda else step

    @torch.no_grad()
    def token():
        idx.copy_(step(idx)[0].argmax(-1))  # never leaves the device

    seconds(token, 4, like.device)  # as_graph records at the fourth
    return token, model.state_bytes(B, T)


def mix(name, shape, B, like, part):
    """Mixing alone, without linear maps around it: forward, or forward and backward."""
    T, C, H = shape.block_size, shape.n_embd, shape.n_head
    x, weights = like.new_empty(B, T, C).normal_().requires_grad_(), ()
    if name == "copy":
        return x.detach().clone, 0
    model, way = build(name, replace(shape, n_layer=1, proj=False), like)
    if "softmax" in name:
        qkv = like.new_empty(B, T, 3, H, C // H).normal_().requires_grad_()
        inputs = tuple(qkv.permute(2, 0, 3, 1, 4))  # (B, H, T, D) each, as SoftmaxMixer has it
        function = way(partial(F.scaled_dot_product_attention, is_causal=True))
    else:
        mixer, inputs = model.blocks[0].mixer, (x,)
        function, weights = way(mixer), tuple(mixer.parameters())
    e, backward = torch.randn_like(function(*inputs)), part == "backward"

    def call():
        with torch.set_grad_enabled(backward):
            y = function(*inputs)
        if backward:
            torch.autograd.grad(y, (*inputs, *weights), e)

    return call, 0


# ---- The log, a line a measurement; table and picture from it ------------------------------------


def device_name(device):
    """What the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        return next(line.split(": ")[1].strip() for line in file if line.startswith("model name"))
    return "CPU"


def measure(config, log):
    """Measure all that config names; a line in the log for each, as soon as it is there."""
    device = pick_device(config.device)
    like = torch.empty(0, device=device, dtype=pick_dtype(config.dtype, device))
    setting = {name: getattr(config, name) for name in ("mixer", "n_layer", "n_head", "n_embd")}
    setting |= {"device": device.type, "name": device_name(device), "dtype": str(like.dtype)[6:]}
    setting |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    setting |= {"date": date.today().isoformat()}
    log.parent.mkdir(parents=True, exist_ok=True)
    for part, T in ((part, T) for part in config.parts for T in config.lengths):
        torch.compiler.reset()  # else it counts these models as versions of the ones before
        B = config.batch if part == "decode" else max(1, config.tokens // T)
        make = {"train": train, "decode": decode}.get(part, mix)
        models = config.models(part, T).items()
        makers = {name: partial(make, name, shape, B, like, part) for name, shape in models}
        row = {"part": part, "T": T, "batch": B} | race(makers, config.rounds, device) | setting
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        times = {n: f"{1000 * median(s):.4g} ms" for n, s in row["seconds"].items() if s}
        print(f"{part}, T = {T:,}, batch {B}:", times | row["errors"], flush=True)


def read_log(log):
    """{words on a setting: its rows}; of rows of the same measurement the last."""
    settings = {}
    for row in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
        row["tokens"] = row["batch"] * (1 if row["part"] == "decode" else row["T"])  # a call
        words = "{name}, {threads} threads, {dtype}: {mixer}, {n_layer} layers, {n_embd} wide"
        rows = settings.setdefault((words + ", {n_head} heads").format(**row), {})
        rows[row["part"], row["T"], row["batch"], tuple(row["seconds"])] = row
    return {words: list(rows.values()) for words, rows in settings.items()}


def times_as_fast(row, name, other):
    """The rounds' median ratio, and their middle half; a compiled one beside a compiled one."""
    other += " compiled" * ("compiled" in name)
    slow, fast = row["seconds"].get(other), row["seconds"][name]
    if name in (other, "softmax") or not slow or not fast:
        return ""
    low, mid, high = quantiles([s / f for s, f in zip(slow, fast, strict=True)], method="inclusive")
    return f"{mid:.2f} ({low:.2f} .. {high:.2f})"


def report(settings):
    """bench.md: a table for each setting, a line for each model in each measurement."""
    head = "| part | T | batch | | ms | tokens/s | x softmax | x hsm | MiB | compiling, s |\n"
    head += "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    text = "# Speed and memory, HSM beside softmax\n\nBy `python results/bench.py --out results`.\n"
    for words, rows in settings.items():
        text += f"\n## {words}\n\ntorch {rows[-1]['torch']}, {rows[-1]['date']}.\n\n{head}"
        for row, name in [(r, name) for r in rows for name in r["seconds"]]:
            cells = [row["part"], f"{row['T']:,}", row["batch"], name, row["errors"].get(name)]
            if times := row["seconds"][name]:
                ms, size = float(f"{1000 * median(times):.3g}"), row["bytes"][name] / 2**20
                cells[4:] = f"{ms:,g}", f"{row['tokens'] / median(times):,.0f}"
                cells += [times_as_fast(row, name, other) for other in ("softmax", "hsm")]
                cells += [f"{size:,.1f}" if size else ""]
                plain = row["first"].get(name.removesuffix(" compiled"), 0)
                cells += [f"{row['first'][name] - plain:.0f}" if "compiled" in name else ""]
            text += f"| {' | '.join(map(str, cells))} |\n"
    if not any(row["device"] == "cuda" for rows in settings.values() for row in rows):
        text += f"\n## A GPU, by `bash results/gpu.sh`\n\n{head}| all | | | | not run yet |\n"
    return text


def draw(settings, path):
    """bench.png: training and decoding against T, each in the setting with most measurements."""
    from matplotlib.figure import Figure  # here, because it takes a second

    figure = Figure(figsize=(9, 4), layout="constrained")
    for panel, part in zip(figure.subplots(1, 2), ("train", "decode"), strict=True):
        parts = [[row for row in rows if row["part"] == part] for rows in settings.values()]
        rows = max(parts, key=len)[::-1]  # of two batches the first counts
        for name in dict.fromkeys(name for row in rows for name in row["seconds"]):
            rate = {r["T"]: r["tokens"] / median(s) for r in rows if (s := r["seconds"].get(name))}
            panel.plot(sorted(rate), [rate[T] for T in sorted(rate)], "o-", label=name)
            panel.legend()
        panel.set(title=f"{part}, tokens a second", xlabel="T", xscale="log", ylim=0)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main(arguments=None):
    quick = BenchConfig(lengths=(128, 256, 512, 1024), tokens=1024, rounds=3)
    default = quick if "--quick" in (arguments or sys.argv) else None
    config = parse(BenchConfig, arguments, __doc__.splitlines()[0], default)
    out, log = Path(config.out), Path(config.out, "logs", "bench.jsonl")
    if not config.table:
        measure(config, log)
    settings = read_log(log)
    with atomic_write(out / "bench.md") as path:
        path.write_text(report(settings), encoding="utf-8", newline="\n")
    draw(settings, out / "bench.png")


if __name__ == "__main__":
    run(main)
