"""Long-tailed recognition of handwritten digits, with and without BatchFormer.

    python examples/long_tailed.py [--out DIR] [--seeds N] [--device auto|cpu|cuda] [--quick]

Scikit-learn's bundled digits, class sizes falling exponentially from 120 to 120/imbalance, which digit is rare drawn
anew for every seed; a small conv net trained by SGD; cross-entropy and Balanced Softmax, each with and without
BatchFormer from the same initial weights and batches. Prints accuracies with standard errors and paired differences,
saves two pictures, and shows that the stripped model predicts the same.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from plots import draw_accuracy, draw_relations
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import fastbf
from fastbf.environment import device_name

CLASSES, LARGEST, TEST_PER_CLASS, CHANNELS = 10, 120, 50, 64
# Classes by rank of size: many-shot, medium-shot, few-shot.
GROUPS = {"all": slice(0, 10), "many": slice(0, 3), "medium": slice(3, 7), "few": slice(7, 10)}
LOSSES = ("cross-entropy", "Balanced Softmax")


class Run(NamedTuple):
    """One training run."""

    imbalance: int
    loss: str
    batchformer: bool
    seed: int


class Result(NamedTuple):
    accuracy: np.ndarray  # (10,) test accuracy in percent, largest class first
    model: Net
    test: tuple[Tensor, Tensor]  # images and labels


class Net(nn.Module):
    """Conv net, BatchFormer between features and classifier, shared classifier."""

    def __init__(self, class_counts: list[int] | None, batchformer: bool) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, CHANNELS), nn.ReLU(),
        )  # fmt: skip
        self.classifier = fastbf.SharedClassifier(CHANNELS, CLASSES, class_counts=class_counts)
        # Made last, so that both arms begin with the same weights.
        self.batchformer = fastbf.BatchFormer(CHANNELS) if batchformer else nn.Identity()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.classifier.loss(self.batchformer(self.backbone(images)), labels)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.batchformer(self.backbone(images)))


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


def train(run: Run, epochs: int, device: torch.device) -> Result:
    """Trains one model and measures it."""
    torch.manual_seed(run.seed)
    train_set, test_set = load(run.imbalance, run.seed, device)
    counts = class_counts(run.imbalance) if run.loss == "Balanced Softmax" else None
    model = Net(counts, run.batchformer).to(device)
    rate, steps = 0.05, epochs * -(-len(train_set[1]) // 64)
    groups = [
        {"params": [*model.backbone.parameters(), *model.classifier.parameters()], "max_lr": rate},
        {"params": list(model.batchformer.parameters()), "max_lr": rate / 10},
    ]
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=rate, momentum=0.9, weight_decay=5e-4)
    rates = [g["max_lr"] for g in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, cycle_momentum=False)
    # A generator of its own, so that both arms see the same batches.
    order = torch.Generator().manual_seed(run.seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(train_set[1]), generator=order).to(device).split(64):
            loss = model.loss(train_set[0][rows], train_set[1][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    right = (predict(model, test_set[0]) == test_set[1]).float().view(CLASSES, -1)
    return Result(right.mean(1).cpu().numpy() * 100, model, test_set)


@torch.no_grad()
def predict(model: Net, images: Tensor) -> Tensor:
    """The class of every image, from the model in evaluation mode."""
    return model.eval()(images).argmax(-1)


def _worker(job: tuple[Run, int]) -> tuple[Run, np.ndarray]:
    torch.set_num_threads(1)
    return job[0], train(*job, torch.device("cpu")).accuracy


def train_all(runs: list[Run], epochs: int, device: torch.device) -> dict[Run, np.ndarray]:
    """Accuracy per class of every run; on CPU two at a time, for the net is too small to share one over cores."""
    with tqdm(total=len(runs), desc="training", unit="run", ncols=80) as bar:
        results = {}
        if device.type != "cpu":
            for run in runs:
                results[run] = train(run, epochs, device).accuracy
                bar.update()
            return results
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            for done in as_completed([pool.submit(_worker, (run, epochs)) for run in runs]):
                run, accuracy = done.result()
                results[run] = accuracy
                bar.update()
        return results


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean over seeds and its standard error."""
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5


def verdict(mean: float, error: float) -> str:
    """What the paired difference allows one to say."""
    if abs(mean) <= 2 * error:
        return "no clear gain"
    return "gain" if mean > 0 else "LOSS"


