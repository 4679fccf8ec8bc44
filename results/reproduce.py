"""Train the grid of models behind the README's claims; make its tables and pictures from the logs.

    python results/reproduce.py --list          what there is to train, and what is done
    python results/reproduce.py                 train what is missing: many hours
    python results/reproduce.py --table-only    from the logs alone: table.md, READMEs, lead.png

A run's log, logs/cpu/RUN.jsonl, stays if it is whole and of the configuration asked for. To check
one, delete it and train it again: the same losses, to the bit. More terminals share the runs.
"""

import hashlib
import inspect
import json
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Literal

import numpy as np
import torch
from filelock import FileLock, Timeout

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import neighbours  # noqa: E402, F401
from bench import device_name  # noqa: E402

from hsm import GPT, BadInput, GPTConfig  # noqa: E402
from prepare_data import GITHUB, atomic_write, download, parse, prepare, run  # noqa: E402
from train import PRESETS, TrainConfig, get_data, load_checkpoint, train  # noqa: E402

# ---- What is trained: rows, in settings ----------------------------------------------------------

MAPS = {"in_proj": True, "n_head": 8}  # HSM between two linear maps, all shifts in each layer
DEEP = {"proj": False, "layers": 9}  # HSM without a map; what that saves is 9 layers in place of 7
ROWS = {  # fields of GPTConfig; recipe 2 had more, whose logs are in the tables, too
    "softmax-100": {"mixers": "softmax", "rope_base": 100.0},
    "hybrid-deep": {"mixers": "vec,vec,softmax", **DEEP},
    "shift-softmax": {"mixers": "shift-softmax"},
    "hybrid-shift": {"mixers": "vec,vec,shift-softmax", **DEEP},
    "softmax-rope": {"mixers": "softmax"},
    "shift-softmax-100": {"mixers": "shift-softmax", "rope_base": 100.0},
    "ab-in": {"mixers": "ab", **MAPS},
    "linrec": {"mixers": "linrec"},
    "conv4-hybrid": {"mixers": "conv4,conv4,softmax", **DEEP},
    "shifts-softmax": {"mixers": "shifts-softmax"},
    "linrec-hybrid": {"mixers": "linrec,linrec,softmax"},
    "window": {"mixers": "window"},
    "window-hybrid": {"mixers": "window,window,softmax"},
    "all-in": {"mixers": "all-shifts", **MAPS},
    "all-hybrid": {"mixers": "all-shifts,all-shifts,softmax", **DEEP},
    "all-short-hybrid": {"mixers": "all-shifts,all-shifts,softmax", "shifts": "1+2+4+8", **DEEP},
    "softmax-learned": {"mixers": "softmax", "pos_emb": "learned"},  # GPT-2's
    "softmax-deep": {"mixers": "softmax", "layers": 9},
    "shift-softmax-deep": {"mixers": "shift-softmax", "layers": 9},
    "hybrid-b0": {"mixers": "vec,vec,softmax", "shifts": "128", **DEEP},  # z = 0 in the window
}
GRID = tuple(ROWS)
ROWS["ab-in-layer"] = {"mixers": "ab", "shifts": "layer", **MAPS}  # for diagnose.py
# Settled by the rows of code before a run of the settings below: the best of each kind there.
PICKS = ("softmax-deep", "shift-softmax-deep", "hybrid-shift", "ab-in", "linrec")
LENGTHS = (*PICKS, "all-short-hybrid")


def shape(base, layers=0, **fields):
    """The GPTConfig of a row. layers: how many for each 7 of base, with the parameters of base's.

    Without projections HSM has next to none; attention has 4 C^2, the feed-forward 2 C d_ff.
    """
    config = replace(base, **fields)
    if layers:
        config = replace(config, n_layer=round(layers * base.n_layer / 7))
        n_softmax = sum("softmax" in name for name, _ in config.layers)
        width = config.n_embd * (6 * base.n_layer - 2 * n_softmax) / config.n_layer
        config = replace(config, d_ff=round(width))
    return config


@dataclass
class Setting:
    """What rows are compared within: a text, a length, a number of steps, a width."""

    config: TrainConfig
    rows: tuple
    seeds: int = 3


