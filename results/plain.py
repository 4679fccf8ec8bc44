"""Measure plain PyTorch ways to write delay and pair: y = a x + b z, z[t] = x[t - s].

    python results/plain.py           measure what results/logs/plain.jsonl has not yet
    python results/plain.py --table   write the log as tables to results/fast.md

Each way runs eagerly and under torch.compile, forward alone and forward with backward, for one
shift and for four heads with shifts of their own. The number of tokens is always 16,384, so only
the shape changes with T. The ways take turns, round after round, and a figure is the median of
(time of the way / time of pad in the same round): what disturbs the machine cancels.
"""

import argparse
import json
import platform
import time
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
LOG = HERE / "logs" / "plain.jsonl"
TOKENS, WIDTH, THREADS, ROUNDS = 16384, 384, 2, 15
LENGTHS = (128, 1024, 4096, 16384)
SHIFTS = ((8,), (1, 2, 4, 8))

# ------------------------------------------------------------------------------------------------
# The ways. x: (B, T, C); a, b: (C,); returns (B, T, C).


def by_heads(delay):
    """The mixer of hsm.py around a delay: cut into heads, delay each, join, then the pair."""

    def way(x, a, b, shifts):
        heads = x.chunk(len(shifts), dim=-1)
        z = torch.cat([delay(head, s) for head, s in zip(heads, shifts, strict=True)], dim=-1)
        return a * x + b * z

    return way


def pad(x, s):
    return F.pad(x, (0, 0, s, 0))[:, : x.size(1)]


def cat(x, s):
    return torch.cat([x.new_zeros(x.size(0), s, x.size(2)), x[:, : x.size(1) - s]], dim=1)


def roll(x, s):
    t = torch.arange(x.size(1), device=x.device)[:, None]
    return torch.where(t >= s, x.roll(s, dims=1), 0)


def index(x, s):
    t = torch.arange(x.size(1), device=x.device) - s
    return torch.where(t[:, None] >= 0, x[:, t.clamp(min=0)], 0)


def fill(x, a, b, shifts):
    """Copy each head into its place in a z of zeros."""
    z, n = torch.zeros_like(x), x.size(2) // len(shifts)
    for h, s in enumerate(shifts):
        head = slice(h * n, h * n + n)
        z[:, s:, head] = x[:, : x.size(1) - s, head]
    return a * x + b * z


def add(x, a, b, shifts):
    """Add b x, shifted, onto a slice of a x; there is no z."""
    y, n = a * x, x.size(2) // len(shifts)
    for h, s in enumerate(shifts):
        head = slice(h * n, h * n + n)
        y[:, s:, head] += b[head] * x[:, : x.size(1) - s, head]
    return y


def conv(x, a, b, shifts):
    """A depthwise convolution with two taps, s apart."""
    weight, n = torch.stack([b, a], dim=-1)[:, None], x.size(2) // len(shifts)
    heads = zip(x.mT.chunk(len(shifts), dim=1), weight.chunk(len(shifts)), shifts, strict=True)
    y = [F.conv1d(F.pad(head, (s, 0)), w, dilation=s, groups=n) for head, w, s in heads]
    return torch.cat(y, dim=1).mT


WAYS = {
    "pad": by_heads(pad),  # hsm.py
    "cat": by_heads(cat),
    "roll": by_heads(roll),
    "index": by_heads(index),
    "fill": fill,
    "add": add,
    "conv": conv,
}

# ------------------------------------------------------------------------------------------------
# Measuring


