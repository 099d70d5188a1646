"""Contrastive learning on handwritten digits, with and without BatchFormer.

    python examples/contrastive.py [--out DIR] [--seeds N] [--device auto|cpu|cuda] [--quick]

MoCo v3 in small: two augmented views of every image, a momentum encoder that makes the keys, InfoNCE over the batch,
symmetric over the views. BatchFormer stands before the projector, as in the paper's code, and only while the encoder is
trained, without labels. Then a linear probe: logistic regression on the frozen features, with few labels and with all.
Prints accuracies and paired differences with their intervals, saves a picture.
"""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from comparison import FOOTNOTE, Mean, table
from experiment import arguments, introduce, run_all
from plots import WITH, WITHOUT, plt
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import fastbf
from fastbf.functional import linear_cross_entropy

CLASSES, TEST_PER_CLASS, CHANNELS, BATCH = 10, 50, 128, 128
TEMPERATURE, MOMENTUM = 0.2, 0.99  # MoCo v3's
RATE = 3e-3  # chosen without BatchFormer, of 1e-3 and 3e-3, on other seeds
LABELS = (1, 5, 20, 120)  # per class, for the probe


class Run(NamedTuple):
    """One training run."""

    batchformer: bool
    seed: int


def mlp(inputs: int, hidden: int, outputs: int) -> list[nn.Module]:
    """MoCo v3's: linear, batch norm, ReLU, linear."""
    return [nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs)]


class Encoder(nn.Module):
    """Conv net, BatchFormer on its features, projector. The probe sees the conv net only."""

    def __init__(self, batchformer: bool) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(), nn.Linear(256, CHANNELS), nn.ReLU(),
        )  # fmt: skip
        self.projector = nn.Sequential(*mlp(CHANNELS, CHANNELS, 64), nn.BatchNorm1d(64, affine=False))
        # Made last, so that both arms begin with the same weights.
        self.batchformer = fastbf.BatchFormer(CHANNELS) if batchformer else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.batchformer(self.backbone(images)))


def info_nce(queries: Tensor, keys: Tensor) -> Tensor:
    """The i-th key is the right one for the i-th query, and for the i-th of the mixed queries behind them.

    Args:
        queries: (N, C), or forked (2N, C): the loss is then the mean over both streams.
        keys: (N, C), the classes that every query chooses from.
    """
    target = torch.arange(len(keys), device=keys.device)
    return linear_cross_entropy(F.normalize(queries), F.normalize(keys), target, scale=1 / TEMPERATURE)


def augment(images: Tensor, random: torch.Generator) -> Tensor:
    """A view of every image: turned, scaled, shifted by up to a pixel, of another contrast, noisy."""
    turn, zoom, right, down, contrast = 2 * torch.rand(5, len(images), generator=random) - 1
    noise = 0.1 * torch.randn(images.shape, generator=random)
    turn, zoom = 0.25 * turn, 1 + 0.2 * zoom
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    theta = torch.stack([cos, -sin, 0.25 * right, sin, cos, 0.25 * down], dim=1).view(-1, 2, 3).to(images)
    views = F.grid_sample(images, F.affine_grid(theta, images.shape, align_corners=False), align_corners=False)
    return views * (1 + 0.3 * contrast).view(-1, 1, 1, 1).to(images) + noise.to(images)


