"""Train a GPT of hsm.py on the token numbers of prepare_data.py.

    python train.py [--mixers ab]             the quick preset: minutes on two cores
    python train.py shakespeare               a preset for one GPU
    python train.py --resume                  go on where the last run stopped

The batch of step n and its dropout depend on the seed and n alone, so a resumed run is the one that
was never stopped. An evaluation takes the same windows of DIR/val.bin each time, and saves.
"""

import io
import json
import math
import os
import shlex
import signal
import sys
import time
import zipfile
from collections import namedtuple
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from filelock import FileLock
from matplotlib.figure import Figure
from tqdm import tqdm

import prepare_data
from hsm import GPT, BadInput, GPTConfig, layer_table, use_fast
from prepare_data import Tokenizer, atomic_write, bits_per_byte, parse, read_meta, run, say

OnOffAuto = Annotated[bool | None, tyro.conf.arg(constructor=bool)]  # --x, --no-x, or neither: None
SHAPE = {"vocab_size": 0, "mixers": "ab,ab,softmax"}  # the presets' models, any vocabulary


@dataclass
class TrainConfig:
    """A whole training run. Raises BadInput (a ValueError) where a field is out of range."""

    model: tyro.conf.OmitArgPrefixes[GPTConfig] = field(default_factory=lambda: GPTConfig(**SHAPE))
    data: str = "data/shakespeare_char"  # prepared folder; data/<corpus>_<tokenizer> makes itself
    out: str = "out/quick"  # folder for checkpoints, log and picture
    steps: int = 2600  # updates of the weights
    batch_size: int = 16  # sequences in a batch
    grad_accum: int = 1  # batches added up for an update, where memory allows no larger ones
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, AdamW elsewhere
    lr: float = 8e-3  # highest learning rate
    lr_end: float = 0.1  # share of it that is left at the end of the cosine
    warmup: int = 100  # steps up to the highest learning rate
    weight_decay: float = 0.1  # of the matrices; vectors (a, b, gates' biases, norms) have none
    beta2: float = 0.99  # AdamW's memory of squared gradients (its beta1 is 0.9)
    grad_clip: float = 1.0  # longest gradient; 0: any
    eval_interval: int = 200  # steps between evaluations, each of which saves
    eval_tokens: int = 200_000  # at most so many tokens of val.bin, evenly spread, the same always
    sample_tokens: int = 400  # length of the sample at the end
    seed: int = 1  # of the weights, the dropout and the order of the data
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best that is there
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: what it computes best
    threads: int = 0  # of a CPU; 0: all, or 1 where other programs keep it busy
    compile: OnOffAuto = None  # torch.compile: minutes to start, then faster; None: on CUDA
    fast: OnOffAuto = None  # hsm.py's kernel; None: on CUDA, where it knows the mixers
    resume: bool = False  # go on from OUT/ckpt.pt; other flags then stay as they were unless given

    def __post_init__(self):
        lowest = dict.fromkeys(("steps", "batch_size", "grad_accum", "eval_interval"), 1)
        lowest |= {"lr": 1e-30, "eval_tokens": self.model.block_size}
        highest = {"beta2": 0.99999, "threads": 999, "batch_size": 2**20}
        for name, value in vars(self).items():
            low, high = lowest.get(name, 0), highest.get(name, 2**31)
            if isinstance(value, int | float) and not low <= value <= high:
                raise BadInput(f"{name} must be {low} .. {high:,}, not {value}")


