"""Draw assets/ladder.png: how five layers of one shift each reach 32 tokens.

python assets/ladder.py
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from hsm import GPTConfig, receptive_field  # noqa: E402

N_LAYER, DISTANCE = 5, 13
GREY, BLUE, ORANGE = "#9a9a9a", "#0072b2", "#d55e00"  # told apart by colour-blind eyes


def draw_tree(axes, shifts):
    """Which inputs reach the last output, and by which stays and shifts."""
    ends = {0}  # distances of the nodes above a layer; the output is the root
    for level in reversed(range(len(shifts))):
        s = shifts[level]
        for k in ends:
            axes.plot([-k, -k], [level + 1, level], color=GREY, lw=0.8, zorder=1)
            axes.plot([-k, -k - s], [level + 1, level], color=GREY, lw=0.8, zorder=1)
        axes.scatter([-k for k in ends], [level + 1] * len(ends), s=14, color=GREY, zorder=2)
        ends = ends | {k + s for k in ends}
    axes.scatter([-k for k in ends], [0] * len(ends), s=14, color=GREY, zorder=2)

    path = [DISTANCE]  # upward: a bit of 1 shifts, a bit of 0 stays
    for level, s in enumerate(shifts):
        path.append(path[-1] - s * (DISTANCE >> level & 1))
    axes.plot([-k for k in path], range(len(path)), "o-", color=ORANGE, lw=2.5, ms=5, zorder=3)
    for level, s in enumerate(shifts):
        bit = DISTANCE >> level & 1
        axes.text(
            1, level + 0.5, f"layer {level}: s = {s:2}, bit {bit}: {'shift' if bit else 'stay'}",
            va="center", color=ORANGE if bit else "black",
        )  # fmt: skip
    axes.set(
        title=f"One path to each distance, its binary digits: {DISTANCE} = {DISTANCE:0{N_LAYER}b}b",
        yticks=[0, len(shifts)],
        yticklabels=["input x", "output"],
        xticks=[-31, -24, -16, -8, 0],
    )


def draw_fields(axes, configs):
    """The tokens that the last output of a layer depends on."""
    for row, config in enumerate(configs):
        field = receptive_field(config)
        assert (field == 1).all()  # the claim: each distance, by exactly one path
        axes.barh([row] * len(field), 0.9, left=[-k - 0.45 for k in range(len(field))], color=BLUE)
        axes.text(1, row, f"{len(field)} tokens", va="center")
    axes.set(
        title="Receptive field of the last token, layer by layer",
        xlabel="position relative to the last token (tokens)",
        yticks=range(len(configs)),
        yticklabels=[f"layer {row}" for row in range(len(configs))],
        xticks=[-31, -24, -16, -8, 0],
    )


def main():
    configs = [
        GPTConfig(n_layer=n, shifts="layer", block_size=2**N_LAYER) for n in range(1, N_LAYER + 1)
    ]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8.5, 6.2), height_ratios=[3, 2], layout="constrained", sharex=True
    )
    draw_tree(top, [s for _, (s,) in configs[-1].layers])
    draw_fields(bottom, configs)
    for axes in (top, bottom):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(-32, 10)
    figure.savefig(HERE / "ladder.png", dpi=110)


if __name__ == "__main__":
    main()