def report(results: dict[Run, np.ndarray], imbalances: list[int], seeds: int) -> list[str]:
    """The table, a line each."""
    lines = [f"test accuracy in percent, mean ± standard error over {seeds} seeds"]
    for imbalance, loss in itertools.product(imbalances, LOSSES):
        counts = class_counts(imbalance)
        sizes = {name: f"{counts[part][0]} to {counts[part][-1]}" for name, part in GROUPS.items()}
        lines += ["", f"imbalance {imbalance}, {loss}"]
        lines.append(f"  {'classes (training images)':<28}{'without':>14}{'with':>14}{'difference':>16}")
        for name, part in GROUPS.items():
            arms = [
                np.array([results[Run(imbalance, loss, arm, seed)][part].mean() for seed in range(seeds)])
                for arm in (False, True)
            ]
            cells = [mean_and_error(values) for values in (*arms, arms[1] - arms[0])]
            texts = [f"{m:.1f} ± {e:.1f}" for m, e in cells[:2]] + [f"{cells[2][0]:+.1f} ± {cells[2][1]:.1f}"]
            label = f"{name} ({sizes[name]})"
            lines.append(f"  {label:<28}{texts[0]:>14}{texts[1]:>14}{texts[2]:>16}   {verdict(*cells[2])}")
    lines += [
        "",
        "Differences are paired: both arms of a seed share data, initial weights and batches. Only a",
        "difference of more than two standard errors is called a gain or a LOSS.",
    ]
    return lines


def check_strip(result: Result) -> str:
    """Strips a trained model, compares its predictions, and says so."""
    stripped = fastbf.strip(copy.deepcopy(result.model))
    same = torch.equal(predict(stripped, result.test[0]), predict(result.model, result.test[0]))
    if not same:
        raise RuntimeError("the stripped model predicts something else: please report this")
    before, after = (sum(p.numel() for p in m.parameters()) for m in (result.model, stripped))
    return f"stripped: {before:,} → {after:,} parameters, the same {len(result.test[1])} test predictions"


def relations(result: Result, per_class: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Attention in one batch of test images, as many of each class, sorted by class; and the classes.

    (N, N), mean over heads, and (N,).
    """
    images, labels = (x.unflatten(0, (CLASSES, -1))[:, :per_class].flatten(0, 1) for x in result.test)
    with torch.no_grad():
        weights = result.model.batchformer.attention_map(result.model.eval().backbone(images)).mean(0)
    return weights.cpu().numpy(), labels.cpu().numpy()


def main(argv: list[str] | None = None) -> dict[Run, np.ndarray]:
    """Runs the demo; returns accuracy per class of every run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    parser.add_argument("--seeds", type=int, default=10, help="at least 2")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="two seeds, few epochs, one imbalance: for tests")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"--seeds must be at least 2 for standard errors, got {args.seeds}")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    device = torch.device(name)
    imbalances, seeds, epochs = ([50], 2, 20) if args.quick else ([50, 100], args.seeds, 100)

    print(f"fastbf {fastbf.__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"device                  {device.type}: {device_name(device)}")
    former = fastbf.BatchFormer(CHANNELS, device=device)
    print(f"backend of BatchFormer  {fastbf.explain(former, torch.empty(64, CHANNELS, device=device))}")
    runs = [Run(*r) for r in itertools.product(imbalances, LOSSES, (False, True), range(seeds))]
    results = train_all(runs, epochs, device)
    print("\n" + "\n".join(report(results, imbalances, seeds)) + "\n")

    shown = train(Run(imbalances[0], LOSSES[-1], True, 0), epochs, device)
    print(check_strip(shown))
    args.out.mkdir(parents=True, exist_ok=True)
    per_class = {
        loss: {
            arm: np.stack([results[Run(imbalances[0], loss, arm, seed)] for seed in range(seeds)])
            for arm in (False, True)
        }
        for loss in LOSSES
    }
    pictures = [
        draw_accuracy(args.out / "accuracy_per_class.png", per_class, class_counts(imbalances[0]), imbalances[0]),
        draw_relations(args.out / "sample_relations.png", *relations(shown)),
    ]
    print("pictures: " + ", ".join(map(str, pictures)))
    return results


if __name__ == "__main__":
    main()
