"""Colours that the examples share, and the picture of the long-tailed one."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

# Okabe and Ito's colours, distinct to colour-blind readers and in grey.
WITHOUT, WITH, SIZES = "#E69F00", "#0072B2", "#DDDDDD"


def draw_accuracy(path: Path, results: dict[str, dict[bool, np.ndarray]], counts: list[int], imbalance: int) -> Path:
    """Accuracy per class over class sizes, a panel for every loss.

    ``results[loss][with BatchFormer]`` is (seeds, classes), in percent.
    """
    fig, axes = plt.subplots(
        len(results), 1, figsize=(6.6, 0.4 + 2.3 * len(results)), layout="constrained", sharex=True, squeeze=False
    )
    ranks = np.arange(len(counts))
    for ax, (loss, accuracy) in zip(axes[:, 0], results.items(), strict=True):
        sizes = ax.twinx()
        sizes.bar(ranks, counts, color=SIZES, width=0.8)
        sizes.set_ylabel("training images (bars)", color="#666666")
        sizes.tick_params(axis="y", colors="#666666")
        ax.set_zorder(sizes.get_zorder() + 1)
        ax.patch.set_visible(False)
        for arm, colour, marker, shift in ((False, WITHOUT, "s", -0.1), (True, WITH, "o", 0.1)):
            values = accuracy[arm]
            error = values.std(axis=0, ddof=1) / len(values) ** 0.5
            label = "with BatchFormer" if arm else "without"
            ax.errorbar(
                ranks + shift, values.mean(0), error, color=colour, marker=marker, capsize=3, lw=1.8, label=label
            )
        ax.set_ylabel("test accuracy, percent")
        ax.set_ylim(0, 104)
        ax.set_title(loss, fontsize=10)
    axes[-1, 0].set_xticks(ranks, [str(n) for n in counts])
    axes[-1, 0].set_xlabel("classes by number of training images")
    axes[0, 0].legend(loc="lower left", frameon=True)
    fig.suptitle(f"imbalance {imbalance}: mean and standard error of {len(values)} seeds", fontsize=10)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path
