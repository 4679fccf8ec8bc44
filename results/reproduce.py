"""Train the grid of models behind the README's claims; make its tables and pictures from the logs.

    python results/reproduce.py --list          what there is to train, and what is done
    python results/reproduce.py                 train what is missing: many hours (README.md here)
    python results/reproduce.py --only hybrid-deep,softmax-100 --corpora code --seeds 1
    python results/reproduce.py --table-only    from the logs alone: table.md, READMEs, pictures
    python results/reproduce.py --again results/logs/cpu/code.ab-in.4000.s1.jsonl
                                                train once more what a log says; the same numbers?

A run is one call of train.py's train(). At its end its curve goes to logs/cpu/RUN.jsonl: a line
that says what was trained, a line an evaluation, and a line with a checksum of the rest. A log that
is whole and of the configuration asked for is never made again; any other is named and made anew.
Ctrl-C loses nothing, a power cut at most the steps since the last evaluation: the same command goes
on. On a machine with more cores, start it in more terminals; each takes the next free run.
"""

import hashlib
import inspect
import json
import math
import platform
import sys
import sysconfig
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from filelock import FileLock, Timeout

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import neighbours  # noqa: E402, F401

from hsm import BadInput, GPTConfig  # noqa: E402
from prepare_data import atomic_write, download, parse, prepare  # noqa: E402
from prepare_data import run as run_program  # noqa: E402
from train import (  # noqa: E402
    TrainConfig,
    get_data,
    load_checkpoint,
    model_from,
    pick_device,
    train,
)

# ---- What is trained: rows, in settings ----------------------------------------------------------


@dataclass
class Row:
    """A model: how it differs from a setting's shape (ab in each layer)."""

    about: str
    fields: dict  # of GPTConfig
    layers: int = 0  # for each 7 of the setting; all together have the parameters of 7 of softmax

    def shape(self, base):
        shape = replace(base, **self.fields)
        if self.layers:  # without projections: attention has 4 C^2 parameters, HSM next to none
            shape = replace(shape, n_layer=round(self.layers * base.n_layer / 7))
            n_softmax = sum("softmax" in name for name, _ in shape.layers)
            width = shape.n_embd * (6 * base.n_layer - 2 * n_softmax) / shape.n_layer
            shape = replace(shape, d_ff=round(width))
        return shape


def between_maps(mixers, **fields):
    """HSM with a linear map before the delay, too, and eight heads: all shifts in each layer."""
    return {"mixers": mixers, "in_proj": True, "n_head": 8, **fields}


def deep(mixers, **fields):
    return {"mixers": mixers, "proj": False, **fields}


ROWS = {  # recipe 2 had more: their logs say what they are, and --again trains them
    "softmax-100": Row("softmax, rotary, base 100", {"mixers": "softmax", "rope_base": 100.0}),
    "hybrid-deep": Row("vec, vec, softmax; 9 layers for 7", deep("vec,vec,softmax"), 9),
    "shift-softmax": Row("softmax on a x[t] + b x[t-1]", {"mixers": "shift-softmax"}),
    "hybrid-shift": Row("hybrid-deep with shift-softmax", deep("vec,vec,shift-softmax"), 9),
    "softmax-rope": Row("softmax, rotary, base 10,000", {"mixers": "softmax"}),
    "shift-softmax-100": Row(
        "softmax on a x[t] + b x[t-1], base 100", {"mixers": "shift-softmax", "rope_base": 100.0}
    ),
    "ab-in": Row("ab between two linear maps, 8 heads", between_maps("ab")),
    "linrec": Row("gated linear recurrence", {"mixers": "linrec"}),
    "conv4-hybrid": Row("hybrid-deep with conv4 for vec", deep("conv4,conv4,softmax"), 9),
    "shifts-softmax": Row("softmax on HSM's shifts in all layers", {"mixers": "shifts-softmax"}),
    "linrec-hybrid": Row("linrec, linrec, softmax", {"mixers": "linrec,linrec,softmax"}),
    "window": Row("attention to the last 32", {"mixers": "window"}),
    "window-hybrid": Row("window, window, softmax", {"mixers": "window,window,softmax"}),
    "softmax-learned": Row(
        "softmax, learned positions (GPT-2)", {"mixers": "softmax", "pos_emb": "learned"}
    ),
    "softmax-deep": Row("softmax, rotary; 9 layers for 7, narrower", {"mixers": "softmax"}, 9),
    # A shift beyond the window brings zeros: b x[t-s] = 0, and the vec layers mix nothing.
    "hybrid-b0": Row("hybrid-deep without its shifts", deep("vec,vec,softmax", shifts="128"), 9),
}
GRID = tuple(ROWS)
ROWS["ab-in-layer"] = Row(
    "ab-in, a shift a layer: 1, 2, 4 .. 64", between_maps("ab", shifts="layer")
)
# Settled by the first seed on code, before a run of these settings: the best plain softmax, the
# best softmax with a shift, the best hybrid of HSM, HSM alone, the recurrence alone.
PICKS = ("softmax-100", "shift-softmax-100", "hybrid-shift", "ab-in", "linrec")


