"""Sample relations: which classes attend to which in the long-tailed digits network, and where gradients flow.

    python examples/relations.py [--out DIR] [--seeds N] [--device auto|cpu|cuda] [--quick]

Trains the network of ``long_tailed.py`` with BatchFormer and Balanced Softmax and sends test images through
``BatchFormer.attention_map``, in balanced batches, without dropout. Which digit is rare is drawn anew for every seed:
digits that look alike would show by digit, rare classes that borrow from frequent ones by rank of class size. Prints
tables, both arms on the features of the trained network, BatchFormer's weights before and after; saves a picture of
whose losses the gradient at a sample comes from, which is what the paper argues with (section 3). Test batches are
balanced and training batches are not: what rare classes send there is not measured. docs/examples.md has the results.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from comparison import RULE, table
from experiment import arguments, introduce, run_all
from long_tailed import CHANNELS, DATA, IMBALANCE, LongTailed, Settings, class_counts, conv_net, fit, groups, load
from mnist import CLASSES
from plots import plt
from torch import Tensor

import fastbf

COUNTS = class_counts("mnist", IMBALANCE)
GROUPS = groups(COUNTS)
TEST_PER_CLASS, PER_CLASS = 50, 5  # images to look at of each class, and in each batch
COLOURS = ("#CCCCCC", "#E69F00", "#009E73", "#0072B2")  # of losses in the picture
ARMS, WORDS = ("initial", "trained"), ("more", "less", "no clear change")
FOOTNOTE = (
    "Differences are paired: both arms of a seed see the same features, of the trained network, and differ in",
    "BatchFormer's weights.",
    *RULE,
)


class Relations(NamedTuple):
    """Of one seed; maps are (arms, classes, classes) by rank of size, from the mixed sample to whom it looks at."""

    attention: np.ndarray  # multiple of even attention
    gradient: np.ndarray  # see gradient_shares: percent of a column's sample from all of a row's class


def by_class(values: Tensor, labels: Tensor) -> Tensor:
    """Mean over pairs of two different samples, by the classes of both: (N, N) and (N,) → (classes, classes)."""
    members = F.one_hot(labels, CLASSES).to(values)
    others = 1 - torch.eye(len(labels)).to(values)
    return members.T @ (values * others) @ members / (members.T @ others @ members)


def gradient_shares(
    former: fastbf.BatchFormer, classifier: fastbf.SharedClassifier, features: Tensor, labels: Tensor
) -> Tensor:
    """Whose mixed losses the gradient at a sample's features comes from: (N, N), columns add up to 1.

    Entry (i, j) is the norm of the gradient of sample i's loss at the features of sample j, over the sum of these norms
    over i. If samples did not look at each other, as without BatchFormer, it would be the unit matrix.
    """
    features = features.detach().requires_grad_()
    losses = classifier.loss(former.mix(features), labels, reduction="none")
    norms = torch.stack([torch.autograd.grad(loss, features, retain_graph=True)[0].norm(dim=1) for loss in losses])
    return norms / norms.sum(0)


def relate(seed: int, device: torch.device, settings: Settings) -> Relations:
    """Trains one network, then looks at test images in balanced batches."""
    torch.manual_seed(seed)
    training, (tests, ranks) = load("mnist", IMBALANCE, seed, device)
    model = LongTailed(conv_net(), CHANNELS, CLASSES, COUNTS, batchformer=True).to(device)
    initial = copy.deepcopy(model.batchformer).eval()
    fit(model, *training, seed, settings)
    model.eval()
    attention, gradient = np.zeros((2, 2, CLASSES, CLASSES))
    seen = torch.arange(len(ranks)).view(CLASSES, -1)[:, :TEST_PER_CLASS]
    batches = seen.reshape(CLASSES, -1, PER_CLASS).transpose(0, 1).flatten(1).to(device)
    for rows in batches:
        images, labels = tests[rows], ranks[rows]
        with torch.no_grad():
            features = model.backbone(images)
        for arm, former in enumerate((initial, model.batchformer)):
            weights = former.attention_map(features).detach().mean(0) * len(rows)
            shares = 100 * gradient_shares(former, model.classifier, features, labels)
            attention[arm] += by_class(weights, labels).cpu().numpy() / len(batches)
            per_pair = by_class(shares, labels).cpu().numpy() / len(batches)
            gradient[arm] += per_pair * (PER_CLASS - np.eye(CLASSES))  # so many others of a row's class
    return Relations(attention, gradient)


def digits(seed: int) -> np.ndarray:
    """The digit of every rank: what ``load`` draws first."""
    return np.random.default_rng(seed).permutation(CLASSES)


def by_digit(maps: np.ndarray) -> np.ndarray:
    """(seeds, classes, classes) by rank → by digit."""
    orders = [np.argsort(digits(seed)) for seed in range(len(maps))]
    return np.stack([m[np.ix_(order, order)] for m, order in zip(maps, orders, strict=True)])


def report(attention: np.ndarray, gradient: np.ndarray) -> list[str]:
    """The tables, of (seeds, arms, classes, classes) by rank."""
    many, few = GROUPS["many"], GROUPS["few"]
    percent, own = 100 * attention, 100 * attention.diagonal(axis1=2, axis2=3)
    rows = {f"to the own class, {name}": own[..., part].mean(2) for name, part in GROUPS.items()}
    rows["few-shot to many-shot"] = percent[..., few, :][..., many].mean((2, 3))
    rows["many-shot to few-shot"] = percent[..., many, :][..., few].mean((2, 3))
    rows["spread over a seed's map"] = percent.std((2, 3))
    lines = ["attention to other samples, percent of even attention"]
    lines += table("attention", {name: tuple(values.T) for name, values in rows.items()}, ARMS, WORDS)
    by_rank = percent[:, 1]
    spreads = [maps.mean(0).std() for maps in (by_digit(by_rank), by_rank)]
    alike = np.mean([np.corrcoef(*maps.reshape(2, -1))[0, 1] for maps in attention])
    lines += [
        f"  A seed's initial and trained maps correlate by {alike:.2f}. Spread of the mean map over seeds: by digit",
        f"  {spreads[0]:.1f}, by rank {spreads[1]:.1f}; of maps with nothing in common "
        f"{by_rank.std((1, 2)).mean() / len(by_rank) ** 0.5:.1f}.",
        "",
        "the gradient of mixed losses at a sample's features, percent of its norm by whose loss it is",
    ]
    rows = {
        "from other samples": gradient.sum(2).mean(2),
        "at many-shot, from few-shot": gradient[..., few, :][..., many].sum(2).mean(2),
        "at few-shot, from many-shot": gradient[..., many, :][..., few].sum(2).mean(2),
    }
    return lines + table("gradient", {name: tuple(values.T) for name, values in rows.items()}, ARMS, WORDS)


def sources(gradient: np.ndarray) -> dict[str, np.ndarray]:
    """Percent of the gradient at samples of each group but "all", by whose loss: "its own", then others' by group."""
    parts = {name: mask for name, mask in GROUPS.items() if name != "all"}
    mean = gradient.mean(0)
    shares = {"its own": np.array([100 - mean[:, mask].sum(0).mean() for mask in parts.values()])}
    for name, others in parts.items():
        shares[f"others', {name}-shot"] = np.array([mean[others][:, mask].sum(0).mean() for mask in parts.values()])
    return shares


