"""Train the grid of models behind the README's claims; make its tables and pictures from the logs.

    python results/reproduce.py --list           what there is to train, and what is done
    python results/reproduce.py                  train what is missing: many hours (README.md here)
    python results/reproduce.py --only ab-in,softmax-rope --corpora shakespeare
    python results/reproduce.py --scale tried    what was tried on the way, most on one seed
    python results/reproduce.py --table-only     from the logs alone: table.md, README, pictures

A run is one call of train.py's train(). At its end its curve goes to logs/SCALE/RUN.jsonl: a line
that says what was trained, a line an evaluation, and a line with a checksum of the rest. A log that
is whole and of the configuration asked for is never made again; any other is named and made anew.
Ctrl-C, or a power cut, loses at most the steps since the last evaluation: the same command goes on.
On a machine with more cores, start the command in more terminals; each takes the next free run.
"""

import hashlib
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from filelock import FileLock, Timeout

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import tables  # noqa: E402

from bench import device_name  # noqa: E402
from hsm import BadInput, GPTConfig, atomic_write, load_checkpoint  # noqa: E402
from prepare_data import download, parse, prepare  # noqa: E402
from prepare_data import run as run_program  # noqa: E402
from train import PRESETS, TrainConfig, get_data, pick_device, train  # noqa: E402

# ------------------------------------------------------------------------------------------------
# What is trained


def random_shifts(base, seed):
    """Seven random shifts that add up to 127, the reach of 1, 2, 4 .. 64; others for each seed."""
    cuts = np.random.default_rng(seed).choice(np.arange(1, 127), size=6, replace=False)
    return {"shifts": ",".join(map(str, np.diff([0, *sorted(cuts), 127])))}


def deeper(base, seed, layers, every):
    """More layers (`layers` for each 7) with the parameters of base's layers, all of them softmax.

    Every so-many-th is softmax (0: none), with 4 C^2 numbers and, as all, 2 C d_ff; the others are
    ab without projection, which have next to none but these.
    """
    C, n = base.n_embd, round(layers * base.n_layer / 7)
    n_softmax = n // every if every else 0
    return {"n_layer": n, "d_ff": round(C * (6 * base.n_layer - 2 * n_softmax) / n)}


@dataclass
class Model:
    """A row of the table: how it differs from GPTConfig's defaults (ab in each layer)."""

    about: str
    fields: dict  # of GPTConfig
    more: object = None  # more fields, a function of the base's shape and the seed
    train: dict = field(default_factory=dict)  # of TrainConfig

    def config(self, base, seed):
        more = self.more(base, seed) if self.more else {}
        return replace(base, **self.fields, **more)


def deep(about, mixers, layers, **fields):
    """A row with more layers, without projection; of the mixers, tiled, softmax may be the last."""
    names = mixers.split(",")
    every = len(names) if "softmax" in names else 0
    fields = {"mixers": mixers, "proj": False, **fields}
    return Model(about, fields, more=partial(deeper, layers=layers, every=every))


def pair_in(pair, **fields):
    """Fields of a row with a linear map before the delay, too, and all shifts in each layer."""
    return {"mixers": pair, "in_proj": True, "n_head": 8, **fields}