BIG = {"warmup": 500, "eval_interval": 500, "eval_tokens": 500_000}
PRESETS = {  # the model, where it is not SHAPE, and the training, where it is not TrainConfig's
    # hybrid-deep of results/README.md, trained so that it learns less by heart.
    "quick": (
        {"block_size": 256, "n_layer": 9, "mixers": "vec,vec,softmax", "proj": False, "d_ff": 256},
        {"batch_size": 8, "lr": 6e-3, "lr_end": 0.0, "weight_decay": 0.5},
    ),
    "shakespeare": (
        {"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2},
        {"steps": 5000, "batch_size": 64, "lr": 1e-3, "eval_interval": 250},
    ),
    "tinystories": (
        {"block_size": 512, "n_layer": 8, "n_head": 8, "n_embd": 512},
        {**BIG, "data": "data/tinystories_gpt2", "steps": 10_000, "batch_size": 64, "lr": 1e-3},
    ),
    "openwebtext": (
        {"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768},
        {**BIG, "data": "data/openwebtext_gpt2", "steps": 20_000, "grad_accum": 30, "lr": 6e-4},
    ),
}
for name, (model, more) in PRESETS.items():
    PRESETS[name] = TrainConfig(GPTConfig(**SHAPE | model), out=f"out/{name}", **more)


# ---- Device, numbers, threads --------------------------------------------------------------------
def pick_device(name="auto"):
    """A torch.device. Raises BadInput if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    here = [device for device in there if there[device]] + ["cpu"]
    if name not in ("auto", *here):
        raise BadInput(f"there is no {name} device here; choose from: auto, {', '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)


def pick_dtype(name, device):
    """The type of matrix products: bfloat16 or, on cards that have none, float16; else float32."""
    if name == "auto" and device.type == "cuda":  # a T4 only pretends to have bfloat16
        real = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if real else torch.float16
    return torch.float32 if name == "auto" else getattr(torch, name)


def pick_threads():
    """All of PyTorch's threads, or 1 if that is twice as fast just now, by a short trial.

    The threads meet after each operator: where another program has one of their cores, they wait
    for its turn to end. The number belongs to the run: another one rounds sums in another way.
    """
    n_all, calls = torch.get_num_threads(), {}
    x, weight = torch.ones(2048, 64), torch.ones(64, 256)
    for n in (n_all, 1, n_all, 1):  # the first round wakes them up
        torch.set_num_threads(n)
        calls[n], end = 0, time.perf_counter() + 0.05
        while time.perf_counter() < end:
            torch.relu(x @ weight)
            calls[n] += 1
    return 1 if calls[1] > 2 * calls[n_all] else n_all


# ---- Checkpoints: tensors and plain types, so that loading one runs nobody's code ----------------
def save_checkpoint(path, **items):
    """Write items (tensors, state dicts, plain types) to path, whole or not at all (BadInput)."""
    buffer = io.BytesIO()  # torch reports a full disk in a way of its own, Python by its name
    torch.save(items, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path, device="cpu"):
    """Read what save_checkpoint wrote, a dict, its tensors on `device`. BadInput if it can't be."""
    if not os.path.isfile(path):
        raise BadInput(f"there is no checkpoint {path}; train one first: python train.py")
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at the checksums
        items = torch.load(path, map_location=device, weights_only=True)
        if damaged or not {"model", "config", "meta", "train"} <= items.keys():
            raise ValueError("damaged, or another program's")
    except Exception as error:  # zip, pickle and torch each have errors of their own
        raise BadInput(f"{path} is no checkpoint of ours, or it is damaged or cut off") from error
    return items


def model_from(checkpoint, device="cpu"):
    """The GPT in a checkpoint, on `device`. BadInput if weights and configuration do not fit."""
    try:
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, AttributeError, RuntimeError, BadInput) as error:
        reason = str(error).split("\n")[0]
        raise BadInput(f"the checkpoint does not fit this hsm.py: {reason}") from error
    return model.to(device)


# ---- Data ----------------------------------------------------------------------------------------
def open_tokens(folder, split, meta):
    """DIR/train.bin or DIR/val.bin as a read-only array that stays on the disk (numpy.memmap)."""
    path, dtype = Path(folder) / f"{split}.bin", np.dtype(meta["dtype"]).newbyteorder("<")
    expected = meta[f"{split}_tokens"] * dtype.itemsize
    if not path.is_file() or path.stat().st_size != expected:
        raise BadInput(f"{path} has not {expected:,} bytes; delete {folder} and prepare it again")
    return np.memmap(path, dtype, mode="r")


class Windows:
    """Windows of block_size + 1 tokens from one split of a prepared folder, read from the disk."""

    def __init__(self, folder, split, meta, block_size, device):
        self.tokens, self.offsets = open_tokens(folder, split, meta), np.arange(block_size + 1)
        self.device, self.n_starts = device, len(self.tokens) - block_size
        if self.n_starts < 1:
            raise BadInput(f"{folder}/{split}.bin has too few tokens for block_size={block_size}")

    def at(self, starts):
        """starts: (B,) integers. Returns idx and targets, (B, T) int64 on the device."""
        window = self.tokens[starts[:, None] + self.offsets].astype(np.int64)  # (B, T + 1)
        window = torch.from_numpy(window).to(self.device, non_blocking=self.device.type == "cuda")
        return window[:, :-1], window[:, 1:]

    def batch(self, size, seed, number, rank=0, n_ranks=1):
        """The batch with this number, whatever was drawn before it; of several ranks, a share."""
        starts = np.random.default_rng((seed, number)).integers(self.n_starts, size=size)
        return self.at(starts[rank::n_ranks])

    def evenly(self, n_tokens):
        """Starts of windows side by side, or evenly spread where all are over n_tokens."""
        T = len(self.offsets) - 1
        starts = np.arange(0, self.n_starts, T)
        n = min(len(starts), max(1, n_tokens // T))
        return starts[np.arange(n) * len(starts) // n]


def get_data(folder, is_prepared=False):
    """(folder, meta) of a prepared folder; data/CORPUS_TOKENIZER prepares itself, if need be."""
    folder, (corpus, _, tokenizer) = Path(folder), Path(folder).name.rpartition("_")
    if (folder / "meta.json").is_file() or folder.name not in prepare_data.FOLDERS:
        return folder, read_meta(folder)
    if is_prepared or folder.parent.name != "data":
        way = "go where it is" if is_prepared else f"--data data/{folder.name} prepares itself"
        raise BadInput(f"there is no {folder} here; {way}")
    try:
        say(f"{folder} is not prepared yet; preparing it")
        return folder, prepare_data.prepare(corpus, tokenizer=tokenizer, folder=folder)
    except BadInput as error:
        if corpus != "shakespeare" or (folder / "input.txt").is_file():
            raise
        say(f"{error}\nno Shakespeare: training on Python's standard library in its place")
    return get_data(folder.parent / "stdlib_byte")


# ---- The run -------------------------------------------------------------------------------------
def learning_rate(config, step):
    """Up in a line over the warm-up, then down a half cosine to lr_end of the highest."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = min(1, (step - config.warmup) / max(1, config.steps - config.warmup))
    height = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.lr_end + (1 - config.lr_end) * height)


def make_optimizers(model, config, device):
    """[AdamW], or [AdamW, Muon]. Matrices decay towards 0; a, b, norms and biases do not.

    Muon takes the blocks' matrices: its steps are as long in all directions (K. Jordan, 2024).
    """
    kinds = {"blocks": [], "matrices": [], "vectors": []}
    for name, p in model.named_parameters():
        for_muon = config.optimizer == "muon" and "blocks" in name and p.dim() == 2
        kinds["blocks" if for_muon else "matrices" if p.dim() >= 2 else "vectors"].append(p)
    blocks, matrices, vectors = kinds.values()
    decay, fused = config.weight_decay, device.type != "mps"
    groups = {"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}
    optimizers = [torch.optim.AdamW(groups, config.lr, (0.9, config.beta2), fused=fused)]
    if blocks:  # scaled so that one rate does for both (arXiv:2502.16982)
        muon = torch.optim.Muon(blocks, config.lr, decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def catch_signals(stack):
    """A list of the signals that come while the stack lasts; a second Ctrl-C ends at once."""
    caught = []

    def handle(number, _):
        if number == signal.SIGINT and number in caught and "RANK" not in os.environ:
            raise KeyboardInterrupt  # torchrun repeats a Ctrl-C by itself; a person means it
        caught.append(number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        with suppress(ValueError, AttributeError):  # in a second thread; on Windows
            number = getattr(signal, name)
            if (before := signal.getsignal(number)) != signal.SIG_IGN:  # as nohup asks for
                signal.signal(number, handle)
                stack.callback(signal.signal, number, before)
    return caught


ADVICE = "; what is saved is from before. Try a smaller --lr, or --dtype float32"
Result = namedtuple("Result", "model tokenizer history best_loss best_bpb seconds out stopped_by")


def train(config, saved=None):
    """Train as config (a TrainConfig) says, write into config.out, and return a Result.

    saved: the checkpoint to go on from, if it is loaded already.  In the Result, history has the
    rows of log.jsonl, stopped_by a signal's number or 0. BadInput for what a person can put right.
    """
    rank, n_ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    out, device = Path(config.out), pick_device(config.device)
    on_cuda, dtype = device.type == "cuda", pick_dtype(config.dtype, device)
    if config.batch_size % n_ranks:
        raise BadInput(f"batch_size={config.batch_size} does not divide by {n_ranks} processes")
    if config.resume and saved is None:
        saved = load_checkpoint(out / "ckpt.pt")
    with ExitStack() as stack:
        if n_ranks > 1:
            if rank == 0:  # it prepares the data, if need be, before the others go on
                get_data(config.data, is_prepared=config.resume)
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) if on_cuda else None
            dist.init_process_group("nccl" if on_cuda else "gloo")
            stack.callback(dist.destroy_process_group)
        folder, meta = get_data(config.data, is_prepared=config.resume)
        shape = replace(config.model, vocab_size=config.model.vocab_size or meta["vocab_size"])
        if shape.vocab_size < meta["vocab_size"]:
            raise BadInput(f"vocab_size={shape.vocab_size} is less than the data have")
        config, tokenizer = replace(config, data=str(folder), model=shape), Tokenizer(meta)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        config.threads = config.threads or pick_threads()
        torch.set_num_threads(config.threads)
        B, T = config.batch_size, shape.block_size
        data, val = (Windows(folder, split, meta, T, device) for split in ("train", "val"))
        val_windows = np.split(s := val.evenly(config.eval_tokens), range(B, len(s), B))
        torch.manual_seed(config.seed)
        model = GPT(shape).to(device)
        with nullcontext() if config.fast else suppress(BadInput):
            if config.fast or (config.fast is None and on_cuda):
                use_fast(model)
        replica = torch.nn.parallel.DistributedDataParallel(model) if n_ranks > 1 else model
        compiles = on_cuda if config.compile is None else config.compile
        # All share the model's weights: these stay float32, and have plain names in a checkpoint.
        compiled = torch.compile(replica) if compiles else replica
        compiled = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)(compiled)
        optimizers = make_optimizers(model, config, device)
        # The scaler is a guard: it leaves out a step whose gradient is not finite, without waiting
        # for the device. Only in float16, from 6e-8 to 65504, does it scale the loss, too.
        is_half, guards = dtype == torch.float16, device.type != "mps" and len(optimizers) == 1
        scale, is_on = (2.0**16 if is_half else 1.0), guards or (is_half and on_cuda)
        scaler = torch.amp.GradScaler(device.type, scale, enabled=is_on)
        # On the device, as each look waits: sum and number of losses, and steps left out in a row.
        running = torch.zeros(3, device=device)
        step, history, best_loss, seconds_before = 0, [], math.inf, 0.0
        if saved is not None:
            for name, value in (asdict(shape) | {"optimizer": config.optimizer}).items():
                before = (saved["config"] | saved["train"]).get(name, value)
                if before != value and name != "dropout":
                    raise BadInput(f"{out} has {name}={before}, not {value}; --resume keeps it")
            if saved["step"] > config.steps:
                raise BadInput(f"{out} is at step {saved['step']} already; give more --steps")
            if saved["meta"] != meta:
                raise BadInput(f"the run in {out} had other data than {folder} has now")
            model.load_state_dict(saved["model"])
            for new, old in zip(optimizers, saved["optimizer"], strict=True):  # options: the flags'
                new.load_state_dict(new.state_dict() | {"state": old["state"]})
            scaler.load_state_dict(saved["scaler"] or scaler.state_dict())
            running += saved["running"].to(device)
            names = ("step", "history", "best_loss", "seconds")
            step, history, best_loss, seconds_before = (saved[name] for name in names)
        began = time.perf_counter() - seconds_before

        def save(name):
            settings = {f.name: getattr(config, f.name) for f in fields(config)}
            items = {"config": asdict(settings.pop("model")), "train": settings, "meta": meta}
            items |= {"scaler": scaler.state_dict() if is_half else {}, "model": model.state_dict()}
            items |= {"optimizer": [o.state_dict() for o in optimizers], "running": running.cpu()}
            items |= {"step": step, "history": history, "best_loss": best_loss}
            save_checkpoint(out / name, **items, seconds=time.perf_counter() - began)

        if rank == 0:
            try:  # the lock makes the folder, too
                stack.enter_context(FileLock(out / ".lock", timeout=0))
            except OSError as error:
                raise BadInput(f"another training writes {out}, or nobody can: {error}") from error
            for name in () if config.resume else ("ckpt.pt", "best.pt", "log.jsonl", "loss.png"):
                if (out / name).exists():
                    (out / "previous").mkdir(exist_ok=True)
                    os.replace(out / name, out / "previous" / name)
            size, what = f"{model.num_params():,} parameters", f"{device.type} x {n_ranks}, {dtype}"
            say(f"{shape.mixers}, {size}; {folder} -> {out}; {what}, {config.threads} threads")
        caught = catch_signals(stack)
        bar = tqdm(total=config.steps, initial=step, mininterval=0.3, disable=bool(rank) or None)
        while True:
            ends, last = step >= config.steps, history[-1]["step"] if history else -1
            if last < step and (ends or step % config.eval_interval == 0):
                loss_sum, n, _ = running.tolist()  # of several processes this one's
                model.eval()
                with torch.no_grad():  # the same windows each time
                    losses = [compiled(*val.at(some))[1] * len(some) for some in val_windows]
                model.train()
                val_loss = sum(losses).item() / sum(map(len, val_windows))
                if not math.isfinite(val_loss):
                    raise BadInput(f"validation loss {val_loss} at step {step}{ADVICE}")
                seconds = time.perf_counter() - began
                tokens_per_s = step * config.grad_accum * B * T / seconds
                row = {"step": step, "train_loss": loss_sum / n if n else None}
                row |= {"val_loss": val_loss, "val_bpb": bits_per_byte(val_loss, meta)}
                row |= {"lr": learning_rate(config, max(0, step - 1))}
                row |= {"tokens_per_s": round(tokens_per_s), "elapsed_s": round(seconds, 2)}
                history.append(row)
                running[:2] = 0
                is_best = val_loss < best_loss or not (out / "best.pt").is_file()
                best_loss = min(val_loss, best_loss)
                if rank == 0:
                    for name in ("best.pt", "ckpt.pt") if is_best else ("ckpt.pt",):
                        save(name)
                    with atomic_write(out / "log.jsonl") as path:
                        path.write_text("".join(f"{json.dumps(r)}\n" for r in history), "utf-8")
                    left = (config.steps - step) * seconds / max(1, step)
                    pace = f"; {tokens_per_s:,.0f} tokens/s, {left:.0f} s left" if step else ""
                    loss = f"loss {loss_sum / n:.4f}, validation" if n else "validation"
                    bits = f"{row['val_bpb']:.4f} bits a byte{pace}"
                    say(f"step {step:,}: {loss} loss {val_loss:.4f} nats a token, {bits}")
            number = max(caught, default=0)
            if n_ranks > 1:  # it may have reached one process alone; asking the others waits
                numbers = torch.tensor(number, device=device)
                dist.all_reduce(numbers, dist.ReduceOp.MAX) if step % 10 == 0 else numbers.zero_()
                number = numbers.item()
            if number and not ends and rank == 0:
                save("ckpt.pt")  # before any word, which may have nowhere to go
            if number or ends:
                break
            # A step: gradients of grad_accum batches, clipped, then AdamW. It never waits.
            if shape.dropout:  # its numbers, too, depend on the seed and the step alone
                entropy = np.random.SeedSequence((config.seed, step, rank))
                torch.manual_seed(int(entropy.generate_state(1)[0]))
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = learning_rate(config, step)
            total = torch.zeros((), device=device)
            for i in range(config.grad_accum):
                batch = data.batch(B, config.seed, step * config.grad_accum + i, rank, n_ranks)
                replica.require_backward_grad_sync = i == config.grad_accum - 1  # DDP: once a step
                loss = compiled(*batch)[1] / config.grad_accum
                scaler.scale(loss).backward()
                total += loss.detach()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or 1e30)
            if guards or norm.isfinite():  # the second waits
                for optimizer in optimizers:
                    scaler.step(optimizer)  # does nothing if a gradient of its own is not finite
            scaler.update(None if is_half else 1.0)
            model.zero_grad(set_to_none=True)
            step += 1
            bar.update()
            good = (total if is_half else norm).isfinite()  # an overflow in float16: the scaler's
            loss_sum, n, in_a_row = running
            loss_sum = loss_sum + torch.where(good, total, 0.0)
            running = torch.stack([loss_sum, n + good, torch.where(good, 0.0, in_a_row + 1)])
            if step % 10 == 0:  # each look waits for the device
                loss_sum, n, in_a_row = running.tolist()
                if in_a_row >= 10:  # that does not mend itself
                    raise BadInput(f"gradients not finite {in_a_row:.0f} steps in a row{ADVICE}")
                bar.set_postfix_str(f"loss {loss_sum / max(1, n):.3f}", refresh=False)
        bar.close()
        best = (best_loss, bits_per_byte(best_loss, meta), history[-1]["elapsed_s"])
        result = Result(model, tokenizer, history, *best, out, 0 if ends else number)
        if rank == 0 and not ends:
            say(f"saved. Go on:  python train.py --resume --out {shlex.quote(str(out))}")
        elif rank == 0:
            report(result, config)
    return result


def report(result, config):
    """What stands at the end of a run: picture, layers, losses, a sample, how to get more."""
    out, device = shlex.quote(str(result.out)), result.model.wte.weight.device
    figure = Figure(figsize=(7, 4), layout="constrained")  # pyplot would take a notebook's away
    axes = figure.subplots()
    for key, style in (("train_loss", "--"), ("val_loss", "-")):
        losses = [math.nan if row[key] is None else row[key] for row in result.history]
        axes.plot([row["step"] for row in result.history], losses, style, label=key)
    axes.set(title=config.model.mixers, xlabel="steps", ylabel="nats a token")
    axes.legend()
    with atomic_write(result.out / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    say(f"\n{layer_table(result.model)}\n")
    best = f"{result.best_loss:.4f} nats a token = {result.best_bpb:.4f} bits a byte"
    say(f"lowest validation loss {best}; {result.seconds:.0f} s; curve in {out}/loss.png\n")
    idx = torch.tensor([[result.tokenizer.start]], device=device)
    generator = torch.Generator(device).manual_seed(config.seed)
    stream = result.model.generate(idx, config.sample_tokens, 0.8, generator=generator)
    say(result.tokenizer.decode([token.item() for token in stream]))
    say(f"\nmore of it:  python sample.py --out {out}")


def main(arguments=None):
    words = list(sys.argv[1:] if arguments is None else arguments)
    places = [i for i, w in enumerate(words) if w in PRESETS and (not i or "=" in words[i - 1])]
    preset = words.pop(places[0]) if places else "quick"
    if words and not words[0].startswith("-"):
        raise BadInput(f"unknown preset {words[0]!r}; choose from {', '.join(PRESETS)}")
    default, saved, pairs = PRESETS[preset], None, [w for word in words for w in word.split("=", 1)]
    if any(word.lower() in ("--resume", "--resume=true") for word in words):
        out = pairs[pairs.index("--out") + 1] if "--out" in pairs[:-1] else default.out
        saved = load_checkpoint(Path(out) / "ckpt.pt")  # what the flags don't say stays as it was
        try:
            default = TrainConfig(GPTConfig(**saved["config"]), **saved["train"] | {"out": out})
        except TypeError as error:
            raise BadInput(f"{out}/ckpt.pt is not a checkpoint of this train.py") from error
    about = f"python train.py [{'|'.join(PRESETS)}] [flags]. The defaults shown are {preset}'s."
    try:
        stopped_by = train(parse(TrainConfig, words, about, default), saved).stopped_by
    except RuntimeError as error:
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise BadInput("torch.compile does not work here; use --no-compile") from error
        if "WORLD_SIZE" in os.environ:
            raise BadInput(f"{error!s:.200}; if another process ended: --resume") from error
        raise
    return 128 + stopped_by if stopped_by else 0  # as shells count


if __name__ == "__main__":
    run(main)