def draw(path: Path, gradient: np.ndarray) -> Path:
    """Whose losses the gradient at a sample comes from, by group of its class; (seeds, classes, classes) by rank."""
    fig, ax = plt.subplots(figsize=(8, 3), layout="constrained")
    names = [f"{name}-shot" for name in GROUPS if name != "all"]
    left = np.zeros(len(names))
    for (source, values), colour in zip(sources(gradient).items(), COLOURS, strict=True):
        bars = ax.barh(names, values, left=left, color=colour, label=source)
        texts = [f"{value:.0f}" if value >= 3 else "" for value in values]
        ax.bar_label(bars, texts, label_type="center", color="white" if colour != COLOURS[0] else "black")
        left += values
    ax.invert_yaxis()
    ax.set(xlim=(0, 100), xlabel="percent of the mixed losses' gradient at a sample, by norm", ylabel="sample's class")
    fig.legend(loc="outside upper center", ncols=len(COLOURS), title="whose loss")
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path


def main(argv: list[str] | None = None) -> dict[int, Relations]:
    """Runs the example; returns the maps of every seed."""
    args = arguments(__doc__, argv)
    introduce(fastbf.BatchFormer(CHANNELS, device=args.device), torch.empty(50, CHANNELS, device=args.device))
    settings = Settings("mnist", 2 if args.quick else DATA["mnist"].epochs)
    results = run_all(partial(relate, settings=settings), range(args.seeds), args.device)
    attention, gradient = (np.stack([results[seed][i] for seed in range(args.seeds)]) for i in range(2))
    print(f"\nmeans over {args.seeds} seeds\n")
    print("\n".join([*report(attention, gradient), "", *FOOTNOTE]))
    print(f"\npicture: {draw(args.out / 'relations.png', gradient[:, 1])}")
    return results


if __name__ == "__main__":
    main()
