"""Tables and pictures of the grid, from its logs alone. reproduce.py calls this file.

logs is, for one scale, a dict  corpus -> model -> seed -> (head, rows):  the lines of one log.
"""

import hashlib
import inspect
import math
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from hsm import BadInput, GPTConfig, atomic_write
from train import flops_per_token

BASELINES = ("softmax-learned", "softmax-rope")

# 97.5% quantiles of Student's t, by degrees of freedom: half a 95% interval of a mean over n runs
# is T95[n - 1] * s / sqrt(n).
T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values):
    """(mean, half of its 95% interval; nan where one value tells nothing of the spread)."""
    n = len(values)
    half = T95[min(n, len(T95)) - 1] * stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return mean(values), half


def cell(values, form):
    """The mean ± half the interval; the mean alone of one value; a dash of none."""
    if not values:
        return "-"
    middle, half = interval(values)
    spread = "" if math.isnan(half) else f" ± {half:{form.lstrip('+')}}"
    return f"{middle:{form}}{spread}"


def last_losses(its):
    """seed -> the last step's loss. its: seed -> (head, rows)."""
    return {seed: rows[-1]["val_loss"] for seed, (_, rows) in its.items()}


def excess(its, baseline):
    """How much higher the last losses are than the baseline's, in %, for each seed of both."""
    its, baseline = last_losses(its), last_losses(baseline)
    return [100 * (its[seed] / baseline[seed] - 1) for seed in its if seed in baseline]


OVER = ("% over softmax, learned positions", "% over softmax, rotary")  # of BASELINES


def over_baselines(name, models):
    """The cells under OVER of a corpus's model; a baseline has an empty one under itself."""
    return [
        "" if name == b else cell(excess(models[name], models.get(b, {})), "+.2f")
        for b in BASELINES
    ]


def mean_loss(its):
    return mean(last_losses(its).values())


def flops(head):
    """Operations of a training step, a token, of a run with this head."""
    config = GPTConfig(**head["model"])
    weights = head["parameters"] + head["data"]["vocab_size"] * config.n_embd  # the output's, too
    n_softmax = sum(name == "softmax" for name, _ in config.layers)
    return flops_per_token(weights, n_softmax, config.n_embd, config.block_size)


def line(*cells):
    return f"| {' | '.join(cells)} |"


def rule(n):
    return line(*["---"] * n)


def corpus_table(models, about):
    """A corpus's rows, the lowest loss first. models: model -> seed -> (head, rows)."""
    head = ("name", "model", "parameters", "rate", "seeds")
    head += ("loss, nats a token", "bits a byte", *OVER, "MFLOP a token", "minutes")
    lines = [line(*head), rule(len(head))]
    full = [its for name, its in models.items() if name in BASELINES]
    n_full = next(iter(full[0].values()))[0]["parameters"] if full else None
    for name in sorted(models, key=lambda name: mean_loss(models[name])):
        its = models[name]
        first = next(iter(its.values()))[0]
        last = [rows[-1] for _, rows in its.values()]
        share = f" ({100 * (first['parameters'] / n_full - 1):+.2f}%)" if n_full else ""
        lines.append(
            line(
                f"`{name}`",
                about[name],
                f"{first['parameters']:,}{share}",
                str(first["train"]["lr"]),
                str(len(its)),
                cell([end["val_loss"] for end in last], ".4f"),
                f"{mean(end['val_bpb'] for end in last):.4f}",
                *over_baselines(name, models),
                f"{flops(first) / 1e6:.2f}",
                f"{mean(end['elapsed_s'] for end in last) / 60:.1f}",
            )
        )
    return lines


