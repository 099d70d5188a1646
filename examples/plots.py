"""Colours that the examples share, and the picture of the long-tailed one."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from comparison import Mean

# Okabe and Ito's colours, distinct to colour-blind readers and in grey.
WITHOUT, WITH = "#E69F00", "#0072B2"
LOSSES = ("#56B4E9", WITH, "#009E73")
PUBLISHED = ("#555555", "#888888", "#BBBBBB")


def draw_gains(
    path: Path,
    rows: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]],
    published: dict[str, dict[str, tuple[float, float]]],
) -> Path:
    """Points gained by group of classes: here, with intervals, and in the authors' tables.

    Args:
        rows: (seeds,) accuracies without and with BatchFormer, by loss and group.
        published: the same of single runs, by setting and group.
    """
    fig, (here, there) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    seeds = 0
    for ax, settings, colours in ((here, rows, LOSSES), (there, published, PUBLISHED)):
        names = list(next(iter(settings.values())))
        width = 0.8 / len(settings)
        for i, ((setting, accuracy), colour) in enumerate(zip(settings.items(), colours, strict=False)):
            places = np.arange(len(names)) + (i - (len(settings) - 1) / 2) * width
            differences = [np.subtract(*accuracy[name][::-1]) for name in names]
            means = [np.mean(d) for d in differences]
            ax.bar(places, means, 0.92 * width, color=colour, label=setting)
            if ax is here:
                seeds = len(differences[0])
                halves = [Mean.of(d).half for d in differences]
                ax.errorbar(places, means, halves, color="black", ls="", capsize=3, lw=1.2)
        ax.axhline(0, color="black", lw=0.8)
        ax.set_xticks(range(len(names)), names)
        ax.set_xlabel("classes, by number of training images")
        ax.legend(fontsize=8, loc="upper left")
    here.set_ylabel("points gained by BatchFormer")
    here.set_title(f"here: mean and 95 % interval of {seeds} seeds", fontsize=10)
    there.set_title("reported by the authors: large networks, one run each", fontsize=10)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path
