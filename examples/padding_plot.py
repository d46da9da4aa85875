"""The results of the padding experiment as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from .padding_schemes import SCHEMES
from .small_vlm import POSITIONS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend has to be chosen first)

COLORS = {"as_trained": "#3b76af", "alone": "#ef8636"}
NAMES = {"as_trained": "prompts formatted as in training", "alone": "prompts alone, no padding"}


def draw_results(path: Path, lines: list[dict]) -> None:
    """Accuracy by scheme, a bar from the worst seed to the best, and training speed beside it."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), width_ratios=(2, 2, 1.2))
    names = [SCHEMES[line["scheme"]] for line in lines if line["positions"] == POSITIONS[0]]
    places = range(len(names))
    for axis, positions in zip(axes, POSITIONS):
        own = [line for line in lines if line["positions"] == positions]
        for offset, name in ((-0.17, "as_trained"), (0.17, "alone")):
            means = [100 * line[name][0] for line in own]
            reach = [[100 * (line[name][0] - line[name][1]) for line in own], [100 * (line[name][2] - line[name][0]) for line in own]]
            axis.barh([place + offset for place in places], means, height=0.32, color=COLORS[name], label=NAMES[name], xerr=reach, error_kw=dict(lw=1, capsize=2))
        axis.axvline(100 * own[0]["guessing"][0], color="black", lw=1, ls=":", label="the words alone, no image seen")
        axis.set_title(f"{positions} positions", fontsize=10)
        axis.set_xlabel("right answers, % (line: worst to best seed)", fontsize=8)
        axis.set_yticks(places, names if axis is axes[0] else [""] * len(names), fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="lower center", ncols=3, frameon=False)
    for offset, positions, color in ((-0.17, POSITIONS[0], "#6a6a6a"), (0.17, POSITIONS[1], "#b5b5b5")):
        own = [line for line in lines if line["positions"] == positions]
        bars = axes[2].barh([place + offset for place in places], [line["tokens_per_second"] / 1000 for line in own], height=0.32, color=color)
        axes[2].bar_label(bars, [f" {positions}, {100 * line['useful']:.0f} % useful" for line in own], fontsize=6)
    axes[2].set_yticks(places, [""] * len(names))
    axes[2].invert_yaxis()
    axes[2].margins(x=0.8)
    axes[2].set_title("training speed", fontsize=10)
    axes[2].set_xlabel("thousand useful tokens a second", fontsize=8)
    figure.tight_layout(rect=(0, 0.07, 1, 1))  # the legend is below
    figure.savefig(path, dpi=100)
    plt.close(figure)
