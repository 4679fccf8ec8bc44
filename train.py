"""Train a GPT of hsm.py on the token numbers of prepare_data.py.

    python train.py                                      the quick preset: minutes on two cores
    python train.py --mixers ab --out out/ab             the same without any attention
    python train.py --mixers softmax --out out/softmax   the same with nothing else
    python train.py shakespeare                          a preset for one GPU
    python train.py --resume                             go on where the last run stopped

The way of the data: DIR/train.bin lies on the device (or stays on the disk, if it is too large);
the batch of step n is windows at random places that depend on the seed and n alone, so a resumed
run sees what an undisturbed one would have seen. Every evaluation takes the same windows of
DIR/val.bin and writes OUT/ckpt.pt (the last state), OUT/best.pt (the lowest validation loss) and
OUT/log.jsonl, each whole or not at all; the end adds OUT/loss.png and a sample. Several GPUs of one
machine:  torchrun --standalone --nproc_per_node=2 train.py shakespeare

From a notebook:  result = train(TrainConfig(model=GPTConfig(mixers="ab", vocab_size=0), steps=500))
"""

import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
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

from hsm import (
    GPT,
    BadInput,
    GPTConfig,
    atomic_write,
    first_line,
    layer_table,
    load_checkpoint,
    model_from,
    n_params,
    save_checkpoint,
)
from prepare_data import (
    CORPORA,
    Tokenizer,
    bits_per_byte,
    open_tokens,
    parse,
    prepare,
    read_meta,
    run,
)


def shape(**fields):
    """The shape of the presets' models: two HSM layers for each of softmax, any vocabulary."""
    return GPTConfig(**{"vocab_size": 0, "mixers": "ab,ab,softmax"} | fields)