SHAPE = GPTConfig(vocab_size=0, block_size=128, n_layer=7, n_head=4, n_embd=64)
COMMON = {"steps": 4000, "lr": 4e-3, "eval_interval": 400, "sample_tokens": 0}
CPU = TrainConfig(SHAPE, **COMMON, device="cpu", threads=1)
CODE = replace(CPU, data="data/stdlib_byte", eval_interval=1000, eval_tokens=10**7)  # all of it
ENDS = replace(CODE, eval_interval=4000)  # no curve: the evaluations would take a tenth of the time
LONG = replace(ENDS, batch_size=4, model=replace(SHAPE, block_size=512))
# TinyStories' first 10,000 lines: as much as a model of this size can use (CDLA-Sharing-1.0).
SAMPLE = "data/tinystories_sample"
COMMIT = "79274e31fe66ed5cf23be815bf51dc63a4ca57a6"
SAMPLE_URL = f"{GITHUB}/mines-opt-ml/decoding-gpt/{COMMIT}/data/tinystories_10k.txt"
SAMPLE_SHA256 = "5a19b936d7b53bbdac1eea03230b00161dceca24ae272f5bd8e9dbbc2a883418"
RATES = 0.002, 0.008  # half of the others', and twice
SETTINGS = {
    "code": Setting(CODE, GRID),
    "tinystories": Setting(replace(CPU, data=SAMPLE), GRID),
    "code-512": Setting(LONG, LENGTHS),
    **{f"code-512-lr-{lr}": Setting(replace(LONG, lr=lr), PICKS[:3], seeds=1) for lr in RATES},
    "code-1000": Setting(replace(ENDS, steps=1000), LENGTHS),
    "code-8000": Setting(replace(ENDS, steps=8000), LENGTHS),
    **{f"code-lr-{lr}": Setting(replace(CODE, lr=lr), GRID[:-1], seeds=1) for lr in RATES},
    "code-32": Setting(replace(CODE, model=replace(SHAPE, n_embd=32, n_layer=5)), PICKS),
    "code-128": Setting(replace(CODE, model=replace(SHAPE, n_embd=128, n_layer=10)), PICKS),
    "shakespeare": Setting(replace(CPU, data="data/shakespeare_char"), GRID[:8]),
}


def data_of(folder):
    """meta of a prepared folder, which is prepared if need be. A stand-in is not taken."""
    text = Path(folder, "input.txt")
    if folder == SAMPLE and not text.with_name("meta.json").is_file():
        text.is_file() or download(SAMPLE_URL, text, SAMPLE_SHA256)
        prepare("tinystories", tokenizer="char", folder=folder)
    found, meta = get_data(folder)
    if Path(found) != Path(folder):
        raise BadInput(f"{folder} is not there, and a run on {found} would not be the same")
    return meta


# ---- A run and its log ---------------------------------------------------------------------------

# Fields of TrainConfig that do not make another run of it.
ELSEWHERE = {"out", "data", "resume", "sample_tokens", "device", "compile", "fast", "threads"}


def describe(config):
    """What a log must say to be this run's: all that the numbers depend on but the data."""
    fields = asdict(config)
    model = fields.pop("model") | {"vocab_size": 0}
    return {"model": model, "train": {k: v for k, v in fields.items() if k not in ELSEWHERE}}


def is_of(config, model, train):
    """Whether these fields are the run's; one that is not there has its default."""
    try:
        return describe(TrainConfig(model=GPTConfig(**model), **train)) == describe(config)
    except (TypeError, ValueError):  # a field that is no more, or out of its range
        return False


def saved_step(config):
    """The step of a whole checkpoint of just this run, or None."""
    try:
        saved = load_checkpoint(Path(config.out, "ckpt.pt"))
    except BadInput:
        return None
    return saved["step"] if is_of(config, saved["config"], saved["train"]) else None


def make_run(setting, row, seed, out="out/reproduce"):
    """The TrainConfig of one row, in one setting, with one seed; out ends with the run's name."""
    base = SETTINGS[setting].config
    name = f"{setting}.{row}.{base.steps}.s{seed}"
    return replace(base, model=shape(base.model, **ROWS[row]), seed=seed, out=f"{out}/{name}")