@dataclass
class Setting:
    """What rows are compared within: a text, a length, a number of steps, a width."""

    config: TrainConfig
    rows: tuple
    seeds: int = 3


CPU = TrainConfig(
    model=GPTConfig(vocab_size=0, block_size=128, n_layer=7, n_head=4, n_embd=64),
    steps=4000,
    batch_size=16,
    lr=4e-3,
    lr_end=0.1,
    warmup=100,
    weight_decay=0.1,
    beta2=0.99,
    grad_clip=1.0,
    eval_interval=400,
    eval_tokens=200_000,
    sample_tokens=0,
    device="cpu",
    dtype="float32",
    threads=1,
)
# Python's library with its modules shuffled, all of the validation text at each evaluation.
CODE = replace(CPU, data="data/code_byte", eval_interval=1000, eval_tokens=10**7)
STORIES = replace(CPU, data="data/tinystories_sample")


def resized(config, **shape):
    return replace(config, model=replace(config.model, **shape))


SETTINGS = {
    "code": Setting(CODE, GRID),
    "tinystories": Setting(STORIES, GRID),
    "code-512": Setting(resized(replace(CODE, batch_size=4), block_size=512), PICKS),
    "code-1000": Setting(replace(CODE, steps=1000), PICKS),
    "code-8000": Setting(replace(CODE, steps=8000), PICKS),
    "code-lr-0.002": Setting(replace(CODE, lr=2e-3), GRID[:-1], seeds=1),
    "code-32": Setting(resized(CODE, n_embd=32, n_layer=5), PICKS),  # depth as the root of the
    "code-128": Setting(resized(CODE, n_embd=128, n_layer=10), PICKS),  # width: 5, 7, 10 layers
    "shakespeare": Setting(replace(CPU, data="data/shakespeare_char"), GRID[:8]),
    "stdlib": Setting(replace(CPU, data="data/stdlib_byte"), ()),  # recipe 2's: modules by name
}

# TinyStories' first 10,000 lines: as much as a model of this size can use (CDLA-Sharing-1.0).
SAMPLE_URL = (
    "https://raw.githubusercontent.com/mines-opt-ml/decoding-gpt/"
    "79274e31fe66ed5cf23be815bf51dc63a4ca57a6/data/tinystories_10k.txt"
)
SAMPLE_SHA256 = "5a19b936d7b53bbdac1eea03230b00161dceca24ae272f5bd8e9dbbc2a883418"


