"""Let a trained model write.

    python sample.py --out out/quick --prompt "ROMEO:" --tokens 500

The text streams to standard output as it is drawn; one line about speed and memory goes to
standard error. The model remembers through its cache: a few vectors a layer for HSM, however long
the text; keys and values for softmax layers. --naive computes everything anew for each token, for
comparison: with --temperature 0 the text is the same.
"""

import codecs
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from hsm import BadInput, load_checkpoint, model_from
from prepare_data import Tokenizer, parse, run
from train import pick_device


@dataclass
class SampleConfig:
    """What the command line takes."""

    out: str = "out/quick"  # a training run's folder
    which: Literal["best", "last"] = "best"  # lowest validation loss, or the latest state
    prompt: str = ""  # text to go on from; empty: the model begins by itself
    prompt_file: str = ""  # the same from a file, in UTF-8
    tokens: int = 500  # how many to draw
    temperature: float = 0.8  # 0 takes the likeliest token; 1 draws from the model as it is
    top_k: int | None = None  # draw among the k likeliest only
    top_p: float | None = None  # draw among the likeliest that together have this probability
    seed: int = 1  # the same seed, the same text
    naive: bool = False  # without the cache: compute everything anew for each token
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best that is there


def load(out, which="best", device="cpu"):
    """(model, tokenizer) of a training run's folder; the model is in evaluation mode."""
    name = "best.pt" if which == "best" else "ckpt.pt"
    checkpoint = load_checkpoint(Path(out) / name, device)
    if not isinstance(checkpoint.get("meta"), dict):
        raise BadInput(f"{Path(out) / name} is not a checkpoint of train.py: it has no vocabulary")
    return model_from(checkpoint, device).eval(), Tokenizer(checkpoint["meta"])


def read_prompt(config):
    """The prompt's text, from the flag or from the file."""
    if not config.prompt_file:
        return config.prompt
    if config.prompt:
        raise BadInput("give --prompt or --prompt-file, not both")
    try:
        return Path(config.prompt_file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{config.prompt_file} is not UTF-8 text") from error


def main(arguments=None):
    config = parse(SampleConfig, arguments, "Let a trained model write.")
    if config.tokens < 0:
        raise BadInput(f"--tokens must not be negative, but is {config.tokens}")
    device = pick_device(config.device)
    model, tokenizer = load(config.out, config.which, device)
    prompt = read_prompt(config)
    numbers = tokenizer.encode(prompt).tolist() or [tokenizer.start]
    idx = torch.tensor([numbers], device=device)
    stream = model.generate(
        idx,
        config.tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        generator=torch.Generator(device).manual_seed(config.seed),
        use_cache=not config.naive,
    )
    began = time.perf_counter()
    first = None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may be half a character
    sys.stdout.write(prompt)
    for token in stream:
        sys.stdout.write(decoder.decode(tokenizer.decode_bytes([token.item()])))
        sys.stdout.flush()
        first = first or time.perf_counter() - began
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
    sys.stdout.flush()

    if config.tokens:
        seconds = time.perf_counter() - began
        length = len(numbers) + config.tokens
        number = model.wte.weight.element_size()
        kv = 2 * model.config.n_layer * model.config.n_embd * length * number
        print(
            f"[{config.tokens / seconds:,.0f} tokens/s; first token after {1000 * first:.1f} ms; "
            f"state {model.state_bytes(1, length):,} bytes, where the keys and values of "
            f"{model.config.n_layer} softmax layers over these {length:,} tokens take {kv:,}]",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run(main)