def make_runs(settings=(), rows=(), seeds=0, out="out/reproduce"):
    """The runs asked for, in the order of seeds: cut off early, each row has the same number."""
    chosen = {name: SETTINGS[name] for name in (settings or SETTINGS)}
    return [
        make_run(name, row, seed, out)
        for seed in range(1, 1 + (seeds or max(setting.seeds for setting in chosen.values())))
        for name, setting in chosen.items()
        for row in setting.rows
        if row in (rows or ROWS) and seed <= (seeds or setting.seeds)
        if row != "hybrid-b0" or seed == 1
    ]


def write_text(path, text):
    with atomic_write(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8", newline="\n")


def write_log(path, head, rows):
    """head, rows, and a checksum of these lines: whole or not at all."""
    lines = "".join(json.dumps(row) + "\n" for row in (head, *rows))
    end = {"rows": len(rows), "sha256": hashlib.sha256(lines.encode()).hexdigest()}
    write_text(path, lines + json.dumps(end) + "\n")


def read_log(path, of=None):
    """(head, rows) of a log that is whole and, if a run is named, of that run; else None."""
    if not path.is_file():
        return None
    *lines, end = path.read_bytes().splitlines(keepends=True) or [b""]
    if hashlib.sha256(b"".join(lines)).hexdigest().encode() not in end:
        print(f"warning: {path.name} is damaged: not counted; it is to be made again")
        return None
    head, *rows = map(json.loads, lines)
    if of and not is_of(of, head["model"], head["train"]):
        print(f"warning: {path.name} is of another configuration: not counted")
        return None
    return head, rows


def surroundings():
    """What the numbers of a log may depend on besides the configuration."""
    facts = {"device": device_name(torch.device("cpu")), "threads": torch.get_num_threads()}
    return facts | {"torch": torch.__version__, "date": date.today().isoformat()}


@contextmanager
def claim(path):
    """Yields whether this process may have path: False while another one has it."""
    try:
        with FileLock(f"{path}.lock", timeout=0):
            yield True
    except Timeout:
        print(f"{path.name}: another process is at it")
        yield False


def train_all(runs, folder):
    """Train what has no log and what no other process is at. Returns a signal or 0."""
    for number, config in enumerate(runs, start=1):
        name = Path(config.out).name
        with claim(Path(config.out)) as free:
            if not free or read_log(folder / f"{name}.jsonl", config):
                continue
            print(f"\n{name}, {number} of {len(runs)}")
            meta = data_of(config.data)
            others = filter(None, map(read_log, folder.glob(f"{name.rsplit('.', 3)[0]}.*")))
            if any(head["data"]["sha256"] != meta["sha256"] for head, _ in others):
                words = f"{config.data} is not the text that the logs beside {name} were made with"
                raise BadInput(f"{words}: take another --dir, or the same text")
            result = train(replace(config, resume=saved_step(config) is not None))
            if result.stopped_by:
                return result.stopped_by
            keys = ("sha256", "vocab_size", "val_tokens", "val_bytes")
            head = {"run": name, **describe(config), "parameters": result.model.num_params()}
            head |= {"data": {key: meta[key] for key in keys}, **surroundings()}
            write_log(folder / f"{name}.jsonl", head, result.history)
    return 0


# ---- Tables. logs: setting -> row -> [(head, rows), ..], a seed each; losses: row -> its seeds'

PLAIN = ("softmax-100", "softmax-rope", "softmax-deep", "softmax-rope-8")
SHIFTED = ("shift-softmax-100", "shift-softmax", "shift-softmax-deep")
TEXTS, BEFORE = ("shakespeare", "code", "tinystories"), ("shakespeare", "stdlib", "tinystories")
NAMES = {
    "softmax-learned": "GPT-2's softmax: learned positions",
    "softmax-rope": "softmax, rotary positions, base 10,000",
    "softmax-deep": "softmax, nine thinner layers, base 10,000",
    "shift-softmax-deep": "the same with a shift of one token inside",
    "ab-in": "HSM alone",
    "linrec": "a gated linear recurrence alone",
    "hybrid-deep": "HSM and softmax, nine layers",
    "hybrid-shift": "HSM and softmax with the shift, nine layers",
    "conv4-hybrid": "a convolution of four tokens and softmax, nine layers",
}
RANDOM = tuple(f"ab-in-random-{number}" for number in (1, 2, 3))
HYBRIDS = tuple(f"hybrid-{which}" for which in ("deep", "short", "2nd", "3rd", "middle", "last"))
INSTEAD = ("hybrid-deep", "hybrid-b0", *(name for name in GRID if name.endswith("-hybrid")))
HSM = ("ab-in", "all-in", "hybrid-deep", "hybrid-shift", "all-short-hybrid")
ON_CODE = ("code-512", "code-1000", "code-8000", "code-32")
MARKS = {  # the READMEs' tables, between marks of these names: columns, rows, what they are over
    "found": ((*TEXTS, "code-512"), NAMES),
    "claims": (TEXTS + ON_CODE, HSM, PLAIN + SHIFTED),
    "lengths": (("code", *ON_CODE), LENGTHS),
    "recurrence": (TEXTS[1:] + ON_CODE, (*PICKS[:2], *HSM, "linrec-hybrid"), ("linrec",)),
    "instead": (("code", "tinystories"), INSTEAD),
    "ladder": (BEFORE, ("ab-in", "ab-in-linear", "ab-in-layer", *RANDOM)),
    "hybrids": (BEFORE, ("softmax-rope", "softmax-deep", *HYBRIDS)),
}


def read_logs(folder):
    """All logs that are whole and of the configuration that their names say."""
    logs = {}
    for path in sorted(folder.glob("*.jsonl")):
        setting, row, _, seed = path.stem.rsplit(".", 3)
        known = setting in SETTINGS and row in SETTINGS[setting].rows
        if log := read_log(path, make_run(setting, row, int(seed[1:])) if known else None):
            logs.setdefault(setting, {}).setdefault(row, []).append(log)
    return logs


def ends(models):
    """row -> the losses of the last step, never the lowest, a seed each."""
    return {name: [rows[-1]["val_loss"] for _, rows in logs] for name, logs in models.items()}


def t95(df):
    """97.5% quantile of Student's t: its density over t = sqrt(df) tan(u) is cos(u)^(df - 1)."""
    u = np.linspace(0, math.pi / 2, 100_001)
    mass = np.cumsum(np.cos(u) ** (df - 1))
    return math.sqrt(df) * math.tan(u[np.searchsorted(mass, 0.95 * mass[-1])])


def spread(losses, row):
    """Spread of seeds around their row's mean, in %, and degrees of freedom: of row's kind."""
    # Softmax's seeds lie further apart: rows named after it are pooled by themselves.
    groups = [np.array(v) for n, v in losses.items() if ("softmax" in n) == ("softmax" in row)]
    df = sum(len(group) - 1 for group in groups)
    squares = sum(((100 * (group / group.mean() - 1)) ** 2).sum() for group in groups)
    return (math.sqrt(squares / df), df) if df else (math.nan, 0)


def best(losses, names=PLAIN):
    """Of the rows named that of the lowest mean loss, one seed alone only where none has more."""
    there = {*names} & {*losses}
    return min(there, key=lambda name: (len(losses[name]) < 2, mean(losses[name])), default=None)


def over(losses, name, others=PLAIN):
    """How much higher row name's loss is than the best of others': "+1.23 ± 0.45 (3)", in %.

    In brackets seeds. The 95% interval is t sqrt(s1^2/n1 + s2^2/n2), of both kinds' spreads and the
    fewer degrees of freedom; seeds count as independent. One seed of either gets none: no claim.
    """
    base = best(losses, others)
    if not {name, base} <= {*losses} or name == base:
        return "0" if name == base else "-"
    one, other = losses[name], losses[base]
    text = f"{100 * (mean(one) / mean(other) - 1):+.2f}"
    if min(len(one), len(other)) > 1:
        (s1, df1), (s2, df2) = spread(losses, name), spread(losses, base)
        half = t95(min(df1, df2)) * math.sqrt(s1 * s1 / len(one) + s2 * s2 / len(other))
        text += f" ± {half:.2f}"
    return f"{text} ({len(one)})"


def table(*rows):
    """Lines of Markdown; the first row is the head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:], ""]


def marked_table(logs, texts, names, others=PLAIN):
    """A row a model, a column a text: % over the best of others."""
    settings, rows = [logs.get(text, {}) for text in texts], [("model", "row", *texts)]
    for name in names:
        heads = [models[name][0][0] for models in settings if name in models]
        words = names[name] if names is NAMES else differs(heads[0]["model"]) if heads else "-"
        cells = (over(ends(models), name, others) for models in settings)
        rows.append((words, f"`{name}`", *cells))
    return table(*rows)


def quick_table(folder):
    """The quick preset, with other mixers in its place, too; then after a longer run. Seed 1."""
    rows = [("command", "parameters", "loss, 2,600 steps", "seconds", "loss with `--steps 4000`")]
    for flags in ("", " --mixers vec", " --mixers softmax", " --mixers softmax --d-ff 171"):
        name = "quick" + flags.replace(" --", ".").replace(" ", "-")
        model = GPT(parse(TrainConfig, flags.split(), "", PRESETS["quick"]).model)
        paths = (folder / f"{name}{steps}.jsonl" for steps in ("", ".steps-4000"))
        short, long = (json.loads(p.read_text(encoding="utf-8").splitlines()[-1]) for p in paths)
        cells = f"{short['val_loss']:.3f}", f"{short['elapsed_s']:.0f}", f"{long['val_loss']:.3f}"
        rows.append((f"`python train.py{flags}`", f"{model.num_params():,}", *cells))
    return table(*rows)


def differs(fields):
    """In words, how a log's GPTConfig differs from the grid's usual one; the mixers come first."""
    words = [fields["mixers"].replace(",", ", ")]
    for name, value in fields.items():
        if name not in ("mixers", "block_size") and value != getattr(SHAPE, name):
            words.append(f"{name} {value}")
    return "; ".join(words)


def setting_section(setting, models):
    """A heading, what was run, and a row a model, the lowest loss first."""
    losses = ends(models)
    columns = ("row", "model", "parameters", "rate", "seeds", "loss, nats a token", "bits a byte")
    rows = [(*columns, f"% over `{best(losses)}`")]
    for name in sorted(models, key=lambda name: mean(losses[name])):
        (head, _), *_ = models[name]
        last = [rows[-1] for _, rows in models[name]]
        row = (f"`{name}`", differs(head["model"]), f"{head['parameters']:,}", head["train"]["lr"])
        row += (len(last), f"{mean(losses[name]):.4f}", f"{mean(r['val_bpb'] for r in last):.4f}")
        rows.append((*row, over(losses, name)))
    T, fields = head["model"]["block_size"], head["train"]
    about = f"T = {T}, {fields['steps']:,} steps of {fields['batch_size']} windows."
    for row, kind in (("softmax", "rows named softmax"), ("", "other rows")):
        s, df = spread(losses, row)
        about += f" Spread of seeds, {kind}: {s:.2f}%, {df} degrees of freedom." if df else ""
    return [f"## {setting}", "", about, "", *table(*rows)]


# ---- Pictures ------------------------------------------------------------------------------------

COLOURS = {  # that colour-blind eyes tell apart
    "shift-softmax-deep": "#000000",
    "ab-in": "#0072b2",
    "linrec": "#009e73",
    "hybrid-deep": "#d55e00",
    "hybrid-shift": "#e69f00",
    "all-short-hybrid": "#cc79a7",
    "conv4-hybrid": "#56b4e9",
}


def draw_lead(logs, figure):
    """A panel a text: how far over plain softmax, by steps; dots: runs of other lengths."""
    for panel, text in zip(figure.subplots(1, len(TEXTS)), TEXTS, strict=True):
        base = best(ends(logs.get(text, {})))
        for setting, mark in ((text, "-"), (f"{text}-1000", "o"), (f"{text}-8000", "o")):
            curves = {name: mean_curve(models) for name, models in logs.get(setting, {}).items()}
            for name in [name for name in COLOURS if {name, base} <= {*curves}]:
                steps = [step for step in curves[base] if step][-1 if mark == "o" else 0 :]
                lead = [100 * (curves[name][step] / curves[base][step] - 1) for step in steps]
                panel.plot(steps, lead, mark, color=COLOURS[name], label=name * (mark == "-"))
        panel.axhline(0, color="grey", lw=1)
        panel.set(title=f"{text} (0: {base})", xlabel="steps", ylabel="% over plain softmax")
        panel.grid(alpha=0.3)
    lines = {line.get_label(): line for panel in figure.axes for line in panel.get_lines()}
    handles = [lines[name] for name in COLOURS if name in lines]
    figure.legend(handles=handles, loc="outside lower center", ncols=7)


def mean_curve(logs):
    """step -> validation loss, mean of the seeds."""
    rows = zip(*(rows for _, rows in logs), strict=True)
    return {row[0]["step"]: mean(each["val_loss"] for each in row) for row in rows}


def save_picture(draw, data, path, size):
    """draw(data, figure) to path, unless the picture there is of the same data by the same code.

    Other versions of matplotlib make other bytes, and a reader's command must not change ours.
    """
    from matplotlib.figure import Figure  # here, because it takes a second

    digest = hashlib.sha256(repr((data, inspect.getsource(draw), size)).encode()).hexdigest()
    if not path.is_file() or digest.encode() not in path.read_bytes():
        figure = Figure(figsize=size, layout="constrained")
        draw(data, figure)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=100, metadata={"Description": digest})


# ---- The command ---------------------------------------------------------------------------------


@dataclass
class ReproduceConfig:
    """What the command line takes."""

    corpora: tuple[Literal[tuple(SETTINGS)], ...] = ()  # by default all
    only: tuple[Literal[tuple(ROWS)], ...] = ()  # rows; by default all
    seeds: int = 0  # seeds 1 .. N; 0: the setting's own number
    dir: str = str(HERE)  # where logs/, table.md and pictures lie
    out: str = "out/reproduce"  # where runs keep their checkpoints
    table_only: bool = False  # train nothing
    list: bool = False  # show the runs and how far each is, and do nothing


def fill(page, name, lines):
    """Put lines between the page's <!-- name --> and <!-- /name -->, if it has such marks."""
    text, lines = page.read_text(encoding="utf-8"), "\n".join(["", *lines, ""])
    marks = rf"(<!-- {name} -->\n).*(<!-- /{name} -->)"
    write_text(page, re.sub(marks, lambda found: found[1] + lines + found[2], text, flags=re.S))


def write_tables(folder):
    """table.md, the pages' tables and the picture, from the logs in folder/logs."""
    logs = read_logs(folder / "logs" / "cpu")
    about = "Losses of the last step, mean over seeds (`python results/reproduce.py --table-only`)."
    lines = [line for name in logs for line in setting_section(name, logs[name])]
    write_text(folder / "table.md", "\n".join(["# The grid", "", about, "", *lines]))
    save_picture(draw_lead, logs, folder / "lead.png", (12, 4.5))
    pages = folder / "README.md", folder.parent / "README.md"
    for page in pages if pages[0].is_file() else ():
        for name, what in MARKS.items():
            fill(page, name, marked_table(logs, *what))
        fill(page, "quick", quick_table(folder / "logs"))


def main(arguments=None):
    config = parse(ReproduceConfig, arguments, "Train the grid of models; write its tables.")
    folder, logs = Path(config.dir), Path(config.dir, "logs", "cpu")
    runs = make_runs(config.corpora, config.only, config.seeds, config.out)
    torch.set_num_threads(1)  # small models: a core each, and the same sums everywhere
    if config.list:
        for each in runs:
            name = Path(each.out).name
            print(f"{name}: {'done' if read_log(logs / f'{name}.jsonl', each) else 'to do'}")
        return 0
    if not config.table_only and (stopped_by := train_all(runs, logs)):
        return 128 + stopped_by  # as shells count
    write_tables(folder)
    return 0


if __name__ == "__main__":
    run(main)