def corpus_section(title, models, about):
    """A heading, what was run on what, and the table."""
    heads = [head for its in models.values() for head, _ in its.values()]
    usual = min(heads, key=lambda head: head["model"]["n_layer"])
    model, train = usual["model"], usual["train"]
    devices, versions = ({head[key] for head in heads} for key in ("device", "torch"))
    return [
        f"## {title}",
        "",
        f"{model['n_layer']} layers, {model['n_embd']} wide, T = {model['block_size']}, batch "
        f"{train['batch_size']}, {train['steps']:,} steps; {len(heads)} runs on "
        f"{', '.join(sorted(devices))}, torch {', '.join(sorted(versions))}.",
        "",
        *corpus_table(models, about),
        "",
    ]


def together(*scales):
    """The logs of several scales in one: corpus -> model -> seed -> log."""
    every = {}
    for logs in scales:
        for corpus, models in logs.items():
            every.setdefault(corpus, {}).update(models)
    return every


def distances(name, logs, other=BASELINES[1]):
    """% over another model, by default rotary softmax: a list of the seeds' for each corpus."""
    return [excess(models.get(name, {}), models.get(other, {})) for models in logs.values()]


def mean_distance(over):
    """The mean over corpora of the means over seeds; 0 where there is no run. over: distances()."""
    known = [mean(values) for values in over if values]
    return mean(known) if known else 0


def distance_cells(over):
    """Cells of distances(): mean and interval, in brackets the number of seeds."""
    return [f"{cell(v, '+.2f')} ({len(v)})" if v else "-" for v in over]


def summary_section(scale, logs, about):
    """A row a model, a column a corpus: its distance to rotary softmax, the best mean first."""
    over = {
        name: distances(name, logs)
        for name in dict.fromkeys(name for models in logs.values() for name in models)
        if name != BASELINES[1]
    }

    def rank(name):  # what has no run on a corpus comes after all that have one on each
        return over[name].count([]), mean_distance(over[name])

    lines = [
        f"## All corpora, {scale} scale",
        "",
        f"{OVER[1]}, over the seeds that both have, whose number is in brackets.",
        "",
        line("name", "model", *logs),
        rule(2 + len(logs)),
    ]
    for name in sorted(over, key=rank):
        lines.append(line(f"`{name}`", about[name], *distance_cells(over[name])))
    return [*lines, ""]


BESIDE = (  # pairs of rows that the pages compare with each other
    ("vec-in", "ab-in"),
    ("matrix-in", "ab-in"),
    ("gate1-in", "ab-in"),
    ("gate2-in", "ab-in"),
    ("fusion-in", "ab-in"),
    ("mult-in", "ab-in"),
    ("ab-in-4C", "ab-in"),
    ("ab-in-layer", "ab-in"),
    ("ab-in-linear", "ab-in-layer"),
    ("hybrid-2nd", "hybrid-middle"),
    ("hybrid-short", "hybrid-deep"),
    ("hybrid-deep", "softmax-deep"),
)


def beside_section(logs):
    """A row for each of BESIDE, a column a corpus."""
    lines = [
        "## Side by side, cpu scale",
        "",
        "How much higher the first is than the second, in %, over the seeds that both have.",
        "",
        line("first", "second", *logs),
        rule(2 + len(logs)),
    ]
    for one, other in BESIDE:
        cells = distance_cells(distances(one, logs, other))
        lines.append(line(f"`{one}`", f"`{other}`", *cells))
    return [*lines, ""]


def tried_section(logs, grid, about):
    """What was tried, mostly on one seed, beside the grid's rows that it is to be compared with."""
    lines = []
    for corpus, models in logs.items():
        seeds = {seed for its in models.values() for seed in its}
        beside = {
            name: {seed: log for seed, log in its.items() if seed in seeds}
            for name, its in grid.get(corpus, {}).items()
            if name in (*BASELINES, "ab-in", "vec-in", "vec-deep", "hybrid-deep")
        }
        every = {**models, **{name: its for name, its in beside.items() if its}}
        lines += corpus_section(f"Tried on {corpus}", every, about)
    return lines


