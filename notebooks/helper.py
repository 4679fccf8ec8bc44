"""What the notebooks share: the look of the pictures, the drawings that need more than a few lines,
a text that every Python has at hand, and a training run that prints nothing.

    python notebooks/helper.py       draws assets/ladder.png for the README
"""

import io
import os
import sys
import sysconfig
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image
from matplotlib.figure import Figure
from PIL import Image as Pixels

TEMPORARY = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # gone when the kernel ends
SMOKE = bool(os.environ.get("SMOKE"))  # a quick look that everything runs: too short to learn
# Okabe and Ito's colours, which colour-blind eyes tell apart.
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
SKY, AMBER, GREY = "#56b4e9", "#e69f00", "#9a9a9a"
COLORS = [ORANGE, GREY, BLUE, GREEN, PINK, SKY, AMBER, "black"]

plt.rcParams |= {
    "figure.figsize": (8, 3.6),
    "figure.dpi": 100,  # 800 pixels wide
    "figure.facecolor": "white",  # opaque, so that a dark page shows the same picture
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
}

# ---- Text and training ---------------------------------------------------------------------------


def short(steps):
    """The number of training steps: `steps`, or next to none under SMOKE."""
    return 3 if SMOKE else steps


def text(n_bytes=400_000):
    """Prepare the first n_bytes of Python's own library, by name, in a folder. Returns it."""
    import prepare_data  # here, as train below: a notebook that reads no text starts sooner

    root, source = Path(sysconfig.get_path("stdlib")), b""
    for name in sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py")):
        if len(source) < n_bytes:
            source += (root / name).read_bytes().replace(b"\r\n", b"\n")
    folder = Path(tempfile.mkdtemp(dir=TEMPORARY.name))
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # the progress bars
        (folder / "part.txt").write_bytes(source[:n_bytes].decode("utf-8", "ignore").encode())
        prepare_data.prepare("file", str(folder / "part.txt"), "byte", str(folder))
    return str(folder)


def quiet_train(config):
    """train.train without its words, into a temporary folder. Returns its Result."""
    import train

    config = replace(config, out=tempfile.mkdtemp(dir=TEMPORARY.name), sample_tokens=0)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return train.train(config)


# ---- Pictures: still, animated, to be moved ------------------------------------------------------


