"""Train a GPT of hsm.py on the token numbers of prepare_data.py.

    python train.py                          the quick preset: minutes on two cores
    python train.py --mixers ab --out out/ab the same without any attention
    python train.py shakespeare              a preset for one GPU
    python train.py --resume                 go on where the last run stopped

The batch of step n is windows of DIR/train.bin at random places that depend on the seed and n
alone, so a resumed run sees what an undisturbed one would have seen. Every evaluation takes the
same windows of DIR/val.bin and writes OUT/ckpt.pt (the last state), OUT/best.pt (the lowest
validation loss) and OUT/log.jsonl; the end adds OUT/loss.png and a sample. From a notebook:
    result = train(TrainConfig(model=GPTConfig(mixers="ab", vocab_size=0), steps=500))
"""

import argparse
import io
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
import zipfile
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from filelock import FileLock, Timeout
from tqdm import tqdm

import prepare_data
from hsm import GPT, BadInput, GPTConfig, layer_table, use_fast
from prepare_data import Tokenizer, atomic_write, bits_per_byte, open_tokens, parse, read_meta, run

Choice = Annotated[bool | None, tyro.conf.arg(constructor=bool)]  # --x, --no-x, or neither: None


def shape(**fields):
    """The shape of the presets' models: two HSM layers for each of softmax, any vocabulary."""
    return GPTConfig(**{"vocab_size": 0, "mixers": "ab,ab,softmax"} | fields)


@dataclass
class TrainConfig:
    """A whole training run. Raises BadInput (a ValueError) where a field is out of range."""

    model: tyro.conf.OmitArgPrefixes[GPTConfig] = field(default_factory=shape)
    data: str = "data/shakespeare_char"  # prepared folder; data/<corpus>_<tokenizer> makes itself
    out: str = "out/quick"  # folder for checkpoints, log and picture
    steps: int = 1700  # updates of the weights
    batch_size: int = 16  # sequences in a batch
    grad_accum: int = 1  # batches added up for an update, where memory allows no larger ones
    lr: float = 8e-3  # highest learning rate
    lr_end: float = 0.1  # share of it that is left at the end of the cosine
    warmup: int = 100  # steps up to the highest learning rate
    weight_decay: float = 0.1  # of the matrices; vectors (a, b, gates' biases, norms) have none
    beta2: float = 0.99  # AdamW's memory of squared gradients (its beta1 is 0.9)
    grad_clip: float = 1.0  # longest gradient; 0: any
    eval_interval: int = 170  # steps between evaluations, each of which saves
    eval_tokens: int = 200_000  # at most so many tokens of val.bin, evenly spread, the same always
    sample_tokens: int = 400  # length of the sample at the end
    seed: int = 1  # of the weights, the dropout and the order of the data
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best that is there
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: what it computes best
    threads: int = 0  # of a CPU; 0: all, or 1 where other programs keep it busy
    compile: Choice = None  # torch.compile: minutes to start, then faster; None: on CUDA
    fast: Choice = None  # hsm.py's kernel; None: on CUDA, where it knows the mixers
    resume: bool = False  # go on from OUT/ckpt.pt; other flags then stay as they were unless given

    def __post_init__(self):
        least = dict.fromkeys(("steps", "batch_size", "grad_accum", "eval_interval"), 1)
        least |= dict.fromkeys(("warmup", "sample_tokens", "seed", "threads", "grad_clip"), 0)
        least |= {"weight_decay": 0, "lr_end": 0, "lr": 1e-30, "eval_tokens": self.model.block_size}
        for name, low in least.items():
            high = 2**20 if name in ("batch_size", "grad_accum") else 2**40
            if not low <= getattr(self, name) <= high:
                raise BadInput(f"{name} must be {low} .. {high:,}, not {getattr(self, name)}")
        if not 0 <= self.beta2 < 1:
            raise BadInput(f"beta2 must be in [0, 1), not {self.beta2}")