def write_code(path):
    """Python's library, its modules in the order of their names' hashes.

    In the order of the names, training is a seventh codec tables, and validation xml and unittest.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = [file.relative_to(root).as_posix() for file in root.rglob("*.py")]
    with atomic_write(path) as temporary, open(temporary, "wb") as output:
        for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
            source = b"" if left_out & {*name.split("/")} else (root / name).read_bytes()
            if source.decode("utf-8", "ignore").encode("utf-8") == source:  # a few are in Latin-1
                output.write(source.replace(b"\r\n", b"\n"))


def data_of(folder):
    """meta of a prepared folder, which is prepared if need be. A stand-in is not taken."""
    folder = Path(folder)
    made = {"code_byte": ("stdlib", "byte"), "tinystories_sample": ("tinystories", "char")}
    if folder.name in made and not (folder / "meta.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        corpus, tokenizer = made[folder.name]
        if not (folder / "input.txt").is_file():
            if corpus == "stdlib":
                write_code(folder / "input.txt")
            else:
                download(SAMPLE_URL, folder / "input.txt", SAMPLE_SHA256)
        prepare(corpus, tokenizer=tokenizer, folder=folder)
    found, meta = get_data(folder)
    if Path(found) != folder:
        raise BadInput(f"{folder} is not there, and a run on {found} would not be the same")
    return meta


# ---- A run and its log ---------------------------------------------------------------------------

# Grows when the code changes what a configuration gives, so that no log or checkpoint from before
# is taken for a new one. 3 gives the numbers of 2 (--again shows it) and has other settings, too.
RECIPE, COUNTED = 3, (2, 3)
# Fields of TrainConfig that do not make another run of it.
ELSEWHERE = "out data resume sample_tokens device dtype compile fast threads".split()


@dataclass
class Run:
    """One row, in one setting, with one seed."""

    setting: str
    row: str
    seed: int
    config: TrainConfig

    @property
    def name(self):
        return f"{self.setting}.{self.row}.{self.config.steps}.s{self.seed}"

    def log(self, folder):
        """Where its log lies among those of the folder."""
        return Path(folder) / "cpu" / f"{self.name}.jsonl"

    def describe(self):
        """What a log must say to be this run's: all that the numbers depend on but the data."""
        fields = asdict(self.config)
        model = fields.pop("model") | {"vocab_size": 0}
        train = {name: value for name, value in fields.items() if name not in ELSEWHERE}
        return {"recipe": RECIPE, "model": model, "train": train}

    def is_of(self, model, train):
        """Whether these fields are the run's; one that is not there has its default."""
        try:
            config = TrainConfig(model=GPTConfig(**model), **train)
        except (TypeError, ValueError):
            return False
        return replace(self, config=config).describe() == self.describe()


def make_run(setting, row, seed, out="out/reproduce"):
    base = SETTINGS[setting].config
    run = Run(setting, row, seed, replace(base, model=ROWS[row].shape(base.model), seed=seed))
    run.config.out = str(Path(out) / run.name)
    return run


def make_runs(settings, rows=(), seeds=0, out="out/reproduce"):
    """The runs asked for, in the order of seeds: cut off early, each row has the same number."""
    runs = []
    for seed in range(1, 1 + (seeds or max(SETTINGS[name].seeds for name in settings))):
        for name in settings:
            for row in SETTINGS[name].rows:
                once = row == "hybrid-b0" and seed > 1
                if row in (rows or ROWS) and not once and seed <= (seeds or SETTINGS[name].seeds):
                    runs.append(make_run(name, row, seed, out))
    return runs


def write_log(path, head, rows):
    """head, rows, and a checksum of these lines: whole or not at all."""
    lines = "".join(json.dumps(row) + "\n" for row in (head, *rows))
    end = {"rows": len(rows), "sha256": hashlib.sha256(lines.encode()).hexdigest()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        Path(temporary).write_text(lines + json.dumps(end) + "\n", encoding="utf-8", newline="\n")


def read_log(path):
    """(head, rows) of a log. BadInput where it is not as write_log left it."""
    try:
        *lines, last = path.read_bytes().splitlines(keepends=True)
        end = json.loads(last)
        if end["sha256"] != hashlib.sha256(b"".join(lines)).hexdigest():
            raise ValueError("checksum")
        head, *rows = map(json.loads, lines)
        return head, rows
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path.name} is damaged") from error


