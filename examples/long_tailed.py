"""Long-tailed recognition of handwritten digits, with and without BatchFormer.

    python examples/long_tailed.py [--out DIR] [--seeds N] [--device auto|cpu|cuda] [--imbalance N] [--amp] [--quick]

Scikit-learn's bundled digits, class sizes falling exponentially from 120 to 120/imbalance, which digit is rare drawn
anew for every seed; a small conv net trained by SGD. Three ways to train, each with and without BatchFormer from the
same initial weights and batches: cross-entropy; Balanced Softmax; and, decoupled, features trained by cross-entropy and
frozen, on which BatchFormer and the classifier are then all there is to a step. Prints accuracies with standard errors
and paired differences, saves a picture, and shows that the stripped model predicts the same.

To carry over: ``LongTailed`` around any feature extractor, the two groups of parameters in ``fit``, and autocast there.
"""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from experiment import FOOTNOTE, arguments, introduce, run_all, table
from plots import draw_accuracy
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastbf

CLASSES, LARGEST, TEST_PER_CLASS, CHANNELS = 10, 120, 50, 64
# Classes by rank of size: many-shot, medium-shot, few-shot.
GROUPS = {"all": slice(0, 10), "many": slice(0, 3), "medium": slice(3, 7), "few": slice(7, 10)}
CROSS_ENTROPY, BALANCED, FROZEN = "cross-entropy", "Balanced Softmax", "Balanced Softmax on frozen features"
LOSSES = (CROSS_ENTROPY, BALANCED, FROZEN)


class Run(NamedTuple):
    """One training run."""

    imbalance: int
    loss: str
    batchformer: bool
    seed: int


class Result(NamedTuple):
    accuracy: np.ndarray  # (10,) test accuracy in percent, largest class first
    model: LongTailed
    test: tuple[Tensor, Tensor]  # images and labels


class Settings(NamedTuple):
    """How long to train, and in which precision."""

    epochs: int
    amp: bool


class LongTailed(nn.Module):
    """A feature extractor, BatchFormer on its features while training, and the shared classifier.

    Args:
        backbone: any module that makes (N, channels) of its input.
        class_counts: training samples of each class, for Balanced Softmax; None for cross-entropy.
    """

    def __init__(
        self, backbone: nn.Module, channels: int, num_classes: int, class_counts: list[int] | None, batchformer: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = fastbf.SharedClassifier(channels, num_classes, class_counts=class_counts)
        # Made last, so that both arms begin with the same weights.
        self.batchformer = fastbf.BatchFormer(channels) if batchformer else nn.Identity()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.classifier.loss(self.batchformer(self.backbone(images)), labels)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.batchformer(self.backbone(images)))


def conv_net() -> nn.Sequential:
    """Features (N, 64) of images (N, 1, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, CHANNELS), nn.ReLU(),
    )  # fmt: skip


def class_counts(imbalance: int) -> list[int]:
    """Training samples of each class, largest first."""
    return [max(1, round(LARGEST * imbalance ** (-rank / (CLASSES - 1)))) for rank in range(CLASSES)]


def load(imbalance: int, seed: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) for training and for testing; labels are ranks by class size, 0 the largest."""
    digits = load_digits()
    random = np.random.default_rng(seed)
    train, test, train_labels = [], [], []
    for rank, (digit, count) in enumerate(zip(random.permutation(CLASSES), class_counts(imbalance), strict=True)):
        samples = random.permutation(np.flatnonzero(digits.target == digit))
        test.append(samples[:TEST_PER_CLASS])
        train.append(samples[TEST_PER_CLASS : TEST_PER_CLASS + count])
        train_labels += [rank] * count
    images = torch.tensor(digits.images, dtype=torch.float32, device=device)[:, None] / 16

    def select(rows: list[np.ndarray], labels: Tensor) -> tuple[Tensor, Tensor]:
        return images[torch.from_numpy(np.concatenate(rows)).to(device)], labels.to(device)

    test_labels = torch.arange(CLASSES).repeat_interleave(TEST_PER_CLASS)
    return select(train, torch.tensor(train_labels)), select(test, test_labels)


