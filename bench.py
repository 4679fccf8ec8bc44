"""Measure time and memory against sequence length: HSM beside softmax attention.

    python bench.py --quick              small sizes: under two minutes on two cores
    python bench.py                      the sizes of the README's table
    python bench.py --table              table and picture anew from the log, measuring nothing

Three parts:

    mix      mixing alone: delay and pair; softmax's kernel (scaled_dot_product_attention); a copy,
             which is the least that mixing can take, as it reads and writes every number once
    train    a step of a whole model: forward, backward, AdamW
    decode   a token of a whole model at a position, with its cache: delay lines, or keys and values

HSM and softmax have equally many parameters and the same inputs. They take turns, round after
round; a ratio is the median of the rounds' ratios, with the middle half of them in brackets: what
slows the machine for a while slows both. Softmax has the fastest kernel that PyTorch offers for its
shape here (each is tried), room for all its keys and values from the start, and no positions to
compute. On CUDA both decode as CUDA graphs (decode.py); on a CPU as they are, or with --compile
each in its fastest way: as it is, with decode.py's caches, or these compiled. Untrained weights do:
no time depends on their values.

OUT/logs/bench.jsonl has a line for each measurement, with every round, the device, the versions and
the date. A measurement repeated adds its rounds. OUT/bench.md and OUT/bench.png follow from it.
"""

import json
import math
import platform
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from decode import WARM_UP, Decoder
from hsm import GPT, BadInput, GPTConfig, atomic_write
from prepare_data import parse, run
from train import PEAK, Choice, flops_per_token, pick_device, pick_dtype

VOCAB = 256
STEPS = ("plain", "static", "compiled")  # of decoding: hsm.py's caches, decode.py's, and compiled


@dataclass
class BenchConfig:
    """What the command line takes. Raises BadInput where a field is out of range."""

    out: str = "out/bench"  # folder for log, table and picture
    parts: tuple[Literal["mix", "train", "decode"], ...] = ("mix", "train", "decode")
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)  # T of mix and train
    positions: tuple[int, ...] = (128, 1024, 4096, 8192)  # tokens in the cache before decoding
    batches: tuple[int, ...] = (1,)  # sequences that decode together
    mixer: str = "ab"  # HSM's; the other model has softmax in all layers
    in_proj: bool = False  # linear map before the delay
    softmax: bool = True  # without it HSM trains alone, for lengths that softmax takes too long for
    n_layer: int = 6  # blocks
    n_head: int = 6  # heads
    n_embd: int = 384  # width
    tokens: int = 4096  # in a step, where T is not longer
    rounds: int = 5  # turns that each model takes
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best that is there
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: what it computes best
    compile: Choice = None  # torch.compile; decoding on a CPU: if it helps; None: on CUDA
    fast: bool = False  # HSM mixes and trains in fast.py's kernels
    quick: bool = False  # small sizes, three rounds
    table: bool = False  # measure nothing: write table and picture from the log

    def __post_init__(self):
        numbers = ("lengths", "positions", "batches", "n_layer", "n_head", "n_embd", "tokens")
        for name in (*numbers, "rounds"):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if not values or min(values) < 1:
                raise BadInput(f"{name} must be at least 1, not {value}")
        if self.rounds < 2:
            raise BadInput("rounds must be at least 2: one says nothing about the spread")
        self.model("softmax", 2), self.model(self.mixer, 2)

    def model(self, mixers, block_size):
        """The GPTConfig of one of the two models."""
        return GPTConfig(
            vocab_size=VOCAB,
            block_size=block_size,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            mixers=mixers,
            in_proj=self.in_proj,
            pos_emb="none",
        )


QUICK = {"lengths": (256, 512, 1024), "positions": (128, 1024), "tokens": 1024, "rounds": 3}

# ------------------------------------------------------------------------------------------------
# The clock