def read_or_warn(path, run=None):
    """(head, rows) of a log, this run's if one is given; or None, with a word on what is wrong."""
    if not path.is_file():
        return None
    try:
        head, rows = read_log(path)
    except BadInput as error:
        print(f"warning: {error}: not counted; it is to be made again")
        return None
    recipe = head.get("recipe") in COUNTED
    if run and not (recipe and run.is_of(head.get("model"), head.get("train"))):
        print(f"warning: {path.name} is of another configuration: not counted")
        return None
    return head, rows


def read_rows(folder, beginnings):
    """Rows of all logs in folder whose names begin so, each with its log's seed."""
    rows = []
    for path in sorted(Path(folder).glob("*.jsonl")):
        log = read_or_warn(path) if path.name.startswith(tuple(beginnings)) else None
        rows += [{"seed": log[0]["seed"], **row} for row in log[1]] if log else []
    return rows


def surroundings(device):
    """What the numbers of a log may depend on besides the configuration."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    elif info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((x.split(": ")[1] for x in lines if x.startswith("model name")), name)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def can_resume(run):
    """The step of a whole checkpoint of just this run, or None."""
    try:
        saved = load_checkpoint(Path(run.config.out) / "ckpt.pt")
    except BadInput:
        return None
    return saved["step"] if run.is_of(saved["config"], saved.get("train")) else None


def work(run, folder):
    """Train this run, go on with it if it was begun, and write its log. Returns a signal or 0."""
    meta, path = data_of(run.config.data), run.log(folder)
    for other in path.parent.glob(f"{run.setting}.*.jsonl"):
        log = read_or_warn(other)
        if log and log[0]["data"]["sha256"] != meta["sha256"]:
            raise BadInput(
                f"{run.config.data} is not the text that {other.name} was made with, so its runs "
                "would not compare; use another --dir, or the same text"
            )
    result = train(replace(run.config, resume=can_resume(run) is not None))
    if not result.stopped_by:
        head = {
            "run": run.name,
            **run.describe(),
            "parameters": result.model.num_params(),
            "data": {key: meta[key] for key in ("sha256", "vocab_size", "val_tokens", "val_bytes")},
            **surroundings(pick_device(run.config.device)),
        }
        write_log(path, head, result.history)
    return result.stopped_by


def trained(run):
    """(model, config, meta) of a run, trained now if its last checkpoint is not there."""
    meta = data_of(run.config.data)
    if can_resume(run) != run.config.steps:
        print(f"{run.name} has no finished checkpoint here: training it")
        train(replace(run.config, resume=can_resume(run) is not None))
    return model_from(load_checkpoint(Path(run.config.out) / "ckpt.pt")), run.config, meta


@contextmanager
def claim(path):
    """Yields whether this process may have path: False while another one has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock", timeout=0):
            yield True
    except Timeout:
        yield False


def train_all(runs, folder):
    """Train what is not finished and what no other process is at. Returns a signal or 0."""
    for number, run in enumerate(runs, start=1):
        with claim(Path(run.config.out)) as free:
            if not free:
                print(f"{run.name}: another process is at it")
            elif read_or_warn(run.log(folder), run) is None:
                print(f"\n{run.name}, {number} of {len(runs)}")
                stopped_by = work(run, folder)
                if stopped_by:
                    return stopped_by
    return 0