LONG = {"steps": 4000, "lr": 4e-3, "eval_interval": 400}
PRESETS = {
    name: TrainConfig(shape(**model), out=f"out/{name}", **settings)
    for name, model, settings in (
        ("quick", {}, {}),
        # The best hybrid and the best HSM alone of the grid in results/README.md.
        ("deep", {"n_layer": 9, "mixers": "vec,vec,softmax", "proj": False, "d_ff": 256}, LONG),
        ("pure", {"mixers": "ab", "in_proj": True, "n_head": 8}, LONG),
        (
            "shakespeare",
            {"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2},
            {"steps": 5000, "batch_size": 64, "lr": 1e-3, "eval_interval": 250},
        ),
        (
            "tinystories",
            {"block_size": 512, "n_layer": 8, "n_head": 8, "n_embd": 512},
            {"data": "data/tinystories_gpt2", "steps": 10_000, "batch_size": 64, "lr": 1e-3}
            | {"warmup": 500, "eval_interval": 500, "eval_tokens": 500_000},
        ),
        (
            "openwebtext",
            {"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768},
            {"data": "data/openwebtext_gpt2", "steps": 20_000, "grad_accum": 30, "lr": 6e-4}
            | {"warmup": 700, "beta2": 0.95, "eval_interval": 500, "eval_tokens": 1_000_000},
        ),
    )
}

# ---- Device, numbers, threads --------------------------------------------------------------------


def pick_device(name="auto"):
    """A torch.device. Raises BadInput if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    here = [device for device, is_there in there.items() if is_there] + ["cpu"]
    if name not in ("auto", *here):
        raise BadInput(f"there is no {name} device here; choose from: auto, {', '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)


def pick_dtype(name, device):
    """The type of matrix products: bfloat16 or, on cards that have none, float16; else float32."""
    if name == "auto" and device.type == "cuda":  # a T4 only pretends to have bfloat16
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if name == "float16" and device.type == "cpu":
        raise BadInput("float16 does not train on a CPU; choose --dtype float32 or bfloat16")
    return torch.float32 if name == "auto" else getattr(torch, name)


def pick_threads():
    """All of PyTorch's threads, or 1 if that is faster just now, by a short trial.

    The threads meet after each operator. Where another program has one of their cores they wait for
    its turn to end, again and again, and training is many times slower than on one thread. The
    number belongs to the run: another one rounds sums in another order.
    """
    n_all, seconds = torch.get_num_threads(), {}
    x, weight = torch.ones(2048, 64), torch.ones(64, 256)
    for n in (n_all, 1, n_all, 1):  # the first round wakes them up
        torch.set_num_threads(n)
        began = time.perf_counter()
        for _ in range(100):
            torch.relu(x @ weight)
        seconds[n] = time.perf_counter() - began
    return 1 if seconds[1] < 0.8 * seconds[n_all] else n_all


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
        with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
            whole = file.testzip() is None
        items = torch.load(path, map_location=device, weights_only=True)
        if not whole or not {"model", "config", "meta"} <= items.keys():
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
        raise BadInput(f"the checkpoint does not fit this hsm.py: {first_line(error)}") from error
    return model.to(device)


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---- Data ----------------------------------------------------------------------------------------


class Windows:
    """Windows of block_size + 1 tokens from one split of a prepared folder, read from the disk."""

    def __init__(self, folder, split, meta, block_size, device):
        self.device, self.vocab_size, self.name = (
            device,
            meta["vocab_size"],
            f"{folder}/{split}.bin",
        )
        self.tokens, self.offsets = open_tokens(folder, split, meta), np.arange(block_size + 1)
        self.n_starts = len(self.tokens) - block_size
        if self.n_starts < 1:
            words = f"too few for block_size={block_size}; choose a smaller one or a longer text"
            raise BadInput(f"{self.name} has {len(self.tokens):,} tokens, {words}")

    def at(self, starts):
        """starts: (B,) integers. Returns idx and targets, (B, T) int64 on the device."""
        window = self.tokens[starts[:, None] + self.offsets].astype(np.int64)  # (B, T + 1)
        if window.max() >= self.vocab_size:
            raise BadInput(f"{self.name} has the token {window.max()}, beyond its vocabulary")
        window = torch.from_numpy(window).to(self.device, non_blocking=True)
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
    """(folder, meta) of a prepared folder; data/<corpus>_<tokenizer> is prepared if it is not yet.

    Without a network, Shakespeare gives way to Python's own library, and the folder is another one.
    """
    folder = Path(folder)
    corpus, _, tokenizer = folder.name.rpartition("_")
    known = corpus in prepare_data.CORPORA and tokenizer in ("char", "byte", "gpt2")
    if (folder / "meta.json").is_file() or not known:
        return folder, read_meta(folder)
    if is_prepared or folder.parent.name != "data":
        raise BadInput(f"there is no {folder} here; --data data/{folder.name} prepares itself")
    print(f"{folder} is not prepared yet; preparing it")
    try:
        return folder, prepare_data.prepare(corpus, tokenizer=tokenizer, folder=folder)
    except BadInput as error:
        if corpus != "shakespeare" or (folder / "input.txt").is_file():
            raise
        print(f"{error}\nno Shakespeare: training on Python's standard library in its place")
    return get_data(folder.parent / "stdlib_byte")


# ---- The run -------------------------------------------------------------------------------------


def learning_rate(config, step):
    """Up in a line over the warm-up, then down a half cosine to lr_end of the highest."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    height = 0.5 * (1 + math.cos(math.pi * min(1, progress)))
    return config.lr * (config.lr_end + (1 - config.lr_end) * height)


def make_optimizer(model, config, device):
    """AdamW. Matrices decay towards 0; a, b, norms and biases, which are no matrices, do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}]
    groups += [{"params": vectors, "weight_decay": 0.0}]
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=fused)


class Trainer:
    """All that changes while a model trains: a checkpoint holds it all, so a run can go on.

    config: a TrainConfig whose vocab_size is known.  meta: of its data.  rank, n_ranks: which of
    how many processes this is; each takes its share of every batch, and gradients are averaged.
    """

    def __init__(self, config, meta, device, rank=0, n_ranks=1):
        self.config, self.meta, self.device, self.out = config, meta, device, Path(config.out)
        self.rank, self.n_ranks, self.dtype = rank, n_ranks, pick_dtype(config.dtype, device)
        if config.batch_size % n_ranks:
            raise BadInput(f"batch_size={config.batch_size} does not divide by {n_ranks} processes")
        T, on_cuda = config.model.block_size, device.type == "cuda"
        self.data = Windows(config.data, "train", meta, T, device)
        self.val = Windows(config.data, "val", meta, T, device)
        torch.manual_seed(config.seed)
        self.model = GPT(config.model).to(device)
        try:
            if config.fast or (config.fast is None and on_cuda):
                use_fast(self.model)
        except BadInput:
            if config.fast:
                raise
        several = n_ranks > 1
        self.replica = nn.parallel.DistributedDataParallel(self.model) if several else self.model
        compiles = on_cuda if config.compile is None else config.compile
        # It shares self.model's weights, whose names in a checkpoint are the plain ones.
        self.compiled = torch.compile(self.replica) if compiles else self.replica
        self.optimizer = make_optimizer(self.model, config, device)
        # Here the scaler is a guard: it leaves a step out, without waiting for the device, if a
        # gradient is not finite. Only in float16, whose numbers end at 65504 and at 6e-8, does it
        # also scale the loss, up to just below the overflow.
        scale, guards = 2.0**16 if self.dtype == torch.float16 else 1.0, device.type != "mps"
        self.scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=guards)
        self.step, self.n_steps, self.history, self.best_loss = 0, 0, [], math.inf
        # Sum and number of the losses since the last evaluation, and steps left out in a row: on
        # the device, because each look at them waits for it.
        self.running = torch.zeros(3, device=device)
        self.seconds_before, self.began = 0.0, time.perf_counter()
        torch.manual_seed(config.seed + rank)  # dropout differs between ranks

    def loss(self, idx, targets):
        """Mean loss of a batch, computed in self.dtype where that is safe (autocast)."""
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if mixed else nullcontext():
            return self.compiled(idx, targets)[1]

    def update(self):
        """One step: gradients of grad_accum batches, clipped, then AdamW. Never waits."""
        config, total = self.config, torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        for i in range(config.grad_accum):
            number = self.step * config.grad_accum + i
            batch = self.data.batch(config.batch_size, config.seed, number, self.rank, self.n_ranks)
            # Several processes average their gradients once a step, with the last batch.
            more_to_come = self.n_ranks > 1 and i < config.grad_accum - 1
            with self.replica.no_sync() if more_to_come else nullcontext():
                loss = self.loss(*batch) / config.grad_accum
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        if self.scaler.is_enabled() or norm.isfinite():
            self.scaler.step(self.optimizer)  # does nothing if a gradient is not finite
        is_half = self.dtype == torch.float16
        self.scaler.update(None if is_half else 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.n_steps = self.step + 1, self.n_steps + 1
        good = (total if is_half else norm).isfinite()  # an overflow in float16 is the scaler's
        loss_sum, n, in_a_row = self.running
        loss_sum = loss_sum + torch.where(good, total, 0.0)
        self.running = torch.stack([loss_sum, n + good, torch.where(good, 0.0, in_a_row + 1)])

    def running_loss(self):
        """Mean loss since the last evaluation, or nan. Waits. BadInput if ten steps are lost."""
        running = self.running / self.n_ranks
        if self.n_ranks > 1:
            dist.all_reduce(running)
        loss_sum, n, in_a_row = running.tolist()
        if in_a_row >= 10:  # that does not mend itself
            raise BadInput(
                f"the gradients were not finite {in_a_row:.0f} steps in a row, up to {self.step}; "
                f"{self.out}/ckpt.pt is from before. Try a smaller --lr or --dtype float32"
            )
        return loss_sum / n if n else math.nan

    @torch.no_grad()
    def val_loss(self):
        """Mean loss over the fixed validation windows, in nats a token."""
        starts, total = self.val.evenly(self.config.eval_tokens), 0.0
        self.model.eval()
        for i in range(0, len(starts), self.config.batch_size):
            some = starts[i : i + self.config.batch_size]
            total += self.loss(*self.val.at(some)) * len(some)
        self.model.train()
        return total.item() / len(starts)

    def speed(self):
        """Seconds of the run, and tokens a second in this process; evaluations included."""
        seconds, config = time.perf_counter() - self.began, self.config
        tokens = self.n_steps * config.grad_accum * config.batch_size * config.model.block_size
        return self.seconds_before + seconds, tokens / seconds

    def evaluate(self):
        """Measure and save. Returns the new row of log.jsonl."""
        train_loss, val_loss = self.running_loss(), self.val_loss()
        if not math.isfinite(val_loss) or not all(
            p.isfinite().all() for p in self.model.parameters()
        ):
            words = f"{self.out}/ckpt.pt is from before. Try a smaller --lr"
            raise BadInput(f"the loss or the weights are not finite at step {self.step}; {words}")
        elapsed, tokens_per_s = self.speed()
        row = {
            "step": self.step,
            "train_loss": None if math.isnan(train_loss) else train_loss,
            "val_loss": val_loss,
            "val_bpb": bits_per_byte(val_loss, self.meta),
            "lr": learning_rate(self.config, max(0, self.step - 1)),
            "tokens_per_s": round(tokens_per_s),
            "elapsed_s": round(elapsed, 2),
        }
        self.history.append(row)
        self.running[:2] = 0
        is_best = val_loss < self.best_loss or not (self.out / "best.pt").is_file()
        self.best_loss = min(val_loss, self.best_loss)
        if self.rank == 0:
            with atomic_write(self.out / "log.jsonl") as path:
                path.write_text("".join(f"{json.dumps(r)}\n" for r in self.history), "utf-8")
            if is_best:
                save_checkpoint(self.out / "best.pt", **self.checkpoint_dict())
            self.save()
        return row

    def checkpoint_dict(self):
        """The model and where it comes from, in plain types: all that sampling needs."""
        settings = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        config = asdict(settings.pop("model"))
        more = {"step": self.step, "best_loss": self.best_loss, "meta": self.meta}
        return {"model": self.model.state_dict(), "config": config, "train": settings, **more}

    def save(self):
        """Write OUT/ckpt.pt: what sampling needs, and all that training goes on from."""
        save_checkpoint(
            self.out / "ckpt.pt",
            **self.checkpoint_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            history=self.history,
            running=self.running.cpu(),
            seconds=self.speed()[0],
            rng=torch.get_rng_state(),  # dropout draws from it
            rng_cuda=torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        )

    def load(self, checkpoint):
        """Become the trainer that was saved. BadInput if its model or data are not these."""
        for name, value in asdict(self.config.model).items():
            old = checkpoint["config"].get(name, value)
            if old != value and name != "dropout":
                words = f"has {name}={old}, not {value}: a resumed model keeps its shape"
                raise BadInput(f"the run in {self.out} {words}; choose another --out")
        if checkpoint["meta"] != self.meta:
            raise BadInput(f"the run in {self.out} had other data than {self.config.data} has now")
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if self.scaler.is_enabled() and checkpoint["scaler"]:
                self.scaler.load_state_dict(checkpoint["scaler"])
            if self.rank:  # only rank 0 saves; the others' dropout goes on with new numbers
                torch.manual_seed(self.config.seed + self.rank + 1000 * checkpoint["step"])
            else:
                torch.set_rng_state(checkpoint["rng"])
                if self.device.type == "cuda" and checkpoint["rng_cuda"] is not None:
                    torch.cuda.set_rng_state(checkpoint["rng_cuda"])
            self.step, self.history = checkpoint["step"], checkpoint["history"]
            self.best_loss, self.seconds_before = checkpoint["best_loss"], checkpoint["seconds"]
            self.running += checkpoint["running"].to(self.device)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise BadInput(f"{self.out}/ckpt.pt is not whole: {first_line(error)}") from error


class Stop:
    """Ctrl-C, SIGTERM and a closed terminal end the run after the step; Ctrl-C twice, at once.

    A context manager. signal: the number of the signal that came, or 0.
    """

    def __enter__(self):
        self.signal, self.before = 0, {}
        if threading.current_thread() is threading.main_thread():  # others may have no handlers
            for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):
                number = getattr(signal, name)
                self.before[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number, _):
        if number == self.signal == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt  # torchrun repeats a Ctrl-C by itself; a person means it
        self.signal = number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Unbreakable:
    """A text stream whose reader may go, or whose disk may be full: then its text goes nowhere."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextmanager
def out_folder(out, resume):
    """Make and lock OUT, and move an earlier run's files to OUT/previous."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock").acquire(timeout=0)  # dropped when this process ends
    except Timeout as error:
        raise BadInput(f"another training writes to {out} now; choose another --out") from error
    except OSError as error:
        raise BadInput(f"cannot write to {out} ({error}); choose another --out") from error
    with lock:
        names = ("ckpt.pt", "best.pt", "log.jsonl", "loss.png")
        for path in [] if resume else [out / name for name in names if (out / name).exists()]:
            (out / "previous").mkdir(exist_ok=True)
            os.replace(path, out / "previous" / path.name)
            print(f"the earlier {path} is now in {out / 'previous'}")
        yield


@contextmanager
def init_distributed(device):
    """Join the processes that torchrun started, each with its GPU if there are any; yields it."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
        dist.barrier()  # nobody leaves while another still works
    except RuntimeError as error:
        words = f"another process of this training has ended ({first_line(error)})"
        raise BadInput(f"{words}; start again with --resume") from error
    finally:
        dist.destroy_process_group()


def loop(trainer, stop):
    """Update and evaluate until the last step, 0, or until a signal came, its number."""
    config, rank, signal_number = trainer.config, trainer.rank, 0
    shows = {"mininterval": 0.3, "dynamic_ncols": True, "disable": True if rank else None}
    with tqdm(total=config.steps, initial=trainer.step, unit="step", **shows) as bar:
        while True:
            last = trainer.history[-1]["step"] if trainer.history else -1
            ends = trainer.step >= config.steps
            if last < trainer.step and (ends or trainer.step % config.eval_interval == 0):
                row, seconds = trainer.evaluate(), time.perf_counter() - trainer.began
                left = (config.steps - trainer.step) * seconds / max(1, trainer.n_steps)
                bar.write(
                    f"step {row['step']:6,}: loss {row['train_loss'] or math.nan:.4f}, validation "
                    f"{row['val_loss']:.4f} nats a token, {row['val_bpb']:.4f} bits a byte; "
                    f"{row['tokens_per_s']:,} tokens/s, {left:.0f} s left"
                )
            if trainer.step % 10 == 0 or trainer.n_ranks == 1:  # asking the others waits
                signal_number = stop.signal
                if trainer.n_ranks > 1:
                    numbers = torch.tensor(signal_number, device=trainer.device)
                    dist.all_reduce(numbers, dist.ReduceOp.MAX)
                    signal_number = numbers.item()
            if ends or signal_number:
                if signal_number and rank == 0:
                    trainer.save()  # before any word, which may have nowhere to go
                return 0 if ends else signal_number
            trainer.update()
            bar.update()
            if trainer.step % 10 == 0:  # each look waits for the device
                words = f"loss {trainer.running_loss():.3f}, {trainer.speed()[1]:,.0f} tokens/s"
                bar.set_postfix_str(words, refresh=False)


@dataclass
class Result:
    """What train() gives back. history: the rows of log.jsonl, a dict an evaluation."""

    model: GPT
    tokenizer: Tokenizer
    history: list
    best_loss: float  # nats a token
    best_bpb: float  # bits a byte
    seconds: float
    out: Path
    stopped_by: int  # 0: it came to its end; else the signal's number


def train(config, saved=None):
    """Train as config (a TrainConfig) says, write into config.out, and return a Result.

    saved: the checkpoint to go on from, where it is loaded already. Raises BadInput for what the
    person can put right: data, device, folder, checkpoint. Started by torchrun, this is one of
    several processes that train one model; rank 0 writes and speaks.
    """
    rank, n_ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    out, device = Path(config.out), pick_device(config.device)
    pick_dtype(config.dtype, device)  # complains, if it must, before any work
    if config.resume and saved is None:
        saved = load_checkpoint(out / "ckpt.pt")
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(Unbreakable(io.StringIO() if rank else sys.stdout)))
        stack.enter_context(redirect_stderr(Unbreakable(sys.stderr)))
        if n_ranks > 1:
            device = stack.enter_context(init_distributed(device))
        for turn in range(n_ranks):  # rank 0 prepares the data, if need be, and the others find it
            if turn == rank:
                folder, meta = get_data(config.data, is_prepared=config.resume)
            if n_ranks > 1:
                dist.barrier()
        vocab_size = config.model.vocab_size or meta["vocab_size"]
        if vocab_size < meta["vocab_size"]:
            raise BadInput(f"vocab_size={vocab_size} is less than the data's {meta['vocab_size']}")
        model = replace(config.model, vocab_size=vocab_size)
        config = replace(config, data=str(folder), model=model)
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        config.threads = config.threads or pick_threads()
        torch.set_num_threads(config.threads)
        tokenizer, trainer = Tokenizer(meta), Trainer(config, meta, device, rank, n_ranks)
        if saved is not None:
            trainer.load(saved)
            if trainer.step > config.steps:
                raise BadInput(f"{out} is at step {trainer.step} already; give more --steps")
            print(f"going on at step {trainer.step:,} of {config.steps:,}")
        if rank == 0:
            stack.enter_context(out_folder(out, config.resume))
        kernel = ", kernel" * any(getattr(b.mixer, "fast", False) for b in trainer.model.blocks)
        name = f"{model.mixers}, {trainer.model.num_params():,} parameters without embeddings"
        print(f"{name}; {folder} -> {out}; {device.type} x {n_ranks}, {trainer.dtype}{kernel}")
        with Stop() as stop:
            stopped_by = loop(trainer, stop)
        best_bpb, seconds = bits_per_byte(trainer.best_loss, meta), trainer.speed()[0]
        more = (trainer.history, trainer.best_loss, best_bpb, seconds, out, stopped_by)
        result = Result(trainer.model, tokenizer, *more)
        if rank == 0:
            report(result, trainer, name)
    return result


def plot(history, title, path):
    """Training and validation loss against steps, as a PNG."""
    from matplotlib.figure import Figure  # here, because it takes a second

    figure = Figure(figsize=(7, 4), layout="constrained")  # pyplot would take a notebook's away
    axes = figure.subplots()
    for key, label, style in (("train_loss", "training", "--"), ("val_loss", "validation", "-")):
        points = [(row["step"], row[key]) for row in history if row[key] is not None]
        axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(title=title, xlabel="steps", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def report(result, trainer, name):
    """What stands at the end of a run: picture, layers, losses, a sample, how to get more."""
    out, step = shlex.quote(str(result.out)), trainer.step
    if result.stopped_by:
        print(f"stopped at step {step:,}, saved. To go on:\n  python train.py --resume --out {out}")
        return
    plot(result.history, name, result.out / "loss.png")
    best = min(result.history, key=lambda row: row["val_loss"])
    print(
        f"\n{layer_table(result.model)}\n\nlowest validation loss {result.best_loss:.4f} nats a "
        f"token = {result.best_bpb:.4f} bits a byte, at step {best['step']:,}; "
        f"{result.seconds:.0f} s of training; curve in {result.out / 'loss.png'}"
    )
    idx = torch.tensor([[result.tokenizer.start]], device=trainer.device)
    generator = torch.Generator(trainer.device).manual_seed(trainer.config.seed)
    stream = result.model.generate(idx, trainer.config.sample_tokens, 0.8, generator=generator)
    print("\n" + result.tokenizer.decode([token.item() for token in stream]))
    print(f"\nmore of it:  python sample.py --out {out}")


def main(arguments=None):
    words = list(sys.argv[1:] if arguments is None else arguments)
    preset, before = "quick", "="
    for i, word in enumerate(words):  # a preset is a word that belongs to no flag
        if not word.startswith("-") and ("=" in before or not before.startswith("-")):
            preset = words.pop(i)
            break
        before = word
    if preset not in PRESETS:
        raise BadInput(f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}")
    default, saved = PRESETS[preset], None
    if {"--resume", "--resume=True"} & set(words):  # what the flags don't say stays as it was
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--out", default=default.out)
        out = finder.parse_known_args(words)[0].out
        saved = load_checkpoint(Path(out) / "ckpt.pt")
        try:
            default = TrainConfig(GPTConfig(**saved["config"]), **saved["train"] | {"out": out})
        except (KeyError, TypeError) as error:
            raise BadInput(f"{out}/ckpt.pt is not a checkpoint of this train.py") from error
    about = f"python train.py [{'|'.join(PRESETS)}] [flags]. The defaults shown are {preset}'s."
    stopped_by = train(parse(TrainConfig, words, about, default), saved).stopped_by
    return 128 + stopped_by if stopped_by else 0  # as shells count


if __name__ == "__main__":
    run(main)