def sweep_section(logs, about):
    """The learning-rate sweep: a row a model and corpus, a column a rate, the lowest mean in bold.

    logs: as above, but with "CORPUS-lr-RATE" for corpora.
    """
    table = {}  # (corpus, model) -> rate -> the losses of its seeds
    for name, models in logs.items():
        corpus, rate = name.split("-lr-")
        for model, its in models.items():
            table.setdefault((corpus, model), {})[rate] = list(last_losses(its).values())
    rates = sorted({name.split("-lr-")[1] for name in logs}, key=float)
    head, _ = next(iter(next(iter(next(iter(logs.values())).values())).values()))
    steps = head["train"]["steps"]
    lines = [
        "## Learning rates",
        "",
        f"Loss after {steps:,} steps with their own cosine: of one seed, or the mean of as many as",
        "stand in brackets.",
    ]
    lines += ["", line("corpus", "model", *rates), rule(len(rates) + 2)]
    for (corpus, model), losses in sorted(table.items()):
        best = min(losses, key=lambda rate: mean(losses[rate])) if len(losses) > 1 else None
        cells = []
        for rate in rates:
            its = losses.get(rate, [])
            text = f"{mean(its):.4f}" if its else "-"
            count = f" ({len(its)})" if len(its) > 1 else ""
            cells.append(f"**{text}**{count}" if rate == best else text + count)
        lines.append(line(corpus, about[model], *cells))
    return [*lines, ""]


def best_of(names, logs):
    """The one of most seeds and, of these, nearest to rotary softmax or farthest ahead of it.

    Most seeds on the corpus where it has fewest: a lucky single one is no winner.
    """

    def rank(name):
        its = distances(name, logs)
        return -min(map(len, its)), mean_distance(its), name

    return min(names, key=rank)


def claims_table(logs, about):
    """The README's rows: of each corpus the baselines, the best HSM alone, the best hybrid.

    The best over all corpora, so that a row of one is the same model as that of another.
    """
    head = ("corpus", "model", "seeds", "loss, nats a token", *OVER)
    lines = [line(*head), rule(len(head))]
    mixers = {  # of each model
        name: set(next(iter(its.values()))[0]["model"]["mixers"].split(","))
        for models in logs.values()
        for name, its in models.items()
    }
    pure = [name for name, its in mixers.items() if "softmax" not in its]
    hybrid = [name for name, its in mixers.items() if {"softmax"} < its]
    best = [best_of(names, logs) for names in (pure, hybrid) if names]
    for corpus, models in logs.items():
        for name in (*BASELINES, "softmax-deep", *best):
            if name in models:
                its = models[name]
                loss = cell(list(last_losses(its).values()), ".4f")
                over = over_baselines(name, models)
                lines.append(line(corpus, about[name], str(len(its)), loss, *over))
    return lines


def between_marks(text, name, lines):
    """text with what stands between its <!-- name --> and <!-- /name --> replaced by lines."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, first, rest = text.partition(begin)
    _, second, after = rest.partition(end)
    if not first or not second:
        raise BadInput(f"the page has lost its marks {begin} and {end}: put them back")
    return "\n".join([f"{before}{begin}", "", *lines, "", f"{end}{after}"])


# ------------------------------------------------------------------------------------------------
# Pictures

STYLES = {  # colours that colour-blind eyes tell apart
    "softmax-learned": ("#000000", "--"),
    "softmax-rope": ("#000000", "-"),
    "softmax-deep": ("#8c8c8c", "-"),
    "ab-in": ("#0072b2", "-"),
    "vec-deep": ("#56b4e9", "-"),
    "hybrid-3rd": ("#e69f00", "-"),
    "hybrid-deep": ("#d55e00", "-"),
}


def mean_curve(logs, x):
    """(xs, losses), means over some logs. x(row) says where on the axis a row is."""
    xs = np.mean([[x(row) for row in rows] for _, rows in logs], axis=0)
    return xs, np.mean([[row["val_loss"] for row in rows] for _, rows in logs], axis=0)


def finish(axes, logs):
    """Titles, scales and grids that both pictures share. The losses' first point is left out."""
    for column, (corpus, models) in zip(axes.T, logs.items(), strict=True):
        column[0].set_title(corpus)
        for panel in column:
            panel.grid(alpha=0.3, which="both")
        losses = [
            row["val_loss"] for its in models.values() for _, rows in its.values() for row in rows
        ]
        for panel in column if axes[1, 0].get_ylabel() == axes[0, 0].get_ylabel() else column[:1]:
            panel.set_yscale("log")
            panel.set_ylim(0.98 * min(losses), 1.6 * min(losses))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("{x:.3g}")
    lines = {line.get_label(): line for panel in axes[0] for line in panel.get_lines()}
    axes[0, 0].figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=2)


