"""Measure the defaults: how weights start, weight decay, learning rate.

    python results/defaults.py           train what results/logs/defaults.jsonl has not yet
    python results/defaults.py --table   print the log as a table

A run is the quick preset with one thing changed and 300 steps (about 30 seconds on one core).
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import train as trainer  # noqa: E402
from hsm import residual_scale  # noqa: E402

LOG = HERE / "logs" / "defaults.jsonl"
STEPS = 300


def every(std):
    """Draw all matrices and tables anew with this std, smaller where they add to the stream."""

    def change(model):
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                adds = name.endswith(("mixer.proj.weight", "down.weight"))
                weight.normal_(std=std * residual_scale(model.config) if adds else std)

    return change


def matrices(std, identity=0.0):
    """Draw the pair functions' matrices anew with this std, and add a multiple of the identity."""

    def change(model):
        for block in model.blocks:
            for weight in block.mixer.pair.parameters():
                if weight.dim() == 2:
                    weight.normal_(std=std).add_(identity * torch.eye(len(weight)))

    return change


def taps(a, b):
    """Start (a, b) at these numbers."""

    def change(model):
        for block in model.blocks:
            block.mixer.pair.a.fill_(a), block.mixer.pair.b.fill_(b)

    return change


LEARNED = {"pos_emb": "learned"}
# A row: mixer, what is changed, how its weights are, fields of the run, fields of the model.
RUNS = [
    ("ab", "as it is: a = b = 0.5", None, {}, {}),
    ("ab", "a = 1, b = 0", taps(1.0, 0.0), {}, {}),
    ("ab", "a = b = 1", taps(1.0, 1.0), {}, {}),
    ("ab", "all matrices std 0.02", every(0.02), {}, {}),
    ("softmax", "as it is: 0.02 sqrt(768 / inputs)", None, {}, {}),
    ("softmax", "all matrices std 0.02", every(0.02), {}, {}),
    ("softmax", "learned positions", None, {}, LEARNED),
    ("softmax", "learned positions, all matrices std 0.02", every(0.02), {}, LEARNED),
    ("vec", "as it is: a = b = 0.5", None, {}, {}),
    ("matrix", "as it is", None, {}, {}),
    ("matrix", "its matrices std 0.02", matrices(0.02), {}, {}),
    ("matrix", "identity / 2 + std 0.02", matrices(0.02, 0.5), {}, {}),
    ("gate1", "as it is", None, {}, {}),
    ("gate1", "its matrices std 0.02", matrices(0.02), {}, {}),
    ("gate2", "as it is", None, {}, {}),
    ("gate2", "its matrices std 0.02", matrices(0.02), {}, {}),
    ("fusion", "as it is", None, {}, {}),
    ("fusion", "its matrices std 0.02", matrices(0.02), {}, {}),
    ("mult", "as it is", None, {}, {}),
    ("mult", "its matrices std 0.02", matrices(0.02), {}, {}),
    ("ab", "weight decay 0", None, {"weight_decay": 0.0}, {}),
    ("ab", "weight decay 0.3", None, {"weight_decay": 0.3}, {}),
    ("ab", "learning rate 4e-3", None, {"lr": 4e-3}, {}),
    ("ab", "learning rate 1.2e-2", None, {"lr": 1.2e-2}, {}),
]


def measure(mixer, change, fields, shape):
    """Train the quick preset with these changes; its last evaluation, or None if it was stopped."""

    def build(config):
        model = GPT(config)
        if change:
            with torch.no_grad():
                change(model)
        return model

    GPT, trainer.GPT = trainer.GPT, build
    try:
        with tempfile.TemporaryDirectory() as out:
            quick = trainer.PRESETS["quick"]
            model = replace(quick.model, mixers=mixer, **shape)
            run = {"steps": STEPS, "eval_interval": STEPS, "sample_tokens": 0, "device": "cpu"}
            result = trainer.train(replace(quick, model=model, out=out, **run | fields))
            return None if result.stopped_by else result.history[-1]
    finally:
        trainer.GPT = GPT


def read_log():
    """The rows of the log, by mixer and change."""
    if not LOG.exists():
        return {}
    rows = [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]
    return {(row["mixer"], row["change"]): row for row in rows}


def main():
    if "--table" in sys.argv:
        print("| mixer | start | validation loss after 300 steps |\n| --- | --- | --- |")
        for (mixer, what), row in read_log().items():
            print(f"| {mixer} | {what} | {row['val_loss']:.4f} |")
        return
    for mixer, what, *rest in RUNS:
        if (mixer, what) not in read_log():
            last = measure(mixer, *rest)
            if last is None:
                break
            row = {"mixer": mixer, "change": what, "torch": torch.__version__, "seed": 1} | last
            with open(LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
