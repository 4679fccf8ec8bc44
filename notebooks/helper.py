"""What the notebooks share, so that none of them writes it twice: the look of the pictures, a text
that every Python has at hand, and a training run that prints nothing."""

import io
import os
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import Image
from PIL import Image as Pixels

import prepare_data
import train

TEMPORARY = tempfile.TemporaryDirectory()  # gone when the notebook's kernel ends
SMOKE = bool(os.environ.get("SMOKE"))  # a quick look that everything runs: too short to learn
# Okabe and Ito's colours, which colour-blind eyes tell apart.
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
SKY, AMBER, GREY = "#56b4e9", "#e69f00", "#9a9a9a"

plt.rcParams |= {
    "figure.figsize": (8, 3.6),
    "figure.dpi": 100,  # 800 pixels wide
    "figure.facecolor": "white",  # opaque, so that a dark page shows the same picture
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


def short(steps):
    """The number of training steps: `steps`, or next to none under SMOKE."""
    return 3 if SMOKE else steps


def text(n_bytes=400_000):
    """Prepare the first n_bytes of Python's own library, in a temporary folder. Returns it."""
    folder = Path(tempfile.mkdtemp(dir=TEMPORARY.name))
    prepare_data.write_stdlib(folder / "all.txt")
    part = (folder / "all.txt").read_bytes()[:n_bytes].decode("utf-8", "ignore")
    (folder / "all.txt").unlink()
    (folder / "part.txt").write_text(part, encoding="utf-8")
    with redirect_stderr(io.StringIO()):  # the progress bars
        prepare_data.prepare("file", folder / "part.txt", "byte", folder)
    return str(folder)


def quiet_train(config):
    """train.train without its words, into a temporary folder. Returns its Result."""
    config = replace(config, out=tempfile.mkdtemp(dir=TEMPORARY.name), sample_tokens=0)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return train.train(config)


def animate(draw, frames, size=(8, 3.6), seconds=1.0):
    """An animated PNG of draw(figure, frame) for each frame; where nothing moves, the first.

    No widget, no script: a code host shows it too.
    """
    pixels = []
    for frame in frames:
        figure = plt.figure(figsize=size)
        draw(figure, frame)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=90)
        plt.close(figure)
        picture = Pixels.open(file).convert("RGB")
        palette = pixels[0] if pixels else picture.quantize(10)  # one for all: only changes count
        pixels.append(picture.quantize(palette=palette, dither=Pixels.Dither.NONE))
    file = io.BytesIO()
    pixels[0].save(
        file, "PNG", save_all=True, append_images=pixels[1:], duration=1000 * seconds, loop=0
    )
    return Image(file.getvalue())