def split(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training images, in random order, and of test images, as many of each class."""
    target = load_digits().target
    order = np.random.default_rng(seed).permutation(len(target))
    test = np.concatenate([order[target[order] == c][:TEST_PER_CLASS] for c in range(CLASSES)])
    return order[~np.isin(order, test)], test


def pretrain(run: Run, epochs: int, device: torch.device) -> Encoder:
    """Trains an encoder without labels."""
    torch.manual_seed(run.seed)
    predictor = nn.Sequential(*mlp(64, CHANNELS, 64)).to(device)
    encoder = Encoder(run.batchformer).to(device)
    keys = fastbf.strip(copy.deepcopy(encoder)).requires_grad_(False)  # the momentum encoder: the plain stream only
    images = torch.tensor(load_digits().images[split(run.seed)[0]], dtype=torch.float32, device=device)[:, None] / 16

    per_epoch = len(images) // BATCH  # a last, smaller batch would be an easier task
    steps = epochs * per_epoch
    optimizer = torch.optim.AdamW([*encoder.parameters(), *predictor.parameters()], lr=RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, cycle_momentum=False)
    # A generator of its own, so that both arms see the same batches and views.
    random = torch.Generator().manual_seed(run.seed)
    for step in range(steps):
        if step % per_epoch == 0:
            batches = torch.randperm(len(images), generator=random).to(device).split(BATCH)
        batch = images[batches[step % per_epoch]]
        views = augment(batch, random), augment(batch, random)
        momentum = 1 - (1 - MOMENTUM) * (1 + math.cos(math.pi * step / steps)) / 2
        fastbf.update_average(keys, encoder, momentum)  # by name: the keys' encoder has no BatchFormer
        with torch.no_grad():
            keys_1, keys_2 = (keys(view) for view in views)
        queries_1, queries_2 = (predictor(encoder(view)) for view in views)
        loss = (info_nce(queries_1, keys_2) + info_nce(queries_2, keys_1)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return encoder.eval()


def probe(features: np.ndarray, seed: int) -> np.ndarray:
    """Test accuracy in percent of logistic regression on features of all digits, for every number of LABELS."""
    target = load_digits().target
    train, test = split(seed)
    accuracy = []
    for labels in LABELS:
        rows = np.concatenate([train[target[train] == c][:labels] for c in range(CLASSES)])
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features[rows], target[rows])
        accuracy.append(100 * model.score(features[test], target[test]))
    return np.array(accuracy)


def accuracy(run: Run, device: torch.device, epochs: int) -> np.ndarray:
    """Of the probe on the frozen features of one pre-trained encoder, for every number of LABELS."""
    encoder = pretrain(run, epochs, device)
    images = torch.tensor(load_digits().images, dtype=torch.float32, device=device)[:, None] / 16
    with torch.no_grad():
        return probe(encoder.backbone(images).cpu().numpy(), run.seed)


def draw(path: Path, pixels: np.ndarray, without: np.ndarray, mixed: np.ndarray) -> Path:
    """Accuracy of the probe over the number of labels, and the paired difference; (seeds, labels) each."""
    fig, (ax, difference) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for values, colour, marker, label in (
        (pixels, "#666666", "^", "raw pixels"),
        (without, WITHOUT, "s", "without"),
        (mixed, WITH, "o", "with BatchFormer"),
    ):
        mean, error = np.array([Mean.of(v) for v in values.T]).T
        ax.errorbar(LABELS, mean, error, color=colour, marker=marker, capsize=3, lw=1.8, label=label)
    mean, error = np.array([Mean.of(v) for v in (mixed - without).T]).T
    difference.axhline(0, color="#666666", lw=1)
    difference.errorbar(LABELS, mean, error, color=WITH, marker="o", capsize=3, lw=1.8)
    ax.set_ylabel("test accuracy of a linear probe, percent")
    ax.set_title(f"mean and 95 % interval of {len(mixed)} seeds", fontsize=10)
    ax.legend(loc="lower right")
    difference.set_ylabel("with BatchFormer minus without, points")
    difference.set_title("paired difference and its 95 % interval", fontsize=10)
    for panel in (ax, difference):
        panel.set_xscale("log")
        panel.set_xticks(LABELS, [str(n) for n in LABELS])
        panel.minorticks_off()
        panel.set_xlabel("labels per class, for the probe")
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path


def main(argv: list[str] | None = None) -> dict[Run, np.ndarray]:
    """Runs the example; returns the accuracies of every run."""
    args = arguments(__doc__, argv)
    introduce(fastbf.BatchFormer(CHANNELS, device=args.device), torch.empty(BATCH, CHANNELS, device=args.device))
    runs = [Run(*r) for r in itertools.product((False, True), range(args.seeds))]
    results = run_all(partial(accuracy, epochs=3 if args.quick else 40), runs, args.device)

    without, mixed = (np.stack([results[Run(arm, seed)] for seed in range(args.seeds)]) for arm in (False, True))
    raw = load_digits().data
    pixels = np.stack([probe(raw, seed) for seed in range(args.seeds)])
    print(f"\ntest accuracy in percent of a linear probe, means over {args.seeds} seeds\n")
    print("\n".join(table("labels per class", {str(n): (without[:, i], mixed[:, i]) for i, n in enumerate(LABELS)})))
    print("  raw pixels for comparison: " + ", ".join(f"{v:.1f}" for v in pixels.mean(0)) + "\n")
    print("\n".join(FOOTNOTE))
    print(f"\npicture: {draw(args.out / 'contrastive.png', pixels, without, mixed)}")
    return results


if __name__ == "__main__":
    main()