def wait(device):
    """Return when the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(call, repeats, device):
    """Mean time of a call over `repeats` of them."""
    wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    wait(device)
    return (time.perf_counter() - began) / repeats


def is_out_of_memory(error):
    """On a CPU it is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def race(makers, rounds, device, least=0.05, repeats=None):
    """Time calls by turns. makers: {name: function that returns the call, or None if it can't}.

    A round has as many repeats of a call as take `least` seconds, or `repeats`. Returns two dicts
    by name: seconds a call, a list over rounds, or None where the memory did not suffice; and the
    peak memory of a call in bytes, its weights included (CUDA only).
    """
    calls, times, peaks = {}, {}, {}
    for name, make in makers.items():
        try:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                others = torch.cuda.memory_allocated()
            call = make()
            if call is None:
                continue
            first = seconds(call, 1, device)  # it compiles, and takes memory
            short = repeats is None and first < 100 * least
            n = max(1, math.ceil(least / seconds(call, 1, device))) if short else repeats or 1
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() - others
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            times[name] = None
            continue
        calls[name], times[name] = partial(seconds, call, n, device), []
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(call())
    return times, peaks


# ------------------------------------------------------------------------------------------------
# What is timed. Each function returns (times, facts about the measurement).


def attention(B, T, config, device, dtype):
    """q, k, v for softmax's kernel: (B, H, T, D) each, in the layout that SoftmaxMixer gives it."""
    H, D = config.n_head, config.n_embd // config.n_head
    qkv = torch.randn(B, T, 3, H, D, device=device, dtype=dtype, requires_grad=True)
    return qkv.permute(2, 0, 3, 1, 4)


def best_backend(B, T, config, device, dtype):
    """Softmax's fastest kernel for this shape, forward and backward, of all that run here."""
    backends = ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
    if T > 2048:
        backends.remove("MATH")  # T x T numbers a head: slowest, and too large

    def call():
        q, k, v = attention(B, T, config, device, dtype)
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    fastest = {}
    for name in backends:
        try:
            with warnings.catch_warnings(), sdpa_kernel(getattr(SDPBackend, name)):
                warnings.simplefilter("ignore")  # a backend that can't says why
                first = seconds(call, 1, device)
                again = len(backends) > 1 and first < 5
                fastest[name] = min(seconds(call, 1, device) for _ in range(3)) if again else first
        except RuntimeError:
            continue  # not for this device, type, shape, or memory
    return min(fastest, key=fastest.get)


def fused(model, on):
    """Put fast.py's kernels in, if asked."""
    if on:
        import fast  # here, because it needs Triton

        fast.enable(model)
    return model