def again(path, out):
    """Train what a log says once more; 0 if all losses are the log's to the bit, else 1."""
    head, rows = read_log(path)
    setting = head["run"].rsplit(".", 3)[0].split("-lr-")[0]
    data = SETTINGS[setting].config.data
    config = TrainConfig(model=GPTConfig(**head["model"]), **head["train"])
    extra = {"device": "cpu", "dtype": "float32", "sample_tokens": 0, "threads": 1}
    if data_of(data)["sha256"] != head["data"]["sha256"]:
        raise BadInput(f"{data} is not the text that {path.name} was made with")
    result = train(replace(config, data=data, out=str(Path(out) / f"again-{path.stem}"), **extra))
    for old, new in zip(rows, result.history, strict=True):
        for key in ("step", "train_loss", "val_loss"):
            if old[key] != new[key]:
                print(f"{path.name}, step {old['step']}: {key} was {old[key]}, is {new[key]}")
                return 1
    print(f"{path.name}: all {len(rows)} evaluations are the same to the bit")
    return 0


# ---- Tables. logs: setting -> row -> seed -> (head, rows), the lines of a log --------------------

PLAIN = ("softmax-100", "softmax-rope", "softmax-deep")
RANDOM = "ab-in-random"  # a row of recipe 2 whose shifts were other ones for each seed
TEXTS = ("shakespeare", "code", "tinystories")  # the columns of the README's table
KINDS = {  # its rows
    "GPT-2's softmax, learned positions": ("softmax-learned",),
    "the best plain softmax": PLAIN,
    "the best softmax with a shift": ("shift-softmax", "shift-softmax-100", "shifts-softmax"),
    "HSM alone": ("ab-in",),
    "the best neighbour without full attention": ("linrec", "window"),
    "the best hybrid of HSM and softmax": ("hybrid-deep", "hybrid-shift"),
}


def read_logs(folder):
    logs = {}
    for path in sorted((Path(folder) / "cpu").glob("*.s*.jsonl")):
        setting, row, _, seed = path.stem.rsplit(".", 3)
        seed = int(seed[1:])
        known = setting in SETTINGS and row in SETTINGS[setting].rows
        log = read_or_warn(path, make_run(setting, row, seed) if known else None)
        if log:
            logs.setdefault(setting, {}).setdefault(row, {})[seed] = log
    return logs


def last_losses(runs):
    """The last step's losses, never the lowest. runs: seed -> (head, rows)."""
    return [rows[-1]["val_loss"] for _, rows in runs.values()]


def t95(df):
    """97.5% quantile of Student's t: its density over t = sqrt(df) tan(u) is cos(u)^(df - 1)."""
    u = np.linspace(0, math.pi / 2, 100_001)
    mass = np.cumsum(np.cos(u) ** (df - 1))
    return math.sqrt(df) * math.tan(u[np.searchsorted(mass, 0.95 * mass[-1])])


def spread(models):
    """How far a row's seeds lie from their mean, in %: pooled over rows, and degrees of freedom.

    Without the row whose shifts differ by seed.
    """
    groups = [
        np.array(last_losses(runs)) for name, runs in models.items() if name != "ab-in-random"
    ]
    df = sum(len(group) - 1 for group in groups)
    squares = sum(((100 * (group / group.mean() - 1)) ** 2).sum() for group in groups)
    return (math.sqrt(squares / df), df) if df else (math.nan, 0)


def over(models, name, base):
    """How much higher row name's loss is than base's: "+1.23 ± 0.45 (3)", in %; in brackets seeds.

    The interval is t s sqrt(1/n1 + 1/n2), 95%, with the pooled spread s of all rows; seeds are
    independent. One seed of either gets none, and allows no claim.
    """
    if not {name, base} <= set(models):
        return "-"
    one, other = last_losses(models[name]), last_losses(models[base])
    text = f"{100 * (mean(one) / mean(other) - 1):+.2f}"
    s, df = spread(models)
    if min(len(one), len(other)) > 1 and name != RANDOM:
        text += f" ± {t95(df) * s * math.sqrt(1 / len(one) + 1 / len(other)):.2f}"
    return f"{text} ({len(one)})"


def plain(models):
    """The best plain softmax of a setting, by which others are measured, or None."""
    there = set(PLAIN) & set(models)
    return min(there, key=lambda name: mean(last_losses(models[name])), default=None)


