"""Domain generalization: rotated digits, one angle left out, with and without BatchFormer.

    python examples/domain_generalization.py [--out DIR] [--seeds N] [--device auto|cpu|cuda] [--quick]

Scikit-learn's bundled digits in six domains, rotated by 0 to 75 degrees; every image is in one domain only, dealt anew
for every seed (as Rotated MNIST in DomainBed, Gulrajani and Lopez-Paz, ICLR 2021). A small conv net learns from five
domains by ERM, that is plain cross-entropy over all of them with the same number of images of each in a batch, and is
measured on the sixth. With BatchFormer the images of all source domains attend to each other along the batch.

What comes out: with ten seeds on a CPU BatchFormer gains 1.5 ± 0.2 points on the mean of the six domains, and of single
domains on 0, 30 and 60 degrees; the others show no clear gain. Either arm loses far more where the angle lies outside
those it was trained on (0 and 75 degrees). Net, rate and epochs were chosen without BatchFormer, to fit in minutes.
Much of the gain is that it learns sooner: trained for 5 epochs instead of 20 (two seeds) it is 11.6 ± 0.7 points ahead
on the mean, and trained for 60 (four seeds, three angles) +5.4 ± 2.7 on 0 degrees, -0.6 ± 0.3 on 30, +0.9 ± 0.2 on 60.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from experiment import FOOTNOTE, arguments, introduce, run_all, table
from scipy import ndimage
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastbf

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ANGLES = (0, 15, 30, 45, 60, 75)
CLASSES, CHANNELS, PER_DOMAIN = 10, 64, 16  # images of each source domain in a batch: 80 in all


class Run(NamedTuple):
    """One training run."""

    held_out: int  # degrees
    batchformer: bool
    seed: int


class Net(nn.Module):
    """An ERM network; BatchFormer changes nothing but its loss."""

    def __init__(self, batchformer: bool) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, CHANNELS), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Linear(CHANNELS, CLASSES)
        # Made last, so that both arms begin with the same weights.
        self.batchformer = fastbf.BatchFormer(CHANNELS) if batchformer else None

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        features = self.backbone(images)
        if self.batchformer is not None:
            features, labels = self.batchformer(features, labels)  # 2N features, labels repeated
        return F.cross_entropy(self.classifier(features), labels)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, for testing: of the plain features."""
        return self.classifier(self.backbone(images))


def load(seed: int) -> tuple[Tensor, Tensor]:
    """Images (6, n, 1, 10, 10) and labels (6, n) of the six domains."""
    digits = load_digits()
    images = np.pad(digits.images / 16, ((0, 0), (1, 1), (1, 1)))  # room for the corners
    count = len(images) // len(ANGLES)
    dealt = np.random.default_rng(seed).permutation(len(images))[: count * len(ANGLES)].reshape(len(ANGLES), count)
    rotated = [
        ndimage.rotate(images[rows], angle, axes=(2, 1), reshape=False, order=1)
        for angle, rows in zip(ANGLES, dealt, strict=True)
    ]
    return torch.tensor(np.stack(rotated)[:, :, None], dtype=torch.float32), torch.from_numpy(digits.target[dealt])