Choice = Annotated[bool | None, tyro.conf.arg(constructor=bool)]  # --x, --no-x, or neither: None


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
    compile: Choice = None  # torch.compile: minutes to start, then faster; None: on CUDA
    fast: Choice = None  # fast.py's Triton kernels; None: on CUDA, where they know the mixers
    resume: bool = False  # go on from OUT/ckpt.pt; other flags then stay as they were unless given

    def __post_init__(self):
        for name in ("batch_size", "grad_accum", "steps", "eval_interval"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "grad_clip", "sample_tokens", "seed", "lr_end"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadInput(f"{name} must be 0 or more, not {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise BadInput(f"lr must be over 0, not {self.lr}")
        if not 0 <= self.beta2 < 1:
            raise BadInput(f"beta2 must be in [0, 1), not {self.beta2}")
        if self.eval_tokens < self.model.block_size:
            raise BadInput(
                f"eval_tokens ({self.eval_tokens}) must hold a window of "
                f"block_size={self.model.block_size}"
            )


PRESETS = {
    "quick": TrainConfig(),
    # As many parameters as seven layers of softmax have, with a feed-forward network just as wide:
    # what HSM's layers save is two more layers. The best of the grid (results/README.md).
    "deep": TrainConfig(
        model=shape(n_layer=9, mixers="vec,vec,softmax", proj=False, d_ff=256),
        out="out/deep",
        steps=4000,
        lr=4e-3,
        eval_interval=400,
    ),
    # HSM alone, the best of the grid: with eight heads each layer has all shifts from 1 to 64.
    "pure": TrainConfig(
        model=shape(mixers="ab", in_proj=True, n_head=8),
        out="out/pure",
        steps=4000,
        lr=4e-3,
        eval_interval=400,
    ),
    "shakespeare": TrainConfig(
        model=shape(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2),
        out="out/shakespeare",
        steps=5000,
        batch_size=64,
        lr=1e-3,
        eval_interval=250,
    ),
    "tinystories": TrainConfig(
        model=shape(block_size=512, n_layer=8, n_head=8, n_embd=512),
        data="data/tinystories_gpt2",
        out="out/tinystories",
        steps=10_000,
        batch_size=64,
        lr=1e-3,
        warmup=500,
        eval_interval=500,
        eval_tokens=500_000,
    ),
    "openwebtext": TrainConfig(
        model=shape(block_size=1024, n_layer=12, n_head=12, n_embd=768),
        data="data/openwebtext_gpt2",
        out="out/openwebtext",
        steps=20_000,
        batch_size=16,
        grad_accum=30,
        lr=6e-4,
        warmup=700,
        beta2=0.95,
        eval_interval=500,
        eval_tokens=1_000_000,
    ),
}

# ------------------------------------------------------------------------------------------------
# Device and numbers


def pick_device(name="auto"):
    """A torch.device. Raises BadInput if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there["cpu"] = True
    if name == "auto":
        name = next(device for device, here in there.items() if here)
    if not there[name]:
        here = ", ".join(device for device in there if there[device])
        raise BadInput(f"there is no {name} device on this machine; choose from: auto, {here}")
    return torch.device(name)


def pick_dtype(name, device):
    """The type of matrix products: bfloat16 or, on cards that have none, float16; else float32."""
    if name == "auto":
        name = "float32"
        if device.type == "cuda":
            has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            name = "bfloat16" if has_bfloat16 else "float16"
    if name == "float16" and device.type == "cpu":
        raise BadInput("float16 does not train on a CPU; choose --dtype float32 or bfloat16")
    return getattr(torch, name)


def wants(choice, device):
    """What a Choice means: the person's word, or without one, what is faster on a GPU."""
    return device.type == "cuda" if choice is None else choice


def choose_kernels(model, wanted, device):
    """Let the model mix in fast.py's kernels, or not; wanted None: on CUDA, where they can.

    Returns words for the run's first line. Raises BadInput if they are wanted and cannot.
    """
    if not wants(wanted, device):
        return ""
    try:
        import fast  # here, because it needs Triton

        fast.enable(model)
    except BadInput as error:
        if wanted:
            raise
        reason = str(error).removesuffix("; use --no-fast")
        return f"; without fused kernels ({reason})"
    return "; fused kernels"


# ------------------------------------------------------------------------------------------------
# What the card could do

# Dense 16-bit peak in TFLOP/s, accumulating in float32, by the name that the driver gives. Sources:
# NVIDIA's data sheets (H100, H200, A100, L4, T4) and architecture white papers (Ampere GA102 and
# Ada AD102, for the GeForce cards). A card that is not here gets no share.
PEAK = {
    "NVIDIA H200": 989.4,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA L4": 121.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
    "Tesla T4": 65.0,
}


def peak_flops(device, dtype):
    """Dense operations a second of the card at hand, or None where we don't know them."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    tera = PEAK.get(torch.cuda.get_device_name(device))
    return tera and tera * 1e12


def flops_per_token(n_weights, n_softmax, C, T):
    """Useful operations of a training step, a token: 6 n_weights + 12 n_softmax C T / 2.

    A weight is multiplied and added once forward and twice backward (the embedding as the output's
    matrix alone); so are C numbers in each of softmax's two products, for every key, and a token
    sees half of T keys on average.
    """
    return 6 * n_weights + 12 * n_softmax * C * T // 2


# ------------------------------------------------------------------------------------------------
# Data


class Windows:
    """Windows of block_size + 1 tokens from one split of a prepared folder.

    The tokens go on the device once if they take at most a quarter of its free memory (2 GiB of a
    CPU's); otherwise they stay on the disk and each batch is read from there.
    """

    def __init__(self, folder, split, meta, block_size, device):
        self.device, self.vocab_size = device, meta["vocab_size"]
        self.name = f"{folder}/{split}.bin"
        tokens = open_tokens(folder, split, meta)
        if len(tokens) <= block_size:
            raise BadInput(
                f"{self.name} has {len(tokens):,} tokens, a window of block_size={block_size} and "
                "the token after it need more; choose a smaller --block-size or a longer text"
            )
        room = torch.cuda.mem_get_info()[0] // 4 if device.type == "cuda" else 2**31
        self.on_device = 4 * len(tokens) <= room
        self.tokens = self._checked(tokens).to(device) if self.on_device else tokens
        self.n_tokens, self.offsets = len(tokens), torch.arange(block_size + 1)

    def _checked(self, numbers):
        numbers = numbers.astype(np.int32)
        if numbers.max() >= self.vocab_size:
            raise BadInput(
                f"{self.name} has the token {numbers.max()}, beyond its vocabulary of "
                f"{self.vocab_size}; delete the folder and prepare it again"
            )
        return torch.from_numpy(numbers)

    def at(self, starts):
        """starts: (B,) int64 on the CPU. Returns idx and targets, (B, T) int64 on the device."""
        places = starts[:, None] + self.offsets  # (B, T + 1)
        if self.on_device:
            window = self.tokens[places.to(self.device, non_blocking=True)]
        else:
            window = self._checked(self.tokens[places.numpy()]).to(self.device)
        window = window.long()
        return window[:, :-1], window[:, 1:]

    def batch(self, size, seed, number, rank=0, n_ranks=1):
        """Random windows: the batch with this number, whatever was drawn before; a rank's share.

        NumPy seeds with both numbers; a torch.Generator on the CPU takes 32 bits in all.
        """
        n_starts = self.n_tokens - len(self.offsets) + 1
        starts = np.random.default_rng((seed, number)).integers(n_starts, size=size)
        return self.at(torch.from_numpy(starts[rank::n_ranks].copy()))

    def evenly(self, n_tokens):
        """Starts of windows side by side, or evenly spread where all are over n_tokens."""
        T = len(self.offsets) - 1
        starts = torch.arange(0, self.n_tokens - T, T)
        n = max(1, n_tokens // T)
        if len(starts) > n:
            starts = starts[torch.arange(n) * len(starts) // n]
        return starts


def get_data(folder):
    """(folder, meta) of a prepared folder. data/<corpus>_<tokenizer> is prepared if it is not yet.

    Without a network, Shakespeare gives way to Python's own library, and the folder is another one.
    Raises BadInput if there are no data and no way to get them.
    """
    folder = Path(folder)
    corpus, _, tokenizer = folder.name.rpartition("_")
    known = corpus in CORPORA and corpus != "file" and tokenizer in ("char", "byte", "gpt2")
    if (folder / "meta.json").is_file() or not known:
        return folder, read_meta(folder)
    print(f"{folder} is not prepared yet; preparing it")
    try:
        return folder, prepare(corpus, tokenizer=tokenizer, folder=folder)
    except BadInput as error:
        if corpus != "shakespeare" or (folder / "input.txt").is_file():
            raise
        print(f"{error}\nno Shakespeare: training on Python's standard library in its place")
    return get_data(folder.parent / "stdlib_byte")


# ------------------------------------------------------------------------------------------------
# Optimizer and evaluation


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
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=fused)


# ------------------------------------------------------------------------------------------------
# The run

TOO_MANY = 10  # steps in a row whose gradients are not finite


class Trainer:
    """All that changes while a model trains: a checkpoint holds it all, so a run can go on.

    config: a TrainConfig whose vocab_size is known.  meta: of its data.  rank, n_ranks: which of
    how many processes this is; each takes its share of every batch, and gradients are averaged.
    """

    def __init__(self, config, meta, device, rank=0, n_ranks=1):
        self.config, self.meta, self.device = config, meta, device
        self.rank, self.n_ranks = rank, n_ranks
        if config.batch_size % n_ranks:
            raise BadInput(f"batch_size={config.batch_size} does not divide by {n_ranks} processes")
        T = config.model.block_size
        self.data = Windows(config.data, "train", meta, T, device)
        self.val = Windows(config.data, "val", meta, T, device)
        self.val_starts = self.val.evenly(config.eval_tokens)
        self.dtype = pick_dtype(config.dtype, device)

        torch.manual_seed(config.seed)
        self.model = GPT(config.model).to(device)
        self.kernels = choose_kernels(self.model, config.fast, device)
        n_weights = self.model.num_params() + n_params(self.model.wte)  # positions add, no more
        n_softmax = sum(name == "softmax" for name, _ in config.model.layers)
        self.flops = flops_per_token(n_weights, n_softmax, config.model.n_embd, T)
        self.peak = peak_flops(device, self.dtype)
        # For a model that one device cannot hold, the README's "More than one GPU" changes this.
        several = n_ranks > 1
        self.replica = nn.parallel.DistributedDataParallel(self.model) if several else self.model
        compiles = wants(config.compile, device)
        self.compiled = torch.compile(self.replica) if compiles else self.replica
        self.optimizer = make_optimizer(self.model, config, device)
        # It leaves a step out, without waiting for the device, if a gradient is not finite. In
        # float16, from 6e-8 to 65504, it also scales the loss up to just below the overflow.
        scale = 2.0**16 if self.dtype == torch.float16 else 1.0
        has_scaler = device.type != "mps"
        self.scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=has_scaler)
        self.step, self.history, self.best_loss = 0, [], math.inf
        # Sum and number of the losses since the last evaluation; steps left out because a gradient
        # was not finite, in the whole run, and how many of them are the latest in a row.
        self.tally = torch.zeros(4, device=device)
        self.seconds_before, self.began, self.n_steps = 0.0, time.perf_counter(), 0
        torch.manual_seed(config.seed + rank)  # dropout differs between ranks

    @property
    def seconds(self):
        """Seconds of training so far, evaluations and earlier parts of the run included."""
        return self.seconds_before + time.perf_counter() - self.began

    def share_of_peak(self, tokens_per_s):
        """Useful operations over what the cards could do, or None for a card that isn't in PEAK."""
        return self.peak and tokens_per_s * self.flops / (self.n_ranks * self.peak)

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
            more_to_come = self.n_ranks > 1 and i < config.grad_accum - 1
            with self.replica.no_sync() if more_to_come else nullcontext():
                loss = self.loss(*batch) / config.grad_accum
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        longest = config.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), longest)
        if self.scaler.is_enabled() or norm.isfinite():
            self.scaler.step(self.optimizer)  # does nothing if a gradient is not finite
        is_half = self.dtype == torch.float16
        self.scaler.update(None if is_half else 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.n_steps += 1
        good = (total if is_half else norm).isfinite()  # an overflow in float16 is the scaler's
        loss_sum, n, skipped, in_a_row = self.tally
        loss_sum = loss_sum + torch.where(good, total, 0.0)
        self.tally = torch.stack(
            [loss_sum, n + good, skipped + ~good, torch.where(good, 0.0, in_a_row + 1)]
        )

    def highest(self, number):
        """The largest of all processes' numbers."""
        if self.n_ranks == 1:
            return number
        numbers = torch.tensor(number, device=self.device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.item()

    def look(self):
        """(mean loss since the last evaluation or None, left-out steps). Waits for the device.

        Raises BadInput when too many steps in a row were left out: that does not mend itself.
        """
        tally = self.tally.clone()
        if self.n_ranks > 1:
            dist.all_reduce(tally)
        loss_sum, n, skipped, in_a_row = (tally / self.n_ranks).tolist()
        if in_a_row >= TOO_MANY:
            raise BadInput(
                f"the loss or its gradients were not finite {in_a_row:.0f} steps in a row, up to "
                f"step {self.step}; {self.config.out}/ckpt.pt is from before. Try a smaller --lr, "
                "a longer --warmup, or --dtype float32"
            )
        return loss_sum / n if n else None, round(skipped)

    @torch.no_grad()
    def val_loss(self):
        """Mean loss over the fixed validation windows, in nats a token."""
        self.model.eval()
        total = torch.zeros((), device=self.device)
        share = self.val_starts[self.rank :: self.n_ranks]
        for starts in share.split(self.config.batch_size):
            total += self.loss(*self.val.at(starts)) * len(starts)
        self.model.train()
        if self.n_ranks > 1:
            dist.all_reduce(total)
        return total.item() / len(self.val_starts)

    def evaluate(self):
        """Measure, log and save. Returns the new row of log.jsonl."""
        config, out = self.config, Path(self.config.out)
        train_loss, n_skipped = self.look()  # waits, so that the clock sees the steps' work
        tokens = self.n_steps * config.grad_accum * config.batch_size * config.model.block_size
        speed = tokens / (time.perf_counter() - self.began)
        val_loss = self.val_loss()
        if not math.isfinite(val_loss):
            raise BadInput(
                f"the validation loss is {val_loss} at step {self.step}; what is saved in {out} "
                "is from before. Start again with a smaller --lr"
            )
        row = {
            "step": self.step,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_bpb": bits_per_byte(val_loss, self.meta),
            "lr": learning_rate(config, max(0, self.step - 1)),
            "tokens_per_s": round(speed),
            "elapsed_s": round(self.seconds, 2),
            "skipped": n_skipped,
        }
        if self.peak:
            row["share_of_peak"] = round(self.share_of_peak(speed), 4)
        self.history.append(row)
        self.tally[:2] = 0
        is_best = val_loss < self.best_loss
        self.best_loss = min(val_loss, self.best_loss)
        if self.rank == 0:
            with atomic_write(out / "log.jsonl") as path, open(path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.history)
            if is_best:
                save_checkpoint(out / "best.pt", **self.what_it_is())
            self.save()
        return row

    def what_it_is(self):
        """The model and where it comes from, in plain types: all that sampling needs."""
        train = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        return {
            "model": self.model.state_dict(),
            "config": asdict(train.pop("model")),
            "train": train | {"resume": False},
            "meta": self.meta,
            "step": self.step,
            "best_loss": self.best_loss,
        }

    def save(self):
        """Write OUT/ckpt.pt: what it is, and all that training goes on from."""
        if not all(weight.isfinite().all() for weight in self.model.parameters()):
            raise BadInput(
                f"the weights are not finite at step {self.step}; {self.config.out}/ckpt.pt is "
                "from before. Try a smaller --lr"
            )
        save_checkpoint(
            Path(self.config.out) / "ckpt.pt",
            **self.what_it_is(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            history=self.history,
            tally=self.tally.cpu(),
            seconds=self.seconds,
            rng=torch.get_rng_state(),  # dropout draws from it
            rng_cuda=torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        )

    def load(self, checkpoint):
        """Become the trainer that was saved. BadInput if its model or data are not these."""
        config = self.config
        for name, value in asdict(config.model).items():
            old = checkpoint["config"].get(name)
            if old != value:
                raise BadInput(
                    f"the checkpoint in {config.out} has {name}={old}, not {value}: a resumed "
                    "model keeps its shape. Leave that flag away, or choose another --out"
                )
        if checkpoint.get("meta") != self.meta:
            raise BadInput(f"the run in {config.out} had other data than {config.data} holds now")
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if self.scaler.is_enabled() and checkpoint["scaler"]:
                self.scaler.load_state_dict(checkpoint["scaler"])
            if self.rank == 0:
                torch.set_rng_state(checkpoint["rng"])
                if self.device.type == "cuda" and checkpoint["rng_cuda"] is not None:
                    torch.cuda.set_rng_state(checkpoint["rng_cuda"])
            else:  # only rank 0 saves; the others' dropout goes on with new numbers
                torch.manual_seed(config.seed + self.rank + config.steps * checkpoint["step"])
            for name in ("step", "history", "best_loss"):
                setattr(self, name, checkpoint[name])
            self.tally += checkpoint["tally"].to(self.device)
            self.seconds_before = checkpoint["seconds"]
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise BadInput(
                f"the checkpoint in {config.out} is not a whole one: {first_line(error)}"
            ) from error


class Stop:
    """Ctrl-C and SIGTERM ask the run to stop after the step; a second Ctrl-C ends it at once.

    A context manager. signal: the number of the signal that came, or 0.
    """

    def __enter__(self):
        self.signal, self.before = 0, {}
        if threading.current_thread() is threading.main_thread():  # others may have no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number, _):
        if number == self.signal == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt  # torchrun repeats a Ctrl-C by itself; a person means it
        self.signal = number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def lock_out(out):
    """Make the output folder and lock it; the system drops the lock when this process ends.

    Returns a context manager that holds it. BadInput if another process does, or on no permission.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        return FileLock(out / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise BadInput(
            f"another training writes to {out} now; wait for its end, or choose another --out"
        ) from error
    except OSError as error:
        raise BadInput(f"cannot write to {out} ({error}); choose another --out") from error


def clear_out(out, resume):
    """Remove what a killed run left half-written; move an earlier run's files to OUT/previous."""
    for path in out.glob("*.tmp"):
        path.unlink()
    names = ("ckpt.pt", "best.pt", "log.jsonl", "loss.png")
    earlier = [] if resume else [out / name for name in names if (out / name).exists()]
    if earlier:
        (out / "previous").mkdir(exist_ok=True)
        print(f"the earlier run in {out} is now in {out / 'previous'}")
    for path in earlier:
        os.replace(path, out / "previous" / path.name)


def plot(history, title, path):
    """Training and validation loss against steps, as a PNG."""
    from matplotlib.figure import Figure  # here, because it takes a second

    figure = Figure(figsize=(7, 4), layout="constrained")  # no pyplot: it would take a notebook's
    axes = figure.subplots()  # own pictures away
    for key, label, style in (("train_loss", "training", "--"), ("val_loss", "validation", "-")):
        points = [(row["step"], row[key]) for row in history if row[key] is not None]
        axes.plot(*zip(*points, strict=True), style, label=label)
    best = min(history, key=lambda row: row["val_loss"])
    axes.plot(best["step"], best["val_loss"], "ko", label=f"lowest: {best['val_loss']:.4f}")
    axes.set(title=title, xlabel="steps", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


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


def train(config):
    """Train as config (a TrainConfig) says, write into config.out, and return a Result.

    Raises BadInput for what the person can put right: data, device, folder, checkpoint. Started by
    torchrun, this is one of several processes that train one model; rank 0 writes and speaks.
    """
    rank, n_ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    out, device = Path(config.out), pick_device(config.device)
    pick_dtype(config.dtype, device)  # complains, if it must, before any work
    saved = load_checkpoint(out / "ckpt.pt") if config.resume else None
    with ExitStack() as stack:
        if n_ranks > 1:
            device = stack.enter_context(joined(device))
        if rank > 0:
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(silence))
        for turn in range(n_ranks):  # rank 0 prepares the data, if need be, and the others find it
            if turn == rank:
                folder, meta = get_data(config.data)
            if n_ranks > 1:
                dist.barrier()
        vocab_size = config.model.vocab_size or meta["vocab_size"]
        if vocab_size < meta["vocab_size"]:
            raise BadInput(f"vocab_size={vocab_size} is less than the data's {meta['vocab_size']}")
        model = replace(config.model, vocab_size=vocab_size)
        config = replace(config, data=str(folder), model=model)
        tokenizer, trainer = Tokenizer(meta), Trainer(config, meta, device, rank, n_ranks)
        if saved is not None:
            trainer.load(saved)
            if trainer.step > config.steps:
                raise BadInput(f"{out} is at step {trainer.step} already; give more --steps")
            print(f"going on at step {trainer.step:,} of {config.steps:,}")
        if rank == 0:
            stack.enter_context(lock_out(out))
            clear_out(out, config.resume)
        name = f"{model.mixers}, {trainer.model.num_params():,} parameters without embeddings"
        how = str(trainer.dtype).removeprefix("torch.") + trainer.kernels
        print(f"{name}; {config.data} -> {out}; {device.type} x {n_ranks}, {how}")
        with Stop() as stop:
            stopped_by = loop(trainer, stop)
        result = Result(
            model=trainer.model,
            tokenizer=tokenizer,
            history=trainer.history,
            best_loss=trainer.best_loss,
            best_bpb=bits_per_byte(trainer.best_loss, meta),
            seconds=trainer.seconds,
            out=out,
            stopped_by=stopped_by,
        )
        if rank == 0 and not stopped_by:
            report(result, trainer, name)
        elif rank == 0:
            trainer.save()
            print(f"stopped at step {trainer.step:,}, saved in {out / 'ckpt.pt'}. To go on:")
            print(f"  python train.py --resume --out {shlex.quote(str(out))}")
    return result


@contextmanager
def joined(device):
    """Join the processes that torchrun started, each with its GPU if there are any; yields it."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"the processes do not find each other: {first_line(error)}") from error
    try:
        yield device
        dist.barrier()  # nobody leaves while another still works
    finally:
        dist.destroy_process_group()


def loop(trainer, stop):
    """Update and evaluate until the last step, 0, or until a signal came, its number."""
    config, rank = trainer.config, trainer.rank
    tokens = config.grad_accum * config.batch_size * config.model.block_size
    bar = tqdm(
        total=config.steps,
        initial=trainer.step,
        unit="step",
        dynamic_ncols=True,
        disable=rank > 0,
    )
    try:
        with bar:
            while True:
                ended = trainer.step >= config.steps
                last = trainer.history[-1]["step"] if trainer.history else -1
                if last < trainer.step and (ended or trainer.step % config.eval_interval == 0):
                    row = trainer.evaluate()
                    bar.write(
                        f"step {row['step']:6,}  validation loss {row['val_loss']:.4f} nats a "
                        f"token, {row['val_bpb']:.4f} bits a byte"
                    )
                if ended:
                    return 0
                if trainer.step % 10 == 0 or trainer.n_ranks == 1:  # asking the others waits
                    signal_number = trainer.highest(stop.signal)
                    if signal_number:
                        return signal_number
                trainer.update()
                bar.update()
                if trainer.step % 10 == 0:  # each look waits for the device
                    speed = tokens * (bar.format_dict["rate"] or 0)
                    loss = trainer.look()[0] or math.nan
                    words = f"loss {loss:.3f}, {speed:,.0f} tokens/s"
                    if trainer.peak:
                        words += f", {trainer.share_of_peak(speed):.1%} of peak"
                    bar.set_postfix_str(words)
    except BadInput:
        raise
    except torch.OutOfMemoryError as error:
        raise BadInput(
            f"{trainer.device} has too little memory for this; choose a smaller --batch-size "
            "(and --grad-accum to make up for it), --block-size or --n-embd"
        ) from error
    except torch._dynamo.exc.TorchDynamoException as error:
        raise BadInput(
            f"torch.compile does not work here ({first_line(error)}); use --no-compile"
        ) from error
    except RuntimeError as error:
        if trainer.n_ranks == 1:
            raise
        raise BadInput(
            f"another process of this training has ended ({first_line(error)}); "
            "start again with --resume"
        ) from error


def report(result, trainer, name):
    """What stands at the end of a run: picture, layers, losses, a sample, how to get more."""
    out, device = result.out, trainer.device
    plot(result.history, name, out / "loss.png")
    print(f"\n{layer_table(result.model)}\n")
    best = min(result.history, key=lambda row: row["val_loss"])
    print(
        f"lowest validation loss {result.best_loss:.4f} nats a token = {result.best_bpb:.4f} bits "
        f"a byte, at step {best['step']:,}; {result.seconds:.0f} s of training; "
        f"curve in {out / 'loss.png'}"
    )
    if trainer.config.sample_tokens:
        model = model_from(load_checkpoint(out / "best.pt"), device)
        idx = torch.tensor([[result.tokenizer.start]], device=device)
        generator = torch.Generator(device).manual_seed(trainer.config.seed)
        stream = model.generate(
            idx, trainer.config.sample_tokens, temperature=0.8, generator=generator
        )
        print("\na sample:\n" + result.tokenizer.decode([token.item() for token in stream]))
    print(f"\nmore of it:  python sample.py --out {shlex.quote(str(out))}")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    preset = "quick"
    if arguments and not arguments[0].startswith("-"):
        preset, *arguments = arguments
    if preset not in PRESETS:
        raise BadInput(f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}")
    description = (
        f"python train.py [{'|'.join(PRESETS)}] [flags]: train a GPT with HSM or softmax layers. "
        f"The defaults shown are those of {preset}."
    )
    config = parse(TrainConfig, arguments, description, PRESETS[preset])
    if config.resume:  # what the flags don't say stays as it was
        saved = load_checkpoint(Path(config.out) / "ckpt.pt")
        try:
            before = TrainConfig(model=GPTConfig(**saved["config"]), **saved["train"])
        except (KeyError, TypeError) as error:
            raise BadInput(f"{config.out}/ckpt.pt is not a checkpoint of train.py") from error
        config = parse(TrainConfig, arguments, description, replace(before, out=config.out))
    stopped_by = train(config).stopped_by
    return 128 + stopped_by if stopped_by else 0  # as shells count


if __name__ == "__main__":
    run(main)