SEVEN = ("ab", "vec", "matrix", "gate1", "gate2", "fusion", "mult")
MIDDLE = "ab,ab,ab,softmax,ab,ab,ab"
LAST = "ab,ab,ab,ab,ab,ab,softmax"
MODELS = {
    "softmax-learned": Model(
        "softmax, learned positions (GPT-2)",
        {"mixers": "softmax", "pos_emb": "learned"},
    ),
    "softmax-rope": Model("softmax, rotary positions", {"mixers": "softmax"}),
    "softmax-deep": deep(
        "softmax, rotary positions, more layers and a narrower feed-forward",
        "softmax",
        layers=9,
        proj=True,
    ),
    **{
        f"{pair}-in": Model(f"{pair} between two linear maps, 8 heads", pair_in(pair))
        for pair in SEVEN
    },
    "hybrid-middle": Model("ab-in, the middle layer softmax", pair_in(MIDDLE)),
    "hybrid-last": Model("ab-in, the last layer softmax", pair_in(LAST)),
    "hybrid-2nd": Model("ab-in, every second layer softmax", pair_in("ab,softmax")),
    "hybrid-3rd": Model("ab-in, every third layer softmax", pair_in("ab,ab,softmax")),
    "hybrid-deep": deep(
        "vec without projection but more layers, every third softmax", "vec,vec,softmax", layers=9
    ),
    "ab-in-layer": Model("ab-in, one shift a layer: 1, 2, 4 .. 64", pair_in("ab", shifts="layer")),
    "ab-in-random": Model(
        "ab-in, one random shift a layer, the same reach", pair_in("ab"), more=random_shifts
    ),
    "ab-in-linear": Model(
        "ab-in, one shift a layer: 1, 2, 3 .. 7", pair_in("ab", shifts="1,2,3,4,5,6,7")
    ),
    "ab-in-4C": Model("ab-in, feed-forward 4 C wide: fewer parameters", pair_in("ab", d_ff=256)),
    "vec-deep": deep("vec without projection but more layers", "vec", layers=10),
}
TRIED = {  # on the way to the rows above, most on one seed: how each differs from them
    **{pair: Model(f"{pair}, a linear map after it, 4 heads", {"mixers": pair}) for pair in SEVEN},
    "ab-layer": Model("ab, one shift a layer: 1, 2, 4 .. 64", {"mixers": "ab", "shifts": "layer"}),
    "ab-linear": Model(
        "ab, one shift a layer: 1, 2, 3 .. 7", {"mixers": "ab", "shifts": "1,2,3,4,5,6,7"}
    ),
    "ab-8": Model("ab with 8 heads", {"mixers": "ab", "n_head": 8}),
    "ab-in-4": Model("ab-in with 4 heads", pair_in("ab", n_head=4)),
    "ab-in-ones": Model("ab-in, each shift 1", pair_in("ab", shifts="1")),
    "ab-in-16": Model("ab-in with 16 heads", pair_in("ab", n_head=16)),
    "vec-in-4": Model("vec-in with 4 heads", pair_in("vec", n_head=4)),
    "vec-in-4-9": Model(
        "vec-in with 4 heads, 9 layers", pair_in("vec", n_head=4, n_layer=9, d_ff=235)
    ),
    "softmax-rope-8": Model("softmax-rope with 8 heads", {"mixers": "softmax", "n_head": 8}),
    "softmax-learned-8": Model(
        "softmax-learned with 8 heads", {"mixers": "softmax", "pos_emb": "learned", "n_head": 8}
    ),
    "middle-4": Model("hybrid-middle with 4 heads", pair_in(MIDDLE, n_head=4)),
    "middle-plain": Model("hybrid-middle with ab, 4 heads", {"mixers": MIDDLE}),
    "2nd-plain": Model("hybrid-2nd with ab, 4 heads", {"mixers": "ab,softmax"}),
    "3rd-plain": Model("hybrid-3rd with ab, 4 heads", {"mixers": "ab,ab,softmax"}),
    "ab-deep": deep("vec-deep with ab", "ab", layers=10),
    "hybrid-ab": deep("hybrid-deep with ab", "ab,ab,softmax", layers=9),
    "hybrid-ab-12": deep("hybrid-deep with ab, 12 layers", "ab,ab,softmax", layers=12),
    "hybrid-in": Model(
        "hybrid-deep with a linear map before the delay",
        {"mixers": "vec,vec,softmax", "proj": False, "in_proj": True, "n_layer": 9, "d_ff": 235},
    ),
    "hybrid-5th": deep(
        "hybrid-deep with 10 layers, every fifth softmax", "vec,vec,vec,vec,softmax", layers=10
    ),
    "hybrid-8": deep("hybrid-deep with 8 heads", "vec,vec,softmax", layers=9, n_head=8),
    "hybrid-short": deep(
        "hybrid-deep with shifts 1, 2, 4, 8 in each layer",
        "vec,vec,softmax",
        layers=9,
        shifts="1+2+4+8",
    ),
    "hybrid-early": deep(
        "hybrid-deep with softmax in layers 2, 5 and 8, not 3, 6 and 9", "vec,softmax,vec", layers=9
    ),
    "hybrid-9th": deep(
        "hybrid-deep with the middle layer softmax alone",
        "vec,vec,vec,vec,softmax,vec,vec,vec,vec",
        layers=9,
    ),
    "hybrid-nope": deep(
        "hybrid-deep without positions", "vec,vec,softmax", layers=9, pos_emb="none"
    ),
    "vec-deep-short": deep(
        "vec-deep with shifts 1, 2, 4, 8 in each layer", "vec", layers=10, shifts="1+2+4+8"
    ),
    "hybrid-decay": replace(
        MODELS["hybrid-deep"],
        about="hybrid-deep with a weight decay of 0.4, not 0.1",
        train={"weight_decay": 0.4},
    ),
    "vec-deep-dropout": deep("vec-deep with a dropout of 0.05", "vec", layers=10, dropout=0.05),
    "vec-deep-rate": replace(
        MODELS["vec-deep"],
        about="vec-deep with a learning rate of 8e-3, not 4e-3",
        train={"lr": 8e-3},
    ),
    "vec-deep-8": deep("vec-deep with 8 heads", "vec", layers=10, n_head=8),
}
MODELS |= TRIED
CPU = replace(
    PRESETS["quick"],
    steps=4000,
    lr=4e-3,  # the sweep's lowest but for RATES
    eval_interval=400,
    sample_tokens=0,
    device="cpu",
    dtype="float32",
)
GPU = {"sample_tokens": 0, "device": "cuda"}


