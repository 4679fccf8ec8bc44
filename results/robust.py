"""Try to break it: kills, damaged files, a stream of a million tokens.

    python results/robust.py kills       20 random SIGKILLs; resumed, the weights are the same
    python results/robust.py mutations   1000 damaged copies of each kind of file
    python results/robust.py million     a stream of a million tokens: memory, speed, exactness

Each prints a table of what it saw, and fails with a traceback where a claim does not hold. The
tests run short versions.
"""

import contextlib
import io
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import prepare_data  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from hsm import GPT, BadInput, GPTConfig, load_checkpoint, receptive_field  # noqa: E402


def made_up_text(n_words, seed=0):
    """Sentences of a few words: something to train on without a download."""
    words = "the cat sat on a mat and saw naïve dogs; then, it ran.\n"
    return " ".join(random.Random(seed).choices(words.split(" "), k=n_words))


def small_run(folder, steps):
    """A prepared folder, and the configuration of a run of some seconds on it."""
    text = folder / "text.txt"
    text.write_text(made_up_text(3000), encoding="utf-8")
    prepare_data.prepare("file", text, folder=folder / "data")
    return train.TrainConfig(
        model=GPTConfig(vocab_size=0, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.1),
        data=str(folder / "data"),
        out=str(folder / "out"),
        steps=steps,
        batch_size=4,
        warmup=2,
        eval_interval=5,
        eval_tokens=500,
        sample_tokens=0,
        device="cpu",
    )


def flags(config):
    """The command-line words for config."""
    words = []
    for part in (config.model, config):
        for name, value in vars(part).items():
            if isinstance(value, bool):
                words.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
            elif name != "model" and value is not None:  # None: as if no flag were given
                words += [f"--{name.replace('_', '-')}", str(value)]
    return words


# ------------------------------------------------------------------------------------------------
# Kills


def kills(folder, n=20, steps=3000, seed=0):
    """Kill a training n times at random moments, resume it each time; compare the final weights.

    After each kill every file that is there must be readable. Returns the kills that came while
    the run trained (some come earlier, while it starts).
    """
    config = small_run(folder, steps)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    chance, n_in_training = random.Random(seed), 0

    def start(out):
        has_checkpoint = (Path(out) / "ckpt.pt").exists()
        words = flags(replace(config, out=out, resume=has_checkpoint))
        command = [sys.executable, str(HERE.parent / "train.py"), *words]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def finish(out):
        process = start(out)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors.decode()
        return load_checkpoint(Path(out) / "ckpt.pt")

    killed = folder / "killed"
    for _ in range(n):
        process, before = start(str(killed)), step_of(killed)
        began = time.monotonic()
        while step_of(killed) == before and process.poll() is None:  # until it trains
            time.sleep(0.01)
            if time.monotonic() - began > 120:
                break
        time.sleep(chance.random() * 0.5)
        process.kill()
        process.wait()
        check_files(killed)
        n_in_training += step_of(killed) != before
    resumed, whole = finish(str(killed)), finish(str(folder / "whole"))
    for name, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][name]), f"{name} differs"
    assert [row["val_loss"] for row in whole["history"]] == [
        row["val_loss"] for row in resumed["history"]
    ]
    return n_in_training


def step_of(out):
    """The last step that the log names, or -1."""
    path = out / "log.jsonl"
    return json.loads(path.read_text("utf-8").splitlines()[-1])["step"] if path.exists() else -1


def check_files(out):
    """Every file of a run can be read, whatever happened."""
    for path in out.glob("*.pt"):
        load_checkpoint(path)
    if (out / "log.jsonl").exists():
        for line in (out / "log.jsonl").read_text("utf-8").splitlines():
            json.loads(line)


# ------------------------------------------------------------------------------------------------
# Damaged files


def mutate(content, chance):
    """One byte changed, or the end cut off."""
    place = chance.randrange(len(content))
    if chance.random() < 0.3:
        return content[:place]
    return (
        content[:place] + bytes([content[place] ^ chance.randrange(1, 256)]) + content[place + 1 :]
    )