def train(run: Run, device: torch.device, epochs: int) -> float:
    """Trains one model on five domains, strips it, and returns its accuracy on the sixth in percent."""
    torch.manual_seed(run.seed)
    images, labels = (x.to(device) for x in load(run.seed))
    sources = torch.tensor([i for i, angle in enumerate(ANGLES) if angle != run.held_out], device=device)[:, None]
    model = Net(run.batchformer).to(device)
    rate, steps = 0.1, epochs * (labels.shape[1] // PER_DOMAIN)
    groups = [{"params": [*model.backbone.parameters(), *model.classifier.parameters()], "max_lr": rate}]
    if model.batchformer is not None:
        groups.append({"params": [*model.batchformer.parameters()], "max_lr": rate / 10})
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["max_lr"] for g in groups], total_steps=steps, cycle_momentum=False
    )
    # A generator of its own, so that both arms see the same batches.
    order = torch.Generator().manual_seed(run.seed)
    for _ in range(epochs):
        shuffled = torch.stack([torch.randperm(labels.shape[1], generator=order) for _ in sources]).to(device)
        for i in range(labels.shape[1] // PER_DOMAIN):
            rows = shuffled[:, i * PER_DOMAIN : (i + 1) * PER_DOMAIN]
            loss = model.loss(images[sources, rows].flatten(0, 1), labels[sources, rows].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    fastbf.strip(model).eval()
    target = ANGLES.index(run.held_out)
    with torch.no_grad():
        return 100 * (model(images[target]).argmax(1) == labels[target]).float().mean().item()


def draw(path: Path, rows: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """Accuracy and paired difference for every held-out domain, each above a digit of that domain."""
    images, _ = load(0)
    fig, axes = plt.subplots(2, 1, figsize=(7.5, 6), layout="constrained", sharex=True)
    places = np.arange(len(ANGLES))
    without, mixed = (np.stack([rows[f"{angle} degrees"][arm] for angle in ANGLES], axis=1) for arm in (0, 1))
    error = partial(np.std, axis=0, ddof=1)
    for values, label, colour, marker, shift in (
        (without, "without", "#E69F00", "s", -0.07),
        (mixed, "with BatchFormer", "#0072B2", "o", 0.07),
    ):
        bars = error(values) / len(values) ** 0.5
        axes[0].errorbar(places + shift, values.mean(0), bars, color=colour, marker=marker, capsize=3, label=label)
    axes[0].set_ylabel("accuracy, percent")
    axes[0].set_title(f"accuracy on the held-out domain: mean and standard error of {len(mixed)} seeds", fontsize=10)
    axes[0].legend(loc="center")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low - 0.4 * (high - low), high)  # room for the digits
    differences = mixed - without
    bars = error(differences) / len(mixed) ** 0.5
    axes[1].axhline(0, color="#666666", lw=0.8)
    axes[1].plot(places, differences.T, ".", color="#BBBBBB")
    axes[1].errorbar(places, differences.mean(0), bars, color="#009E73", marker="D", ls="", capsize=3)
    axes[1].set_ylabel("with minus without, points")
    axes[1].set_title("paired differences: every seed (grey), mean and standard error", fontsize=10)
    axes[1].set_xticks(places, [f"{angle}°" for angle in ANGLES])
    axes[1].set_xlabel("held-out domain")
    for place, image in zip(places, images[:, 0, 0], strict=True):
        inset = axes[0].inset_axes((place - 0.2, 0.03, 0.4, 0.22), transform=axes[0].get_xaxis_transform())
        inset.imshow(image, cmap="gray")
        inset.axis("off")
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path


def main(argv: list[str] | None = None) -> dict[Run, float]:
    """Runs the example; returns the accuracy of every run."""
    args = arguments(__doc__, argv)
    introduce(fastbf.BatchFormer(CHANNELS, device=args.device), torch.empty(80, CHANNELS, device=args.device))
    runs = [Run(angle, arm, seed) for angle in ANGLES for arm in (False, True) for seed in range(args.seeds)]
    results = run_all(partial(train, epochs=5 if args.quick else 20), runs, args.device)

    def accuracies(angle: int, arm: bool) -> np.ndarray:
        return np.array([results[Run(angle, arm, seed)] for seed in range(args.seeds)])

    rows = {f"{angle} degrees": (accuracies(angle, False), accuracies(angle, True)) for angle in ANGLES}
    rows["mean of the six"] = tuple(np.mean([r[arm] for r in rows.values()], axis=0) for arm in (0, 1))
    print(f"\naccuracy on the held-out domain in percent, mean ± standard error over {args.seeds} seeds\n")
    print("\n".join([*table("held-out domain", rows), "", *FOOTNOTE]) + "\n")
    print(f"picture: {draw(args.out / 'domain_generalization.png', rows)}")
    return results


if __name__ == "__main__":
    main()
