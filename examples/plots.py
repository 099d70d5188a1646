"""The two pictures of the long-tailed example."""

from __future__ import annotations

from itertools import pairwise
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
        len(results), 1, figsize=(7.5, 0.4 + 3.1 * len(results)), layout="constrained", sharex=True, squeeze=False
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
        ax.set_title(f"{loss}, imbalance {imbalance}: mean and standard error of {len(values)} seeds", fontsize=10)
    axes[-1, 0].set_xticks(ranks, [str(n) for n in counts])
    axes[-1, 0].set_xlabel("classes by number of training images")
    axes[0, 0].legend(loc="lower left", frameon=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path


def draw_relations(path: Path, weights: np.ndarray, labels: np.ndarray) -> Path:
    """Who attends to whom: (N, N) attention of one batch, samples sorted by class."""
    fig, ax = plt.subplots(figsize=(6.2, 5.4), layout="constrained")
    image = ax.imshow(weights * len(labels), cmap="viridis", interpolation="nearest")
    classes, first = np.unique(labels, return_index=True)
    edges = [*first, len(labels)]
    for edge in edges[1:-1]:
        ax.axhline(edge - 0.5, color="white", lw=0.7)
        ax.axvline(edge - 0.5, color="white", lw=0.7)
    middles = [(a + b - 1) / 2 for a, b in pairwise(edges)]
    ax.set_xticks(middles, [str(c + 1) for c in classes])
    ax.set_yticks(middles, [str(c + 1) for c in classes])
    ax.set_xlabel("attended sample, by rank of its class (1 = most images)")
    ax.set_ylabel("attending sample, by rank of its class")
    ax.set_title("Sample relations in one batch of test images")
    fig.colorbar(image, label="attention times batch length (1 = even)")
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path