def inputs(T):
    generator = torch.Generator().manual_seed(0)
    sizes = ((TOKENS // T, T, WIDTH), (WIDTH,), (WIDTH,))
    return [torch.randn(size, generator=generator, requires_grad=True) for size in sizes]


def forward(way, x, a, b, gradient):
    with torch.no_grad():
        return way(x, a, b)


def both(way, x, a, b, gradient):
    return torch.autograd.grad(way(x, a, b), (x, a, b), gradient)


def measure(T, shifts, mode, direction):
    """A row of the log: seconds of pad, and each way's time over pad's."""
    x, a, b = inputs(T)
    gradient, run = torch.ones_like(x), {"forward": forward, "both": both}[direction]
    calls, expected = {}, WAYS["pad"](x, a, b, shifts)
    for name, way in WAYS.items():
        torch.compiler.reset()
        way = partial(way, shifts=shifts)
        way = torch.compile(way, dynamic=False) if mode == "compiled" else way
        torch.testing.assert_close(way(x, a, b), expected)
        calls[name] = partial(run, way, x, a, b, gradient)
        calls[name]()
    seconds = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    pads = seconds["pad"]
    return {
        "T": T,
        "shifts": shifts,
        "mode": mode,
        "direction": direction,
        "pad_ms": round(1000 * median(pads), 3),
        "over_pad": {
            name: round(median(s / p for s, p in zip(times, pads, strict=True)), 3)
            for name, times in seconds.items()
        },
        "machine": f"{platform.machine()}, {THREADS} threads",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def key(row):
    return row["T"], tuple(row["shifts"]), row["mode"], row["direction"]


def read_log():
    lines = LOG.read_text(encoding="utf-8").splitlines() if LOG.exists() else []
    return {key(row): row for row in map(json.loads, lines)}


HEAD = """# Plain ways to write delay and pair, measured

Written by `python results/plain.py --table`. y = a x + b z, z[t] = x[t - s]; 16,384 tokens, 384
wide, float32; {machine}, torch {torch}, {date}. `pad` is hsm.py's way: its milliseconds. Of the
others, the time over that of `pad` in the same round, median of 15 rounds: below 1 is faster.

- **cat** zeros before a slice. **roll** and `torch.where`. **index** with clamped positions, and
  `torch.where`. **fill**: copy each head into a z of zeros. **add**: no z, b x is added in place
  onto a slice of a x. **conv**: a depthwise convolution, dilated.
- A row that is missing was not run.

hsm.py keeps `pad`: with four heads, forward and backward, no other eager way is faster at more than
one of the four lengths, and `add`, the fastest forward, takes up to three times as long. Compiled
and trained, `roll` was the faster one in every row that was run, by up to a half; eager, it is the
slower one in all rows but one. Under torch.compile on a GPU that choice is open: measure it there.

"""


def table():
    """Markdown tables, one for a mode and a direction."""
    log = read_log()
    lines = [HEAD.format(**list(log.values())[-1])]
    for mode in ("eager", "compiled"):
        for direction in ("forward", "both"):
            rows = [row for k, row in log.items() if k[2:] == (mode, direction)]
            if not rows:
                continue
            what = {"forward": "forward", "both": "forward and backward"}[direction]
            head = ["shifts", "T", "pad, ms", *list(WAYS)[1:]]
            lines += [f"**{mode}, {what}**", "", "| " + " | ".join(head) + " |"]
            lines.append("|" + " --- |" * len(head))
            for row in sorted(rows, key=lambda row: (len(row["shifts"]), row["T"])):
                ratios = [f"{row['over_pad'][name]:.2f}" for name in list(WAYS)[1:]]
                shifts = ",".join(map(str, row["shifts"]))
                cells = [shifts, f"{row['T']:,}", f"{row['pad_ms']:.1f}", *ratios]
                lines.append("| " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="write the log as tables")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after about so long")
    arguments = parser.parse_args()
    if arguments.table:
        (HERE / "fast.md").write_text(table(), encoding="utf-8", newline="\n")
        return
    torch.set_num_threads(THREADS)
    LOG.parent.mkdir(exist_ok=True)
    began = time.perf_counter()
    for mode in ("eager", "compiled"):
        for T in LENGTHS:
            for shifts in SHIFTS:
                for direction in ("forward", "both"):
                    late = time.perf_counter() - began > arguments.seconds
                    if late or (T, shifts, mode, direction) in read_log():
                        continue
                    row = measure(T, shifts, mode, direction)
                    with open(LOG, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