def png(figure, dpi=100):
    """A figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    plt.close(figure)
    return file.getvalue()


def show(figure, alt):
    """A finished figure as a cell's answer. alt: what it shows, for who can't see it."""
    return Image(png(figure), alt=alt)


def drawn(draw, frame, size, dpi=100):
    """draw(figure, frame) as the bytes of a PNG file."""
    figure = Figure(figsize=size)
    draw(figure, frame)
    return png(figure, dpi)


def animate(draw, frames, alt, size=(8, 3.6), seconds=1.0):
    """An animated PNG of draw(figure, frame) for each frame; where nothing moves, the first.

    No widget, no script: a code host shows it too.
    """
    pixels = []
    for frame in frames:
        picture = Pixels.open(io.BytesIO(drawn(draw, frame, size, 90))).convert("RGB")
        palette = pixels[0] if pixels else picture.quantize(10)  # one for all: only changes count
        pixels.append(picture.quantize(palette=palette, dither=Pixels.Dither.NONE))
    file = io.BytesIO()
    pixels[0].save(
        file, "PNG", save_all=True, append_images=pixels[1:], duration=1000 * seconds, loop=0
    )
    return Image(file.getvalue(), alt=alt)


def move(draw, still, size=(8, 3.6), **controls):
    """draw(figure, values) with a control for each of its values, where a page has widgets.

    controls: name -> a range (a slider, and a button that plays it and pauses), a list of choices,
    or a text. Elsewhere, as on a code host or where the notebook runs without a page, `still`.
    """
    if "JPY_SESSION_NAME" not in os.environ and "google.colab" not in sys.modules:
        return still
    import ipywidgets as widgets

    inputs, rows, image = {}, [], widgets.Image(format="png")
    for name, values in controls.items():
        label = name.replace("_", " ")
        layout = {"description": label, "style": {"description_width": "initial"}}
        if isinstance(values, range):
            ends = {"min": values[0], "max": values[-1], "value": values[-1]}
            box, play = widgets.IntSlider(**ends, **layout), widgets.Play(**ends, interval=1000)
            widgets.jslink((play, "value"), (box, "value"))
            rows.append(widgets.HBox([play, box]))
        else:
            kind = widgets.Text if isinstance(values, str) else widgets.Dropdown
            more = {"value": values} if isinstance(values, str) else {"options": values}
            box = kind(**more, **layout)
            rows.append(box)
        inputs[name] = box

    def redraw(_=None):
        values = {name: box.value for name, box in inputs.items()}
        image.value = drawn(lambda figure, v: draw(figure, **v), values, size)

    for box in inputs.values():
        box.observe(redraw, "value")
    redraw()
    return widgets.VBox([*rows, image])


def lines(axes, curves, **fields):
    """Draw {name: (x, y)} as lines with dots. fields: title, xlabel .. as axes.set takes them."""
    for (name, (x, y)), color in zip(curves.items(), COLORS, strict=False):
        axes.plot(x, y, "o-", color=color, label=name, lw=2, ms=4)
    axes.set(**fields)
    axes.legend(fontsize=9)


# ---- The drawings --------------------------------------------------------------------------------


def draw_ladder(figure, distance=13, shifts="1, 2, 4, 8"):
    """All ways through layers of these shifts to the last output; the ways from one distance."""
    axes = figure.subplots()
    axes.grid(False)
    try:
        shifts = [int(word) for word in shifts.split(",")]
        good = len(shifts) <= 7 and min(shifts) >= 1 and sum(shifts) <= 127
    except ValueError:
        good = False
    if not good:
        axes.text(0.5, 0.5, "1 to 7 shifts from 1, with commas, of 127 together", ha="center")
        return
    ways = list(product((0, 1), repeat=len(shifts)))
    counts = np.bincount([np.dot(way, shifts) for way in ways])  # entry k: ways to distance k
    ends = {0}  # distances that lead to the last output, from the top layer down
    for level, s in reversed(list(enumerate(shifts))):
        for k in ends:
            axes.plot([-k, -k], [level + 1, level], color=GREY, lw=0.8)
            axes.plot([-k, -k - s], [level + 1, level], color=GREY, lw=0.8)
        ends |= {k + s for k in ends}
    for k, n in enumerate(counts):
        axes.plot(-k, 0, "o", ms=4, color=GREY if n else "white", mec=GREY if n else "black")
        if n > 1:
            axes.text(-k, -0.15, n, color=PINK, ha="center", va="top", fontsize=9, weight="bold")
    paths = [way for way in ways if np.dot(way, shifts) == distance]
    for way in paths:
        places = distance - np.cumsum([0, *np.multiply(way, shifts)])  # from the input up
        axes.plot(-places, range(len(places)), "o-", color=ORANGE, lw=3, ms=7)
    for level, s in enumerate(shifts):
        word, color = f"layer {level}, s = {s}", "black"
        if len(paths) == 1:
            word += f":  {paths[0][level]}  " + ("shift" if paths[0][level] else "stay")
            color = ORANGE if paths[0][level] else "black"
        axes.text(0.04 * len(counts), level + 0.5, word, color=color, va="center")
    digits = f" = {distance:0{len(shifts)}b} in binary"
    binary = shifts == [2**j for j in range(len(shifts))]
    words = {0: f"No path from {distance} back", 1: f"The only path from {distance} back"}
    title = words.get(len(paths), f"{len(paths)} paths from {distance} back")
    title += f": {distance}{digits}" if binary and len(paths) == 1 else ""
    axes.set(
        title=f"{title} ({(counts == 0).sum()} holes)" if (counts == 0).any() else title,
        xlabel="place before the last token (tokens)",
        xlim=(-len(counts) + 0.5, 0.37 * len(counts)),
        xticks=range(-len(counts) + 1, 1, 1 + len(counts) // 20),
        ylim=(-0.6, len(shifts) + 0.3),
        yticks=[0, len(shifts)],
        yticklabels=["input", "output"],
    )
    axes.spines["left"].set_visible(False)


def draw_paths(figure, schedules):
    """{name: number of paths for each distance} as areas, two a row."""
    panels = figure.subplots((len(schedules) + 1) // 2, 2)
    for axes, (name, paths), color in zip(panels.flat, schedules.items(), COLORS, strict=False):
        axes.fill_between(range(len(paths)), paths, step="mid", color=color)
        axes.set_title(f"{name}\nreach {len(paths) - 1}, {paths.sum():,} paths", fontsize=10)
        axes.set(ylim=(0, 1.1 * max(paths)), xlabel="distance (tokens)", ylabel="paths")


def draw_dependence(figure, seen, average):
    """How much the last output depends on each distance: {(mixers, kind): (T,)}, a panel each.

    average: the same for softmax layers that weigh all they see alike, a line over "random".
    """
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, ((mixers, kind), strength) in zip(panels.flat, seen.items(), strict=True):
        ones = np.array([k.bit_count() for k in range(len(strength))])  # layers that must shift
        axes.set(title=f"{mixers}, {kind}", yscale="log", ylim=(1e-5, 3))
        for n, color in enumerate([BLUE, SKY, GREEN, AMBER, ORANGE, PINK, GREY]):
            some = np.flatnonzero(ones == n)
            color = color if mixers == "ab" else GREY
            label = n if n < 6 else None
            axes.scatter(some, (strength / max(strength))[some], color=color, s=22, label=label)
        if (mixers, kind) == ("softmax", "random"):
            axes.plot(average / max(average), color="black", lw=1)
            axes.text(2, 2e-4, "black: layers that weigh\nall they see alike", fontsize=9)
    panels[0, 0].text(33, 1e-3, "nothing from here on:\nthe reach is 31", fontsize=9)
    panels[1, 0].legend(title="shifts on the path", ncols=2, fontsize=8, title_fontsize=8)
    figure.supxlabel("distance (tokens)", fontsize=10)
    figure.supylabel("dependence (share of largest)", fontsize=10)


def draw_taps(figure, sizes, costs, shifts, silenced=None):
    """|a|, |b| of each layer above, and below what its silence costs. silenced: such as "b 2".

    sizes, costs: {"a": a number a layer, "b": ..}.
    """
    panels = figure.subplots(2, 1, sharex=True)
    for tap, side, color in (("a", -0.2, BLUE), ("b", 0.2, ORANGE)):
        word = "a: the token itself" if tap == "a" else "b: the token s back"
        places = np.arange(len(shifts)) + side
        for axes, heights in zip(panels, (sizes[tap], costs[tap]), strict=True):
            bars = axes.bar(places, np.maximum(heights, 2e-4), 0.36, color=color, label=word)
            if silenced and silenced[0] == tap:
                bars[int(silenced[2:])].set(edgecolor="black", linewidth=2.5)
    if silenced:
        cost = costs[silenced[0]][int(silenced[2:])]
        panels[0].set_title(f"without {silenced[0]} of layer {silenced[2:]}: {cost:+.3f} nats")
    panels[0].set(ylabel="mean size")
    panels[1].set(ylabel="what its silence\ncosts (nats)", yscale="log")
    panels[1].set_xticks(range(len(shifts)), [f"layer {j}\ns = {s}" for j, s in enumerate(shifts)])
    panels[0].legend(fontsize=9, loc="upper right")


def draw_rings(figure, token, stories):
    """What rings hold after a token: stories[s] lists (z, the ring's numbers), an entry a token."""
    for axes, (s, story) in zip(figure.subplots(1, len(stories)), stories.items(), strict=True):
        z, ring = story[token]
        for slot, number in enumerate(ring):
            angle = 2 * np.pi * slot / s
            x, y = (np.sin(angle), np.cos(angle)) if s > 1 else (0, 0)
            used = slot == token % s
            color = ORANGE if used else "#dddddd" if number is None else BLUE
            axes.add_patch(plt.Circle((x, y), 0.33, color=color))
            word = "" if number is None else number
            axes.text(x, y, word, color="white", ha="center", va="center", weight="bold")
        axes.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal")
        came = "nothing yet" if z is None else f"token {z}"
        axes.set_title(f"s = {s}\nx = token {token},\nz = {came}", fontsize=11)
        axes.axis("off")
    figure.suptitle(f"Token {token} has passed: what the rings hold (token numbers)")


def main():
    figure = Figure(figsize=(8.5, 6.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3, 2])
    draw_ladder(top, 13, "1,2,4,8,16")
    axes = bottom.subplots()
    for row in range(5):
        axes.barh([row] * 2 ** (row + 1), 0.9, left=-np.arange(2 ** (row + 1)) - 0.45, color=BLUE)
        axes.text(1, row, f"{2 ** (row + 1)} tokens", va="center")
    axes.set(
        title="What the last output of each layer depends on",
        xlabel="place before the last token (tokens)",
        yticks=range(5),
        yticklabels=[f"layer {row}" for row in range(5)],
        xlim=(-31.5, 12),
    )
    figure.savefig(Path(__file__).resolve().parent.parent / "assets" / "ladder.png", dpi=110)


if __name__ == "__main__":
    main()