def measure_mix(config, T, device, dtype):
    """Mixing alone, without the linear maps around it."""
    B, C = max(1, config.tokens // T), config.n_embd
    backend = best_backend(B, T, config, device, dtype)
    x = torch.randn(B, T, C, device=device, dtype=dtype, requires_grad=True)
    e = torch.randn_like(x)
    q, k, v = attention(B, T, config, device, dtype)
    e_heads = e.view(B, T, config.n_head, -1).transpose(1, 2)

    def hsm(on):
        shape = replace(config.model(config.mixer, T), n_layer=1, proj=False, in_proj=False)
        model = fused(GPT(shape).to(device, dtype), on)
        mixer = model.blocks[0].mixer
        return torch.compile(mixer) if config.compile else mixer

    def forward(function, *inputs, gradient=None):
        with torch.no_grad():
            function(*inputs)

    def both(function, *inputs, gradient):
        torch.autograd.grad(function(*inputs), inputs, gradient)

    softmax = partial(F.scaled_dot_product_attention, is_causal=True)
    facts = {"batch": B, "softmax_kernel": backend}
    results = {}
    for direction, how in (("forward", forward), ("both", both)):
        makers = {
            "hsm": lambda how=how: partial(how, hsm(config.fast), x, gradient=e),
            "softmax": lambda how=how: partial(how, softmax, q, k, v, gradient=e_heads),
            "copy": lambda: partial(forward, torch.clone, x),
        }
        for name, peer in PEERS.items():
            makers[name] = lambda how=how, peer=peer: peer(how, x, e, config)
        with sdpa_kernel(getattr(SDPBackend, backend)):
            times, _ = race(makers, config.rounds, device)
        results |= {f"{name}, {direction}": value for name, value in times.items()}
    return results, facts


def fla_token_shift(how, x, e, config):
    """flash-linear-attention's token shift (by one): a peer of the delay alone."""
    from fla.modules.token_shift import token_shift

    return partial(how, token_shift, x, gradient=e)


def fla_linear_attention(how, x, e, config):
    """flash-linear-attention's linear attention: a peer of the mixing."""
    from fla.ops.linear_attn import chunk_linear_attn

    heads = [x.detach().unflatten(-1, (config.n_head, -1)).requires_grad_() for _ in range(3)]
    gradient = e.unflatten(-1, (config.n_head, -1))
    return partial(how, lambda *qkv: chunk_linear_attn(*qkv)[0], *heads, gradient=gradient)


def optional(peer):
    """A peer's function, or None where its package is missing or this is no CUDA device."""

    def make(how, x, e, config):
        try:
            return peer(how, x, e, config) if x.device.type == "cuda" else None
        except ImportError:
            return None

    return make


# NOT YET RUN: they need a CUDA device. Packages: flash-linear-attention.
PEERS = {
    "fla token shift": optional(fla_token_shift),
    "fla linear attention": optional(fla_linear_attention),
}


def measure_train(config, T, device, dtype):
    """A training step: forward, backward, AdamW."""
    B = max(1, config.tokens // T)
    backend = best_backend(B, T, config, device, dtype) if config.softmax else None
    idx = torch.randint(VOCAB, (B, T), device=device)
    facts = {"batch": B, "softmax_kernel": backend, "parameters": {}, "saved_bytes": {}}

    def make(name, mixers):
        torch.manual_seed(0)
        model = fused(GPT(config.model(mixers, T)).to(device), config.fast and name == "hsm")
        facts["parameters"][name] = model.num_params(non_embedding=False)
        facts["saved_bytes"][name] = saved_bytes(model, idx) if device.type == "cpu" else None
        optimizer = torch.optim.AdamW(model.parameters(), fused=device.type in ("cpu", "cuda"))
        compiled = torch.compile(model) if config.compile else model

        def step():
            mixed = dtype != torch.float32
            with torch.autocast(device.type, dtype) if mixed else nullcontext():
                loss = compiled(idx, idx)[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    makers = {"hsm": partial(make, "hsm", config.mixer)}
    if config.softmax:
        makers["softmax"] = partial(make, "softmax", "softmax")
    with sdpa_kernel(getattr(SDPBackend, backend)) if backend else nullcontext():
        times, peaks = race(makers, config.rounds, device)
    return times, facts | {"peak_bytes": peaks}


def saved_bytes(model, idx):
    """Bytes that the forward pass keeps for the backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(idx, idx)[1]  # alive until all are counted, so that no address comes twice
    total = sum(kept.values())
    del loss
    return total


def measure_decode(config, position, batch, device, dtype):
    """A token at `position`: the model's call and the likeliest token, fed back."""
    torch.compiler.reset()  # else what an earlier measurement compiled is compiled again here
    repeats = 8
    room = repeats * (config.rounds + 6)
    facts = {"batch": batch, "state_bytes": {}, "steps": {}}

    @torch.no_grad()
    def make(name, mixers, step):
        torch.manual_seed(0)
        idx = torch.randint(VOCAB, (batch, position), device=device)
        facts["graph"] = idx.is_cuda
        # In fixed shapes softmax sees `position` tokens: all slots filled, and no mask to apply.
        fixed = mixers == "softmax" and step != "plain"
        shape = config.model(mixers, position if fixed else max(config.positions) + room)
        model = GPT(shape).to(device, dtype).eval()
        facts["state_bytes"][name] = model.state_bytes(batch, position)
        cache = model.init_cache(batch, position + room)
        logits, _ = model(idx, cache=cache, last_only=True)
        idx = logits.argmax(-1)  # (B, 1)
        decoder = None
        if step != "plain":
            decoder = Decoder(torch.compile(model) if step == "compiled" else model, cache)

        @torch.no_grad()
        def token():
            nonlocal idx
            if decoder is None:
                logits, _ = model(idx, cache=cache, last_only=True)
            else:
                logits = decoder(idx)
            idx = logits.argmax(-1)  # never leaves the device

        for _ in range(WARM_UP):  # it compiles; on CUDA the clock's first call captures the graph
            token()
        return token

    def fastest(name, mixers):
        """Its call in the way that is fastest here, of those that config allows."""
        on_cuda = torch.zeros(1, device=device).is_cuda
        steps = ["static"] if on_cuda else STEPS if config.compile else ["plain"]
        calls = {step: make(name, mixers, step) for step in steps}
        best = steps[0]
        if len(steps) > 1:
            trials = [{s: seconds(calls[s], repeats, device) for s in steps} for _ in range(3)]
            best = min(steps, key=lambda step: min(trial[step] for trial in trials))
        facts["steps"][name] = best
        return calls[best]

    makers = {
        "hsm": partial(fastest, "hsm", config.mixer),
        "softmax": partial(fastest, "softmax", "softmax"),
    }
    times, peaks = race(makers, config.rounds, device, repeats=repeats)
    return times, facts | {"peak_bytes": peaks}


# ------------------------------------------------------------------------------------------------
# The log


def device_name(device):
    """What the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


def measure(config):
    """Measure all that config names; a line in the log for each, as soon as it is there."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    config = replace(
        config, compile=device.type == "cuda" if config.compile is None else config.compile
    )
    if config.fast:
        fused(GPT(config.model(config.mixer, 2)).to(device), True)  # complains now, if it must
    setting = {
        "mixer": config.mixer + (" with in-projection" if config.in_proj else ""),
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "device": device.type,
        "name": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "dtype": str(dtype).removeprefix("torch."),
        "compile": config.compile,
        "fast": config.fast,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
    jobs = [
        ("mix", T, partial(measure_mix, config, T, device, dtype)) for T in config.lengths
    ] + [
        ("train", T, partial(measure_train, config, T, device, dtype)) for T in config.lengths
    ] + [
        ("decode", p, partial(measure_decode, config, p, batch, device, dtype))
        for batch in config.batches
        for p in config.positions
    ]  # fmt: skip
    log = Path(config.out) / "logs" / "bench.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    for part, T, job in jobs:
        if part not in config.parts:
            continue
        times, facts = job()
        times = {k: s and [float(f"{t:.4g}") for t in s] for k, s in times.items()}
        row = {"part": part, "T": T} | facts | {"seconds": times} | setting
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(describe(row), flush=True)


def describe(row):
    """One line on a measurement, while it runs."""
    parts = [
        f"{name} {1000 * median(s):.4g} ms" if s else f"{name} out of memory"
        for name, s in row["seconds"].items()
    ]
    return f"{row['part']}, T = {row['T']:,}, batch {row['batch']}: {'; '.join(parts)}"


def read_log(folder):
    """The log's rows; those of the same measurement become one, with all their rounds."""
    path = Path(folder) / "logs" / "bench.jsonl"
    if not path.is_file():
        raise BadInput(f"there is no {path}; measure first: python bench.py")
    merged = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            times = row["seconds"]
            key = (*setting_of(row), row["part"], row["T"], row["batch"], *sorted(times))
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path}, line {number}, is no measurement of bench.py") from error
        if key in merged:
            for name, before in merged[key]["seconds"].items():
                now = times[name]
                times[name] = None if before is None or now is None else before + now
        merged[key] = row
    return list(merged.values())


def setting_of(row):
    """What measurements must have in common to stand in one table."""
    names = ("name", "device", "threads", "dtype", "compile", "fast", "mixer")
    return tuple(row[name] for name in (*names, "n_layer", "n_head", "n_embd"))


# ------------------------------------------------------------------------------------------------
# Figures, table, picture


def ratio(row, slow, fast):
    """(median, lower quartile, upper quartile) of the rounds' ratios, or None."""
    pair = row["seconds"].get(slow), row["seconds"].get(fast)
    if not all(pair):
        return None
    ratios = [s / f for s, f in zip(*pair, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return median(ratios), low, high


def exponent(lengths, costs):
    """p in cost = k T^p: the slope of a straight line through the logarithms."""
    x, y = [math.log(T) for T in lengths], [math.log(cost) for cost in costs]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    rise = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return rise / sum((a - x_mean) ** 2 for a in x)


def share_of_peak(row, name):
    """Useful operations a second over the card's peak, or None where we don't know it."""
    peak = PEAK.get(row["name"]) if row["dtype"] != "float32" else None
    if not peak or not row["seconds"].get(name):
        return None
    n_softmax = row["n_layer"] if name == "softmax" else 0
    a_token = flops_per_token(row["parameters"][name], n_softmax, row["n_embd"], row["T"])
    flops = a_token * row["batch"] * row["T"]
    return flops / median(row["seconds"][name]) / (peak * 1e12)


def cell(row, name, form):
    """form(median seconds), or why there is none."""
    times = row["seconds"].get(name)
    return form(median(times)) if times else "out of memory" if name in row["seconds"] else "-"


def times(triple):
    """A ratio and its middle half, or a dash."""
    return "-" if triple is None else "**{:.2f}** ({:.2f} .. {:.2f})".format(*triple)


def milliseconds(s):
    return f"{1000 * s:,.{max(0, 2 - math.floor(math.log10(1000 * s)))}f}"


def mib(size):
    return "-" if size is None else f"{size / 2**20:,.1f}"


def table(head, rows):
    return "\n".join(
        "| " + " | ".join(map(str, r)) + " |" for r in [head, ["---"] * len(head), *rows]
    )


def train_table(rows):
    peaks = [row for row in rows if row["device"] == "cuda"]
    memory, bytes_of = ("peak memory, MiB", "peak_bytes") if peaks else ("kept, MiB", "saved_bytes")
    names, head = ("hsm", "softmax"), ["T", "batch", "HSM, tokens/s", "softmax, tokens/s"]
    head += ["HSM is faster", f"HSM {memory}", f"softmax {memory}"]
    shares = any(share_of_peak(row, name) for row in rows for name in names)
    head += ["HSM share of peak", "softmax share of peak"] if shares else []
    lines = []
    for row in rows:
        n = row["batch"] * row["T"]
        line = [f"{row['T']:,}", row["batch"]]
        line += [cell(row, name, lambda s, n=n: f"{n / s:,.0f}") for name in names]
        line += [times(ratio(row, "softmax", "hsm"))]
        line += [mib(row[bytes_of].get(name)) for name in names]
        if shares:
            line += [f"{share_of_peak(row, name) or 0:.0%}" for name in names]
        lines.append(line)
    text = table(head, lines)
    for tokens in sorted({row["batch"] * row["T"] for row in rows}):  # so that T alone differs
        alike = [r for r in rows if r["batch"] * r["T"] == tokens and r["T"] >= 1024]
        for name, title in zip(names, ("HSM", "softmax"), strict=True):
            points = [
                (row["T"], median(row["seconds"][name]) / row["batch"])
                for row in alike
                if row["seconds"].get(name)
            ]
            if len(points) > 2:
                lengths, costs = zip(*points, strict=True)
                text += (
                    f"\n\n{title}, {tokens:,} tokens a step, T = {min(lengths):,} to "
                    f"{max(lengths):,}: a sequence costs T^p, fitted p = "
                    f"{exponent(lengths, costs):.2f}."
                )
    return text


def mix_table(rows):
    known = [name.split(",")[0] for row in rows for name in row["seconds"]]
    peers = sorted(set(known) - {"hsm", "softmax", "copy"})
    head = ["T", "batch", "", "copy, ms", "HSM, ms", "softmax, ms", "HSM is faster"]
    head += ["HSM over copy", *(f"{peer}, ms" for peer in peers)]
    lines = []
    for row in rows:
        for direction in ("forward", "both"):
            hsm, softmax, copy = (f"{name}, {direction}" for name in ("hsm", "softmax", "copy"))
            line = [f"{row['T']:,}", row["batch"], direction.replace("both", "and backward")]
            line += [cell(row, name, milliseconds) for name in (copy, hsm, softmax)]
            over = ratio(row, hsm, copy)
            line += [times(ratio(row, softmax, hsm)), "-" if over is None else f"{over[0]:.1f}"]
            line += [cell(row, f"{peer}, {direction}", milliseconds) for peer in peers]
            lines.append(line)
    return table(head, lines)


def decode_table(rows):
    head = ["position", "batch", "HSM, ms a token", "softmax, ms a token", "HSM is faster"]
    head += ["HSM state, MiB", "softmax state, MiB"]
    lines = []
    for row in rows:
        line = [f"{row['T']:,}", row["batch"]]
        line += [cell(row, name, milliseconds) for name in ("hsm", "softmax")]
        line += [times(ratio(row, "softmax", "hsm"))]
        line += [mib(row["state_bytes"][name]) for name in ("hsm", "softmax")]
        lines.append(line)
    text = table(head, lines)
    if any(row.get("graph") for row in rows):
        text += "\n\nA token is one CUDA graph."
    else:
        for name, title in (("hsm", "HSM"), ("softmax", "softmax")):
            ways = {row.get("steps", {}).get(name) for row in rows} - {None}
            if ways:
                text += f"\n\nThe fastest step for {title}: {', '.join(sorted(ways))}."
    for batch in sorted({row["batch"] for row in rows}):
        ends = [row for row in rows if row["batch"] == batch and row["seconds"]["hsm"]]
        if len(ends) > 1:
            first, last = (median(row["seconds"]["hsm"]) for row in (ends[0], ends[-1]))
            text += (
                f"\n\nHSM, batch {batch}: a token at position {ends[-1]['T']:,} takes "
                f"{last / first:.2f} times what it takes at {ends[0]['T']:,}."
            )
    return text


PARTS = {
    "train": ("Training: a step of the whole model", train_table),
    "mix": ("Mixing alone", mix_table),
    "decode": ("Decoding: one token a call", decode_table),
}

NOT_RUN = """## A CUDA device: not run

No GPU was at hand. On one H100 (12 layers, 768 wide, 65,536 tokens a step, bfloat16) run

    python bench.py --out results --n-layer 12 --n-head 12 --n-embd 768 --tokens 65536 \\
        --lengths 1024 4096 16384 65536 --positions 1024 4096 16384 65536 --batches 1 64
    python bench.py --out results --n-layer 12 --n-head 12 --n-embd 768 --tokens 65536 \\
        --lengths 1024 4096 16384 65536 --parts mix train --fast

| T | training, HSM faster | mixing, HSM faster | decoding, batch 1 | decoding, batch 64 |
| --- | --- | --- | --- | --- |
| 1,024 | not run | not run | not run | not run |
| 4,096 | not run | not run | not run | not run |
| 16,384 | not run | not run | not run | not run |
| 65,536 | not run | not run | not run | not run |
"""


def report(rows):
    """bench.md: a section for each setting, a table for each part."""
    text = "# Speed and memory, HSM beside softmax\n\nWritten by `python bench.py --table`.\n"
    for setting in sorted({setting_of(row) for row in rows}, key=str):
        mine = [row for row in rows if setting_of(row) == setting]
        row = mine[-1]
        threads = f", {row['threads']} threads" if row["threads"] else ""
        how = ("compiled" if row["compile"] else "eager") + (", fast.py" if row["fast"] else "")
        versions = ", ".join(sorted({f"torch {r['torch']}, {r['date']}" for r in mine}))
        text += (
            f"\n## {row['name']}{threads}, {row['dtype']}, {how}\n\n{row['n_layer']} layers, "
            f"{row['n_embd']} wide, {row['n_head']} heads; HSM: {row['mixer']}. {versions}.\n"
        )
        for part, (title, make) in PARTS.items():
            its = sorted((r for r in mine if r["part"] == part), key=lambda r: (r["batch"], r["T"]))
            if part != "decode":
                its.sort(key=lambda r: r["T"])
            if its:
                text += f"\n### {title}\n\n{make(its)}\n"
    if not any(row["device"] == "cuda" for row in rows):
        text += f"\n{NOT_RUN}"
    return text


def draw(rows, path):
    """bench.png: each part against T, in the setting in which it was measured last."""
    import matplotlib  # here, because it takes a second

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    last = {row["part"]: setting_of(row) for row in rows}
    rows = [row for row in rows if setting_of(row) == last[row["part"]]]
    colours = {"hsm": "#0072b2", "softmax": "#d55e00", "copy": "#9a9a9a"}  # colour-blind eyes
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    titles = {"train": "training step, ms a 1,000 tokens", "mix": "mixing alone, ms a 1,000 tokens"}
    titles["decode"] = "decoding, ms a token"
    for panel, (part, title) in zip(axes, titles.items(), strict=True):
        its = sorted((r for r in rows if r["part"] == part), key=lambda r: r["T"])
        its = [row for row in its if part != "decode" or row["batch"] == its[0]["batch"]]
        for name, colour in colours.items():
            key = f"{name}, {'forward' if name == 'copy' else 'both'}" if part == "mix" else name
            points = [
                (r["T"], 1000 * t / (1 if part == "decode" else r["batch"] * r["T"] / 1000))
                for r in its
                for t in r["seconds"].get(key) or ()
            ]
            lengths = sorted({T for T, _ in points})
            if points:
                middle = [median(ms for T, ms in points if length == T) for length in lengths]
                label = {"hsm": "HSM", "copy": "copy, forward"}.get(name, name)
                panel.plot(lengths, middle, "-", color=colour, label=label)
                panel.plot(*zip(*points, strict=True), "o", color=colour, ms=3, alpha=0.5)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set(title=title, xlabel="position" if part == "decode" else "T")
        panel.grid(alpha=0.3, which="both")
        panel.set_visible(bool(its))
        panel.yaxis.set_major_formatter("{x:g}")  # not powers of ten
        low, high = panel.get_ylim()
        panel.yaxis.set_minor_formatter("{x:g}" if high < 20 * low else "")
        if its:
            ticks = sorted({r["T"] for r in its})
            panel.set_xticks(ticks, [f"{T:,}" for T in ticks])
            panel.legend()
    figure.suptitle("a dot is a round, a line goes through the medians", fontsize=9)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def configure(arguments):
    """The BenchConfig that the command line's words ask for."""
    description = "Measure time and memory against sequence length: HSM beside softmax."
    config = parse(BenchConfig, arguments, description)
    if config.quick:  # its sizes, except those that were asked for
        config = parse(BenchConfig, arguments, description, BenchConfig(**QUICK))
    return config


def main(arguments=None):
    config = configure(sys.argv[1:] if arguments is None else arguments)
    if not config.table:
        measure(config)
    rows, out = read_log(config.out), Path(config.out)
    with atomic_write(out / "bench.md") as path:
        Path(path).write_text(report(rows), encoding="utf-8", newline="\n")
    draw(rows, out / "bench.png")
    print(f"\n{report(rows)}" if not config.table else f"{out / 'bench.md'}, {out / 'bench.png'}")


if __name__ == "__main__":
    run(main)