def best(logs, names):
    """Of some rows the one with runs on most texts, then the lowest distance to plain softmax."""

    def rank(name):
        there = [logs[t] for t in TEXTS if name in logs.get(t, {}) and plain(logs[t])]
        ratios = [
            mean(last_losses(models[name])) / mean(last_losses(models[plain(models)]))
            for models in there
        ]
        return -len(there), mean(ratios or [math.inf])

    return min(names, key=rank)


def table(*rows):
    """Lines of Markdown; the first row is the head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:], ""]


def found_table(logs):
    """The README's: a row a kind, a column a text, % over the best plain rotary softmax."""
    rows = [("model", "row", *TEXTS)]
    for kind, names in KINDS.items():
        name = best(logs, names)
        cells = [
            "0"
            if names == PLAIN
            else over(logs[text], name, plain(logs[text]))
            if text in logs
            else "-"
            for text in TEXTS
        ]
        rows.append((kind, f"`{name}`", *cells))
    return table(*rows)


def million_flops(head):
    """Million operations of a training step, a token.

    6 a weight (the output's matrix, too), and 12 C a token that attention sees; on average half of
    the window, or its own 32.
    """
    config = GPTConfig(**head["model"])
    weights = head["parameters"] + head["data"]["vocab_size"] * config.n_embd
    seen = sum(
        min(32, config.block_size) if name == "window" else config.block_size / 2
        for name, _ in config.layers
        if "softmax" in name or name == "window"
    )
    return (6 * weights + 12 * config.n_embd * seen) / 1e6


def setting_section(setting, models):
    """A heading, what was run, and a row a model, the lowest loss first."""
    heads = [head for runs in models.values() for head, _ in runs.values()]
    shape = min((head["model"] for head in heads), key=lambda model: model["n_layer"])
    train, (s, df) = heads[0]["train"], spread(models)
    devices = ", ".join(sorted({f"{head['device']}, torch {head['torch']}" for head in heads}))
    about = f"{shape['n_embd']} wide, T = {shape['block_size']}, {train['steps']:,} steps of "
    about += f"{train['batch_size']} windows; {len(heads)} runs on {devices}."
    if df:
        about += f" A row's seeds lie {s:.2f}% around their mean (pooled, {df} degrees of freedom)."
    base, rows = plain(models), []
    for name in sorted(models, key=lambda name: mean(last_losses(models[name]))):
        head, _ = next(iter(models[name].values()))
        ends = [rows[-1] for _, rows in models[name].values()]
        row = (f"`{name}`", differs(head["model"]), f"{head['parameters']:,}", head["train"]["lr"])
        row += (len(ends), f"{mean(end['val_loss'] for end in ends):.4f}")
        row += (f"{mean(end['val_bpb'] for end in ends):.4f}", over(models, name, base))
        minutes = mean(end["elapsed_s"] for end in ends) / 60
        rows.append((*row, f"{million_flops(head):.2f}", f"{minutes:.1f}"))
    head = ("row", "model", "parameters", "rate", "seeds", "loss, nats a token", "bits a byte")
    head += (f"% over `{base}`", "MFLOP a token", "minutes")
    return [f"## {setting}", "", about, "", *table(head, *rows)]


def differs(fields, base=CPU.model):
    """In words, how a configuration's fields differ from those of base; mixers come first."""
    own = {k: v for k, v in fields.items() if v != getattr(base, k) and k != "vocab_size"}
    words = [str(fields.get("mixers", base.mixers)).replace(",", ", ")]
    for name, value in own.items():
        if name not in ("mixers", "block_size"):
            words.append(name if value is True else f"{name} {value}")
    return "; ".join(words)