def fit(model: LongTailed, inputs: Tensor, labels: Tensor, seed: int, settings: Settings) -> None:
    """SGD, one cycle; BatchFormer's parameters are a group of their own, at a tenth of the rate."""
    rate, steps = 0.05, settings.epochs * -(-len(labels) // 64)
    groups = [
        {"params": [*model.backbone.parameters(), *model.classifier.parameters()], "max_lr": rate},
        {"params": list(model.batchformer.parameters()), "max_lr": rate / 10},
    ]
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=rate, momentum=0.9, weight_decay=5e-4)
    rates = [g["max_lr"] for g in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, cycle_momentum=False)
    # A generator of its own, so that both arms see the same batches.
    order = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(labels), generator=order).to(labels.device).split(64):
            with torch.autocast(labels.device.type, torch.bfloat16, enabled=settings.amp):
                loss = model.loss(inputs[rows], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def train(run: Run, device: torch.device, settings: Settings) -> Result:
    """Trains one model and measures it."""
    torch.manual_seed(run.seed)
    (images, labels), test = load(run.imbalance, run.seed, device)
    counts = None if run.loss == CROSS_ENTROPY else class_counts(run.imbalance)
    backbone = conv_net().to(device)
    if run.loss == FROZEN:
        fit(LongTailed(backbone, CHANNELS, CLASSES, None, False).to(device), images, labels, run.seed, settings)
        model = LongTailed(nn.Identity(), CHANNELS, CLASSES, counts, run.batchformer).to(device)
        with torch.no_grad():
            features = backbone(images)
        fit(model, features, labels, run.seed, settings._replace(epochs=settings.epochs // 2))
        model.backbone = backbone
    else:
        model = LongTailed(backbone, CHANNELS, CLASSES, counts, run.batchformer).to(device)
        fit(model, images, labels, run.seed, settings)
    right = (predict(model, test[0]) == test[1]).float().view(CLASSES, -1)
    return Result(right.mean(1).cpu().numpy() * 100, model, test)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The class of every image, from the model in evaluation mode."""
    return model.eval()(images).argmax(-1)


def accuracy(run: Run, device: torch.device, settings: Settings) -> np.ndarray:
    """Per class, in percent, largest class first."""
    return train(run, device, settings).accuracy


def report(results: dict[Run, np.ndarray], imbalances: list[int], seeds: int) -> list[str]:
    """The table, a line each."""
    lines = [f"test accuracy in percent, mean ± standard error over {seeds} seeds"]
    for imbalance, loss in itertools.product(imbalances, LOSSES):
        counts = class_counts(imbalance)
        sizes = {name: f"{counts[part][0]} to {counts[part][-1]}" for name, part in GROUPS.items()}
        lines += ["", f"imbalance {imbalance}, {loss}"]
        rows = {}
        for name, part in GROUPS.items():
            rows[f"{name} ({sizes[name]})"] = tuple(
                np.array([results[Run(imbalance, loss, arm, seed)][part].mean() for seed in range(seeds)])
                for arm in (False, True)
            )
        lines += table("classes (training images)", rows)
    return [*lines, "", *FOOTNOTE]


def check_strip(result: Result) -> str:
    """Strips a trained model, compares its predictions, and says so."""
    stripped = fastbf.strip(copy.deepcopy(result.model))
    same = torch.equal(predict(stripped, result.test[0]), predict(result.model, result.test[0]))
    if not same:
        raise RuntimeError("the stripped model predicts something else: please report this")
    before, after = (sum(p.numel() for p in m.parameters()) for m in (result.model, stripped))
    return f"stripped: {before:,} → {after:,} parameters, the same {len(result.test[1])} test predictions"


def main(argv: list[str] | None = None) -> dict[Run, np.ndarray]:
    """Runs the demo; returns accuracy per class of every run."""
    options = {
        "--imbalance": {"type": int, "nargs": "+", "default": [50], "help": "largest class over smallest"},
        "--amp": {"action": "store_true", "help": "autocast to bf16"},
    }
    args = arguments(__doc__, argv, options=options)
    device, seeds, imbalances = args.device, args.seeds, args.imbalance
    settings = Settings(20 if args.quick else 100, args.amp)
    introduce(fastbf.BatchFormer(CHANNELS, device=device), torch.empty(64, CHANNELS, device=device))
    runs = [Run(*r) for r in itertools.product(imbalances, LOSSES, (False, True), range(seeds))]
    results = run_all(partial(accuracy, settings=settings), runs, device)
    print("\n" + "\n".join(report(results, imbalances, seeds)) + "\n")

    torch.set_num_threads(1)  # as in run_all: two threads of so small a net wait for each other
    shown = train(Run(imbalances[0], BALANCED, True, 0), device, settings)
    print(check_strip(shown))
    per_class = {
        loss: {
            arm: np.stack([results[Run(imbalances[0], loss, arm, seed)] for seed in range(seeds)])
            for arm in (False, True)
        }
        for loss in LOSSES
    }
    path = args.out / "accuracy_per_class.png"
    print(f"picture: {draw_accuracy(path, per_class, class_counts(imbalances[0]), imbalances[0])}")
    return results


if __name__ == "__main__":
    main()