@dataclass
class Scale:
    """A part of the grid: its corpora, each with how it is trained, its models, their seeds."""

    corpora: dict
    models: tuple
    seeds: int = 3
    rates: dict = field(default_factory=dict)  # (corpus, model) -> lr, where it is not the corpus's


CORPORA = {
    "shakespeare": replace(CPU, data="data/shakespeare_char"),
    "stdlib": replace(CPU, data="data/stdlib_byte"),
    "tinystories": replace(CPU, data="data/tinystories_sample"),
}
# The lowest of the sweep where that is not CPU's.
RATES = {("stdlib", name): 0.008 for name in ("softmax-rope", "softmax-deep")}
SCALES = {
    "cpu": Scale(CORPORA, tuple(name for name in MODELS if name not in TRIED), rates=RATES),
    "tried": Scale(CORPORA, tuple(TRIED), seeds=1),
    "gpu": Scale(
        {
            "shakespeare": replace(PRESETS["shakespeare"], **GPU),
            "tinystories": replace(PRESETS["tinystories"], steps=1000, eval_interval=100, **GPU),
        },
        (*tables.BASELINES, "hybrid-deep"),  # 18 runs, to fit in 25 minutes of an H100
    ),
    "sweep": Scale(  # of the learning rate, in the place of corpora
        {
            f"{corpus}-lr-{lr}": replace(config, lr=lr)
            for corpus, config in CORPORA.items()
            for lr in (0.002, 0.004, 0.008, 0.016)
        },
        (*tables.BASELINES, "ab-in", "vec-deep", "hybrid-deep", "hybrid-ab"),
        seeds=1,
    ),
}

# TinyStories' first 10,000 lines: as much as a model of this size can use (CDLA-Sharing-1.0).
SAMPLE_URL = (
    "https://raw.githubusercontent.com/mines-opt-ml/decoding-gpt/"
    "79274e31fe66ed5cf23be815bf51dc63a4ca57a6/data/tinystories_10k.txt"
)
SAMPLE_SHA256 = "5a19b936d7b53bbdac1eea03230b00161dceca24ae272f5bd8e9dbbc2a883418"