def draw_curves(logs, figure, about):
    """A column a corpus: loss by steps; under it, how far over rotary softmax, in %."""
    axes = figure.subplots(2, len(logs), squeeze=False, sharex="col")
    for (upper, lower), models in zip(axes.T, logs.values(), strict=True):
        zero = models.get("softmax-rope", {})
        for name, (colour, style) in STYLES.items():
            its = models.get(name)
            if not its:
                continue
            steps, losses = mean_curve(its.values(), lambda row: row["step"])
            upper.plot(steps[1:], losses[1:], style, color=colour, label=about[name])
            both = [(its[seed][1], zero[seed][1]) for seed in its if seed in zero]
            if not both:
                continue
            over = np.array(
                [
                    [100 * (a["val_loss"] / b["val_loss"] - 1) for a, b in zip(*pair, strict=True)]
                    for pair in both
                ]
            )[:, 1:]
            lower.plot(steps[1:], over.mean(axis=0), style, color=colour)
            lower.fill_between(
                steps[1:], over.min(axis=0), over.max(axis=0), color=colour, alpha=0.2, lw=0
            )
        lower.set_xlabel("steps")
    axes[0, 0].set_ylabel("validation loss, nats a token")
    axes[1, 0].set_ylabel("% over rotary softmax\n(band: lowest to highest seed)")
    finish(axes, logs)


def draw_compute(logs, figure, about):
    """A column a corpus: loss by floating-point operations; under it, by seconds."""
    axes = figure.subplots(2, len(logs), squeeze=False)
    for (upper, lower), models in zip(axes.T, logs.values(), strict=True):
        for name, (colour, style) in STYLES.items():
            its = models.get(name)
            if not its:
                continue
            head = next(iter(its.values()))[0]
            train = head["train"]
            tokens = train["batch_size"] * train["grad_accum"] * head["model"]["block_size"]
            a_step = tokens * flops(head) / 1e12
            for panel, x in (
                (upper, lambda row, a_step=a_step: row["step"] * a_step),
                (lower, lambda row: row["elapsed_s"]),
            ):
                xs, losses = mean_curve(its.values(), x)
                panel.plot(xs[1:], losses[1:], style, color=colour, label=about[name])
        upper.set_xlabel("10¹² floating-point operations")
        lower.set_xlabel("seconds, evaluations included")
    for panel in axes[:, 0]:
        panel.set_ylabel("validation loss, nats a token")
    finish(axes, logs)


def save_picture(draw, data, path, size):
    """draw(data, figure) to path, unless the picture there is of the same data by the same code.

    Other versions of matplotlib make other bytes, and a reader's command must not change ours.
    """
    from matplotlib.figure import Figure  # here, because it takes a second

    code = inspect.getsource(draw.func if isinstance(draw, partial) else draw)
    code += Path(__file__).read_text(encoding="utf-8").partition("\n# Pictures\n")[2]
    digest = hashlib.sha256(repr((data, code, size)).encode()).hexdigest()
    if path.is_file() and digest.encode() in path.read_bytes():
        return
    figure = Figure(figsize=size, layout="constrained")
    draw(data, figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100, metadata={"Description": digest})