def tried_section(folder):
    """Recipe 2's trials and its sweep of rates, one seed for the most part, as the logs tell it."""
    rows = {}
    for path in sorted([*(folder / "tried").glob("*.jsonl"), *(folder / "sweep").glob("*.jsonl")]):
        log = read_or_warn(path)
        if log:
            setting, row, steps, _ = path.stem.rsplit(".", 3)
            lr, text = log[0]["train"]["lr"], setting.split("-lr-")[0]
            key = (text, f"`{row}`", differs(log[0]["model"]), lr, steps)
            rows.setdefault(key, []).append(log[1][-1]["val_loss"])
    lines = [(*key, len(x), f"{mean(x):.4f}") for key, x in sorted(rows.items())]
    head = ("text", "row", "model", "rate", "steps", "seeds", "loss, nats a token")
    return ["## Tried on the way, recipe 2", "", *table(head, *lines)]


def recall_table(folder):
    """Median steps to 99% right, at the rate where that is lowest; in brackets this rate, seeds."""
    runs = {}  # (model, pairs) -> rate -> seed -> its last (step, accuracy)
    for row in read_rows(folder / "recall", [""]):
        rates = runs.setdefault((row["model"], row["size"]), {})
        rates.setdefault(row["lr"], {})[row["seed"]] = (row["step"], row["accuracy"])
    sizes, models = sorted({size for _, size in runs}), dict.fromkeys(name for name, _ in runs)
    lines = []
    for name in models:
        cells = []
        for size in sizes:
            results = []
            for lr, ends in runs.get((name, size), {}).items():
                steps = [step if right >= 0.99 else math.inf for step, right in ends.values()]
                results.append((np.median(steps), -max(r for _, r in ends.values()), lr, len(ends)))
            steps, right, lr, n = min(results, default=(math.nan, 0, 0, 0))
            text = (
                f"{steps:.0f} ({lr:g}; {n})" if steps < math.inf else f"never, {-right:.2f} ({n})"
            )
            cells.append(text if results else "-")
        lines.append((f"`{name}`", *cells))
    return table(("model", *(f"{size} pairs" for size in sizes)), *lines)


# ---- Pictures ------------------------------------------------------------------------------------

STYLES = {  # colours that colour-blind eyes tell apart
    "shift-softmax-100": ("#000000", "-"),
    "shift-softmax": ("#8c8c8c", "-"),
    "ab-in": ("#0072b2", "-"),
    "linrec": ("#009e73", "--"),
    "hybrid-deep": ("#d55e00", "-"),
    "hybrid-shift": ("#e69f00", "-"),
}


def draw_lead(logs, figure):
    """A panel a text: how far over plain softmax, by steps; dots: runs of other lengths."""
    texts = [text for text in TEXTS if plain(logs.get(text, {}))]
    for panel, text in zip(np.atleast_1d(figure.subplots(1, len(texts))), texts, strict=True):
        base = plain(logs[text])
        zero = mean_curve(logs[text][base])
        for name, (colour, style) in STYLES.items():
            if name in logs[text]:
                curve = mean_curve(logs[text][name])
                steps = [step for step in curve if step and step in zero]
                lead = [100 * (curve[step] / zero[step] - 1) for step in steps]
                panel.plot(steps, lead, style, color=colour, label=name)
            for other, models in logs.items():
                if other in (f"{text}-1000", f"{text}-8000") and {name, base} <= set(models):
                    ends = [mean(last_losses(models[row])) for row in (name, base)]
                    lead = 100 * (ends[0] / ends[1] - 1)
                    panel.plot(int(other.split("-")[1]), lead, "o", color=colour)
        panel.axhline(0, color="grey", lw=1)
        panel.set(title=f"{text} (0: {base})", xlabel="steps")
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("% over plain softmax, mean of seeds")
    labels = {line.get_label(): line for panel in figure.axes for line in panel.get_lines()}
    labels = {name: labels[name] for name in STYLES if name in labels}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=6)


def mean_curve(runs):
    """step -> mean validation loss of the seeds."""
    curves = [{row["step"]: row["val_loss"] for row in rows} for _, rows in runs.values()]
    return {
        step: mean(c[step] for c in curves) for step in curves[0] if all(step in c for c in curves)
    }