def data_of(folder):
    """meta of a prepared folder, which is prepared if need be. A stand-in is not taken."""
    folder = Path(folder)
    if folder.name == "tinystories_sample" and not (folder / "meta.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "input.txt").is_file():
            download(SAMPLE_URL, folder / "input.txt", SAMPLE_SHA256)
        prepare("tinystories", tokenizer="char", folder=folder)
    found, meta = get_data(folder)
    if Path(found) != folder:
        raise BadInput(f"{folder} is not there, and a run on {found} would not be the same")
    return meta


# ------------------------------------------------------------------------------------------------
# A run and its log


# Grows when the code changes what a configuration gives, so that no log or checkpoint from before
# is taken for a new one. 2: weights start by the width, not at 0.02.
RECIPE = 2
# Fields of TrainConfig that do not make another run of it.
ELSEWHERE = ("out", "data", "resume", "sample_tokens", "device", "dtype", "compile", "fast")


@dataclass
class Run:
    """One model, one corpus, one seed."""

    scale: str
    corpus: str
    model: str
    seed: int
    config: TrainConfig

    @property
    def name(self):
        return f"{self.corpus}.{self.model}.{self.config.steps}.s{self.seed}"

    def log(self, folder):
        """Where its log lies among those of the folder."""
        return Path(folder) / self.scale / f"{self.name}.jsonl"

    def describe(self):
        """What a log must say to be this run's: all that the numbers depend on but the data."""
        fields = asdict(self.config)
        model = fields.pop("model")
        train = {name: value for name, value in fields.items() if name not in ELSEWHERE}
        return {"recipe": RECIPE, "model": {**model, "vocab_size": 0}, "train": train}


def make_runs(scale, models, corpora, seeds, steps, out):
    """The runs asked for, in the order of seeds: cut off early, each row has the same number."""
    runs = []
    for seed in range(1, seeds + 1):
        for corpus in corpora:
            for name in models:
                base, model = SCALES[scale].corpora[corpus], MODELS[name]
                n = steps or base.steps
                shape = model.config(base.model, seed)
                lr = SCALES[scale].rates.get((corpus, name), base.lr)
                fields = {"steps": n, "eval_interval": min(base.eval_interval, n), "lr": lr}
                fields |= model.train
                config = replace(base, model=shape, seed=seed, **fields)
                new = Run(scale, corpus, name, seed, config)
                new.config.out = str(Path(out) / f"recipe{RECIPE}" / scale / new.name)
                runs.append(new)
    return runs


def write_log(path, head, history):
    """head, the rows of log.jsonl, and a checksum of these lines: whole or not at all."""
    lines = "".join(json.dumps(row) + "\n" for row in (head, *history))
    end = {"rows": len(history), "sha256": hashlib.sha256(lines.encode()).hexdigest()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        Path(temporary).write_text(lines + json.dumps(end) + "\n", encoding="utf-8", newline="\n")


def read_log(path):
    """(head, rows) of a log. BadInput where it is not as write_log left it."""
    try:
        text = path.read_bytes()
        *lines, last = text.splitlines(keepends=True)
        end = json.loads(last)
        if end["sha256"] != hashlib.sha256(b"".join(lines)).hexdigest():
            raise ValueError("checksum")
        head, *rows = map(json.loads, lines)
        if len(rows) != end["rows"] or not rows:
            raise ValueError("rows")
        return head, rows
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path.name} is damaged") from error


def finished(run, folder, warn=print):
    """(head, rows) of this run's log in folder, or None, with a word on what is wrong with it."""
    path = run.log(folder)
    if not path.is_file():
        return None
    try:
        head, rows = read_log(path)
    except BadInput as error:
        warn(f"warning: {error}: not counted; the run is to be made again")
        return None
    if not is_log_of(run, head):
        warn(f"warning: {path.name} is of another configuration: not counted")
        return None
    return head, rows


def work(run, folder):
    """Train this run, go on with it if it was begun, and write its log. Returns a signal or 0."""
    meta = data_of(run.config.data)
    others = Path(folder, run.scale).glob(f"{run.corpus}.*.jsonl")
    for path in others:
        try:
            sha256 = read_log(path)[0]["data"]["sha256"]
        except (BadInput, KeyError):
            continue
        if sha256 != meta["sha256"]:
            raise BadInput(
                f"{run.config.data} is not the text that {path.name} was made with, so its runs "
                "would not compare; use another --dir, or the same text"
            )
    path = run.log(folder)
    same = twin(run, meta, folder)
    if same:
        write_log(path, {**same[0], "run": run.name}, same[1])
        return 0
    result = train(replace(run.config, resume=can_resume(run)))
    if result.stopped_by:
        return result.stopped_by
    head = {
        "run": run.name,
        **run.describe(),
        "parameters": result.model.num_params(),
        "data": {key: meta[key] for key in ("sha256", "vocab_size", "val_tokens", "val_bytes")},
        **surroundings(pick_device(run.config.device)),
    }
    write_log(path, head, result.history)
    return 0


def twin(run, meta, folder):
    """(head, rows) of a log of the same run under another name: the sweep's and the grid's meet."""
    for path in Path(folder).glob(f"*/*.{run.model}.{run.config.steps}.s{run.seed}.jsonl"):
        try:
            head, rows = read_log(path)
        except BadInput:
            continue
        if is_log_of(run, head) and head["data"]["sha256"] == meta["sha256"]:
            return head, rows
    return None


def surroundings(device):
    """What the numbers of a log may depend on besides the configuration."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def can_resume(run):
    """Whether there is a whole checkpoint of just this run to go on from."""
    try:
        saved = load_checkpoint(Path(run.config.out) / "ckpt.pt")
    except BadInput:
        return False
    return is_of(run, saved["config"], saved.get("train"))


def is_log_of(run, head):
    """Whether a log with this head is the run's."""
    return head.get("recipe") == RECIPE and is_of(run, head.get("model"), head.get("train"))


def is_of(run, model, train):
    """Whether these fields are the run's; one that is not there has its default."""
    try:
        config = TrainConfig(model=GPTConfig(**model), **train)
    except (TypeError, ValueError):
        return False
    return replace(run, config=config).describe() == run.describe()


# ------------------------------------------------------------------------------------------------
# The command

HEAD = """# The grid

Written by `python results/reproduce.py --table-only` from the logs in logs/cpu, logs/tried,
logs/gpu and logs/sweep. Losses are those of the last step, over the validation text: mean ± half of
the 95% interval over seeds (Student's t). Differences are paired, seed by seed, with the same data
in the same order; below 0 is better than the baseline. In brackets: parameters beside the
baseline's.
"""


@dataclass
class ReproduceConfig:
    """What the command line takes."""

    # The grid; what else was tried, most on one seed; 10M parameters or more; learning rates.
    scale: Literal["cpu", "tried", "gpu", "sweep"] = "cpu"
    only: str = ""  # names of models, comma-separated; --list shows them
    corpora: str = ""  # names of corpora, comma-separated
    seeds: int = 0  # seeds 1 .. N; 0: the scale's own number
    steps: int = 0  # steps of each run; 0: the scale's own, which alone go into the tables
    dir: str = str(HERE)  # where logs/, table.md and pictures lie
    out: str = "out/reproduce"  # where runs keep their checkpoints until they are done
    table_only: bool = False  # train nothing
    list: bool = False  # show the runs and how far each is, and do nothing

    def __post_init__(self):
        if self.seeds < 0 or self.steps < 0:
            raise BadInput("seeds and steps must be 0 (the scale's own) or more")
        its = SCALES[self.scale]
        for flag, known in (("only", its.models), ("corpora", its.corpora)):
            for name in self.names(flag):
                if name not in known:
                    one = "model" if flag == "only" else "corpus"
                    raise BadInput(f"unknown {one} {name!r}; choose from {', '.join(known)}")

    def names(self, flag):
        """The names of --only or --corpora; all of the scale's where none is given."""
        its = SCALES[self.scale]
        known = its.models if flag == "only" else tuple(its.corpora)
        return (
            tuple(name.strip() for name in getattr(self, flag).split(",") if name.strip()) or known
        )


def state_of(run, folder):
    """One word or two on how far a run is."""
    if finished(run, folder, warn=lambda _: None):
        return "done"
    if run.log(folder).is_file():
        return "its log is damaged or of another configuration: to be made again"
    return "begun" if can_resume(run) else "to do"


def train_all(runs, folder):
    """Train what is not finished and what no other process is at. Returns a signal or 0."""
    for number, run in enumerate(runs, start=1):
        lock = Path(f"{run.config.out}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(lock, timeout=0):
                if finished(run, folder) is None:
                    print(f"\n{run.name}, {number} of {len(runs)}")
                    stopped_by = work(run, folder)
                    if stopped_by:
                        return stopped_by
        except Timeout:
            print(f"{run.name}: another process is at it")
    return 0


def read_logs(scale, folder):
    """corpus -> model -> seed -> (head, rows): the whole logs of a scale."""
    its, logs = SCALES[scale], {}
    endings = (path.stem.rpartition(".s")[2] for path in Path(folder, scale).glob("*.s*.jsonl"))
    seeds = [int(ending) for ending in endings if ending.isdecimal()]
    for one in make_runs(scale, its.models, its.corpora, max(seeds, default=0), 0, ""):
        log = finished(one, folder)
        if log is not None:
            logs.setdefault(one.corpus, {}).setdefault(one.model, {})[one.seed] = log
    return logs


def write_tables(folder):
    """table.md, pictures and the README's table, of all scales, from the logs in folder/logs."""
    folder, about = Path(folder), {name: model.about for name, model in MODELS.items()}
    lines, claims = [], []
    every = {scale: read_logs(scale, folder / "logs") for scale in SCALES}
    for scale, logs in every.items():
        if not logs:
            lines += [f"## {scale} scale", "", "Not yet run.", ""]
        elif scale == "sweep":
            lines += tables.sweep_section(logs, about)
        elif scale == "tried":
            lines += tables.beside_section(tables.together(every["cpu"], logs))
            lines += tables.tried_section(logs, every["cpu"], about)
        else:
            lines += tables.summary_section(scale, logs, about)
            for corpus, models in logs.items():
                title = f"{corpus}, {scale} scale"
                lines += tables.corpus_section(title, models, about)
            claims += tables.claims_table(logs, about)
            for name in ("curves", "compute"):
                draw = partial(getattr(tables, f"draw_{name}"), about=about)
                size = (4 * len(logs) + 1, 6.5)
                tables.save_picture(draw, logs, folder / f"{name}_{scale}.png", size)
    write_text(folder / "table.md", "\n".join([HEAD, *lines]).rstrip() + "\n")
    if folder.resolve() == HERE:
        page = HERE.parent / "README.md"
        text = page.read_text(encoding="utf-8")
        write_text(page, tables.between_marks(text, "claims", claims))


def write_text(path, text):
    """text into path, unless it is there already."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with atomic_write(path) as temporary:
            Path(temporary).write_text(text, encoding="utf-8", newline="\n")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    config = parse(ReproduceConfig, arguments, "Train the grid of models; write its tables.")
    logs = Path(config.dir) / "logs"
    names = (config.names("only"), config.names("corpora"))
    seeds = config.seeds or SCALES[config.scale].seeds
    runs = make_runs(config.scale, *names, seeds, config.steps, config.out)
    if config.list:
        for run in runs:
            print(f"{run.name}: {state_of(run, logs)}")
        return 0
    if not config.table_only:
        if config.scale != "gpu":
            torch.set_num_threads(1)  # small models: a core each, and the same sums everywhere
        stopped_by = train_all(runs, logs)
        if stopped_by:
            return 128 + stopped_by  # as shells count
    write_tables(config.dir)
    return 0


if __name__ == "__main__":
    run_program(main)
