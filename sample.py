"""Let a trained model write.

    python sample.py --out out/quick --prompt "ROMEO:" --tokens 500

The text streams to standard output as it is drawn; one line about speed and memory goes to
standard error. The model remembers through its cache: a few vectors a layer for HSM, however long
the text; keys and values for softmax layers.
"""

import codecs
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from hsm import GPT, BadInput
from prepare_data import Tokenizer, parse, run, say
from train import load_checkpoint, model_from, pick_device, pick_threads


@dataclass
class SampleConfig:
    """What the command line takes."""

    out: str = "out/quick"  # a training run's folder
    which: Literal["best", "last"] = "best"  # lowest validation loss, or the latest state
    prompt: str = ""  # text to go on from; empty: the model begins by itself
    prompt_file: str = ""  # the same from a file, in UTF-8; its line ends stay as they are
    tokens: int = 500  # how many to draw
    temperature: float = 0.8  # 0 takes the likeliest token; 1 draws from the model as it is
    top_k: int | None = None  # draw among the k likeliest only
    top_p: float | None = None  # draw among the likeliest that together have this probability
    seed: int = 1  # the same seed, the same text
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best that is there


def load(out, which="best", device="cpu"):
    """(model, tokenizer) of a training run's folder; the model is in evaluation mode."""
    checkpoint = load_checkpoint(Path(out) / ("best.pt" if which == "best" else "ckpt.pt"), device)
    return model_from(checkpoint, device).eval(), Tokenizer(checkpoint["meta"])


def read_prompt(config):
    """The prompt's text, from the flag or from the file, which is read as prepare_data.py reads."""
    if config.prompt and config.prompt_file:
        raise BadInput("give --prompt or --prompt-file, not both")
    if "\\n" in config.prompt:
        print(r"note: \n in --prompt is two characters; a shell's $'\n' is one", file=sys.stderr)
    text = config.prompt.encode("utf-8", "surrogateescape")  # the bytes that the shell gave
    try:
        text = Path(config.prompt_file).read_bytes() if config.prompt_file else text
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{config.prompt_file or 'the prompt'} is not UTF-8 text") from error


def main(arguments=None):
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--prompt" in words[:-1]:  # a prompt may begin with a dash
        i = words.index("--prompt")
        words[i : i + 2] = [f"--prompt={words[i + 1]}"]
    config = parse(SampleConfig, words, "Let a trained model write.")
    device = pick_device(config.device)
    torch.set_num_threads(pick_threads())
    model, tokenizer = load(config.out, config.which, device)
    prompt = read_prompt(config)
    numbers = tokenizer.encode(prompt).tolist() or [tokenizer.start]
    idx = torch.tensor([numbers], device=device)
    limits = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    generator = torch.Generator(device).manual_seed(config.seed % 2**63)
    stream = model.generate(idx, config.tokens, **limits, generator=generator)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may be half a character
    print(prompt, end="")
    began = time.perf_counter()
    for token in stream:
        print(decoder.decode(tokenizer.decode_bytes([token.item()])), end="", flush=True)
    print(decoder.decode(b"", final=True))
    seconds, length = time.perf_counter() - began, len(numbers) + config.tokens
    with torch.device("meta"):
        softmax = GPT(replace(model.config, mixers="softmax", pos_emb="none"))
    own, keys = (m.state_bytes(1, length) for m in (model, softmax))
    words = f"state {own:,} bytes, where softmax layers alone keep {keys:,}"
    say(f"[{config.tokens / seconds:,.0f} tokens/s; {words}]", sys.stderr)


if __name__ == "__main__":
    run(main)