def save_picture(draw, data, path, size):
    """draw(data, figure) to path, unless the picture there is of the same data by the same code.

    Other versions of matplotlib make other bytes, and a reader's command must not change ours.
    """
    from matplotlib.figure import Figure  # here, because it takes a second

    digest = hashlib.sha256(repr((data, inspect.getsource(draw), size)).encode()).hexdigest()
    if path.is_file() and digest.encode() in path.read_bytes():
        return
    figure = Figure(figsize=size, layout="constrained")
    draw(data, figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100, metadata={"Description": digest})


# ---- The command ---------------------------------------------------------------------------------

HEAD = """# The grid

Written by `python results/reproduce.py --table-only` from the logs. Losses are those of the last
step, over the validation text, means over seeds. Intervals are 95%: t s sqrt(1/n1 + 1/n2), where s
is the spread of seeds around their row's mean, pooled over the setting's rows; in brackets the
number of seeds. One seed gets no interval, and allows no claim.
"""


@dataclass
class ReproduceConfig:
    """What the command line takes."""

    only: str = ""  # names of rows, comma-separated; --list shows them
    corpora: str = ""  # names of settings, comma-separated: "code", "code-512" ..
    seeds: int = 0  # seeds 1 .. N; 0: the setting's own number
    dir: str = str(HERE)  # where logs/, table.md and pictures lie
    out: str = "out/reproduce"  # where runs keep their checkpoints
    table_only: bool = False  # train nothing
    list: bool = False  # show the runs and how far each is, and do nothing
    again: str = ""  # a log: train this once more, and compare

    def names(self, flag, known):
        """The names of --only or --corpora; all where none is given."""
        names = [name.strip() for name in getattr(self, flag).split(",") if name.strip()]
        for name in names:
            if name not in known:
                raise BadInput(f"unknown name {name!r} in --{flag}; choose from {', '.join(known)}")
        return names or list(known)


def between_marks(path, name, lines):
    """Put lines between the page's <!-- name --> and <!-- /name -->, if it has such marks."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin in text and end in text:
        before, after = text.split(begin)[0], text.split(end)[1]
        write_text(path, "\n".join([f"{before}{begin}", "", *lines, f"{end}{after}"]))


def write_text(path, text):
    with atomic_write(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8", newline="\n")


def write_tables(folder):
    """table.md, the pages' tables and the picture, from the logs in folder/logs."""
    logs = read_logs(folder / "logs")
    lines = [
        line for name in SETTINGS if name in logs for line in setting_section(name, logs[name])
    ]
    lines += tried_section(folder / "logs")
    write_text(folder / "table.md", "\n".join([HEAD, *lines]).rstrip() + "\n")
    if any(plain(logs.get(text, {})) for text in TEXTS):
        save_picture(draw_lead, logs, folder / "lead.png", (12, 4.5))
        for page in (folder / "README.md", folder.parent / "README.md"):
            between_marks(page, "found", found_table(logs))
            between_marks(page, "recall", recall_table(folder / "logs"))


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    config = parse(ReproduceConfig, arguments, "Train the grid of models; write its tables.")
    folder = Path(config.dir)
    names = config.names("corpora", SETTINGS), config.names("only", ROWS)
    runs = make_runs(*names, config.seeds, config.out)
    torch.set_num_threads(1)  # small models: a core each, and the same sums everywhere
    if config.list:
        for run in runs:
            begun = can_resume(run)
            state = "to do" if begun is None else f"begun, at step {begun}"
            print(f"{run.name}: {'done' if read_or_warn(run.log(folder / 'logs'), run) else state}")
        return 0
    if config.again:
        return again(Path(config.again), config.out)
    if not config.table_only:
        stopped_by = train_all(runs, folder / "logs")
        if stopped_by:
            return 128 + stopped_by  # as shells count
    write_tables(folder)
    return 0


if __name__ == "__main__":
    run_program(main)