def mutations(folder, n=1000, seed=0):
    """Damage each kind of file n times and run the command that reads it.

    Each must end in BadInput, which the command lines print as one line with status 2, or in a run
    with finite numbers. Returns {kind: Counter of "clean error" and "correct run"}.
    """
    config, chance = small_run(folder, steps=5), random.Random(seed)
    out, data, text = Path(config.out), Path(config.data), folder / "text.txt"
    quietly(lambda: train.train(config))
    resume = replace(config, resume=True, steps=6)
    fresh = replace(config, out=str(folder / "fresh"), steps=1)

    def write_some():
        sample.main(["--out", str(out), "--tokens", "2", "--device", "cpu"])

    def go_on():
        assert torch.isfinite(torch.tensor(train.train(resume).history[-1]["val_loss"]))

    def prepare():
        prepare_data.prepare("file", text, folder=folder / "again")

    readers = {
        "checkpoint, sampled from": (out / "best.pt", write_some),
        "checkpoint, resumed": (out / "ckpt.pt", go_on),
        "meta.json": (data / "meta.json", lambda: train.train(fresh)),
        "train.bin": (data / "train.bin", lambda: train.train(fresh)),
        "log.jsonl, resumed": (out / "log.jsonl", go_on),
        "input.txt": (text, prepare),
    }
    table = {}
    for kind, (path, read) in readers.items():
        table[kind], files = Counter(), {p: p.read_bytes() for p in (path, *out.glob("*.*"))}
        for _ in range(n):
            path.write_bytes(mutate(files[path], chance))
            try:
                quietly(read)
                table[kind]["correct run"] += 1
            except BadInput as error:
                assert "\n" not in str(error)
                table[kind]["clean error"] += 1
            for p, content in files.items():
                p.write_bytes(content)
    return table


def quietly(action):
    """Run action without its output."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        action()


# ------------------------------------------------------------------------------------------------
# A long stream


@torch.no_grad()
def million(n=1_000_000, chunk=100, seed=0):
    """Stream n tokens through a model of HSM layers; returns growth in MiB and speed end / start.

    The logits at the end must be those of a parallel run over the last window that holds the whole
    receptive field. Speed: the old stream and a fresh one take turns, so that what slows the
    machine for a while slows both.
    """
    torch.manual_seed(seed)
    config = GPTConfig(vocab_size=65, pos_emb="none")
    model = GPT(config).eval()
    n_last = (len(receptive_field(config)) - 1) // chunk + 2  # chunks that hold all of the reach
    generator = torch.Generator().manual_seed(seed)
    old, fresh, last = model.init_cache(1), model.init_cache(1), []

    def step(cache):
        """Feed a chunk; returns the last logits and the seconds that it took."""
        idx = torch.randint(65, (1, chunk), generator=generator)
        began = time.perf_counter()
        logits, _ = model(idx, cache=cache)
        if cache is old:
            last.append(idx)
            del last[:-n_last]
        return logits[:, -1], time.perf_counter() - began

    for i in range(n // chunk):
        logits, _ = step(old)
        if i == n // chunk // 10:
            before = rss_mib()
    growth = rss_mib() - before
    parallel, _ = model(torch.cat(last, dim=1))
    error = (logits - parallel[:, -1]).abs().max().item()
    assert error < 1e-4, error
    ratios = []
    for _ in range(300):
        (_, start), (_, end) = step(fresh), step(old)
        ratios.append(start / end)
    return {
        "tokens": n,
        "growth_mib": round(growth, 2),
        "speed_end_over_start": round(statistics.median(ratios), 3),
        "logits_differ_by": error,
    }


def rss_mib():
    """Memory of this process in MiB: now, or where the system does not tell, its largest so far."""
    try:
        with open("/proc/self/statm", encoding="utf-8") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:  # not Linux
        try:
            import resource
        except ImportError:  # Windows
            return math.nan
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    with tempfile.TemporaryDirectory() as folder:
        if what == "kills":
            print(f"20 kills, {kills(Path(folder))} of them in training: the same weights")
        elif what == "mutations":
            print("| file | mutations | clean errors | correct runs | failures |")
            print("| --- | --- | --- | --- | --- |")
            for kind, seen in mutations(Path(folder)).items():
                counts = (seen.total(), seen["clean error"], seen["correct run"], 0)
                print("|".join(["", kind, *map(str, counts), ""]).replace("|", " | ").strip())
        elif what == "million":
            print(json.dumps(million()))
        else:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
