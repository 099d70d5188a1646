"""Sample relations: which classes attend to which in the long-tailed digits network, and where gradients flow.

    python examples/relations.py [--out DIR] [--seeds N] [--device auto|cpu|cuda] [--quick]

Trains the network of ``long_tailed.py`` with BatchFormer and Balanced Softmax and sends its test images through
``BatchFormer.attention_map``, in balanced batches, without dropout. Which digit is rare is drawn anew for every seed:
digits that look alike would show by digit, rare classes that borrow from frequent ones by rank of class size. Prints
tables, both arms on the features of the trained network, BatchFormer's weights before and after; saves a picture.

What comes out: in so small a network attention learns next to nothing. With ten seeds on a CPU other samples of the own
class get 98.9 ± 1.7 percent of even attention. A single seed's map has a pattern, but hardly another one than with the
random weights that BatchFormer began with, and the mean over seeds has hardly more of it than chance. At the rate of
all other parameters and with 400 epochs instead of 100 (four seeds) maps only become more even: their spread is 10.8
percent of even attention instead of 21.9. What does bear out the paper's argument (section 3) is the gradient: of what
mixed losses send to a sample's features, 71.5 ± 0.7 percent comes from other samples' losses, and at many-shot classes
72.9 ± 2.5 from those of the few-shot classes, three tenths of these batches, alone: their losses are the largest. So
they do reach frequent classes' features, by attention that hardly chooses. In training, few-shot classes are 12 of 337
images; what they send there was not measured.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from experiment import arguments, introduce, run_all, table
from long_tailed import CHANNELS, CLASSES, GROUPS, LongTailed, Settings, class_counts, conv_net, fit, load
from plots import WITH, plt
from torch import Tensor

import fastbf

IMBALANCE, PER_CLASS = 50, 5  # largest class over smallest; test images of each class in a batch
ARMS, WORDS = ("initial", "trained"), ("more", "less", "no clear change")
FOOTNOTE = (
    "Differences are paired: both arms of a seed see the same features, of the trained network, and differ in",
    "BatchFormer's weights. Only a difference of more than two standard errors is called more or less.",
)


class Relations(NamedTuple):
    """Of one seed; maps are (arms, classes, classes) by rank of size, from the mixed sample to whom it looks at."""

    attention: np.ndarray  # multiple of even attention
    gradient: np.ndarray  # see gradient_shares: percent of a column's sample from all of a row's class
    weights: np.ndarray  # (N, N) trained attention in one batch, multiple of even attention
    images: np.ndarray  # (N, 8, 8) that batch, sorted by class


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
    """Trains one network, then looks at all test images in balanced batches."""
    torch.manual_seed(seed)
    training, test = load(IMBALANCE, seed, device)
    model = LongTailed(conv_net(), CHANNELS, CLASSES, class_counts(IMBALANCE), batchformer=True).to(device)
    initial = copy.deepcopy(model.batchformer).eval()
    fit(model, *training, seed, settings)
    model.eval()
    attention, gradient = np.zeros((2, 2, CLASSES, CLASSES))
    batches = torch.arange(len(test[1])).view(CLASSES, -1, PER_CLASS).transpose(0, 1).flatten(1).to(device)
    for rows in batches:
        images, labels = test[0][rows], test[1][rows]
        with torch.no_grad():
            features = model.backbone(images)
        for arm, former in enumerate((initial, model.batchformer)):
            weights = former.attention_map(features).detach().mean(0) * len(rows)
            shares = 100 * gradient_shares(former, model.classifier, features, labels)
            attention[arm] += by_class(weights, labels).cpu().numpy() / len(batches)
            per_pair = by_class(shares, labels).cpu().numpy() / len(batches)
            gradient[arm] += per_pair * (PER_CLASS - np.eye(CLASSES))  # so many others of a row's class
    return Relations(attention, gradient, weights.cpu().numpy(), images[:, 0].cpu().numpy())


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
    rows["few-shot to many-shot"] = percent[..., few, many].mean((2, 3))
    rows["many-shot to few-shot"] = percent[..., many, few].mean((2, 3))
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
        "at many-shot, from few-shot": gradient[..., few, many].sum(2).mean(2),
        "at few-shot, from many-shot": gradient[..., many, few].sum(2).mean(2),
    }
    return lines + table("gradient", {name: tuple(values.T) for name, values in rows.items()}, ARMS, WORDS)


def draw(path: Path, attention: np.ndarray, gradient: np.ndarray, shown: Relations) -> Path:
    """Trained maps of seed 0 and of all, (seeds, classes, classes) by rank, and whom single digits attend to."""
    fig = plt.figure(figsize=(10, 6), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(4, 2))
    one, mean, flow = top.subplots(1, 3, width_ratios=(4, 4, 4.4))
    maps, sizes, share = by_digit(attention), class_counts(IMBALANCE), gradient.mean(0)
    for ax, values, title in ((one, maps[0], "one seed"), (mean, maps.mean(0), f"mean of {len(maps)} seeds")):
        image = ax.imshow(values, cmap="cividis", vmin=0.4, vmax=1.6, aspect="auto")
        ax.set_title(f"attention by digit, {title}", fontsize=10)
        ax.set(xticks=range(CLASSES), yticks=range(CLASSES), xlabel="attended digit", ylabel="attending digit")
    top.colorbar(image, ax=[one, mean], label="multiple of even attention", location="bottom", aspect=50)
    share = np.vstack([share, 100 - share.sum(0)])
    flow.imshow(share, cmap="cividis", vmin=0, vmax=80, aspect="auto")
    for (i, j), value in np.ndenumerate(share):
        flow.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value < 40 else "black", fontsize=7)
    flow.set_title("percent of a sample's gradient, by loss", fontsize=10)
    flow.set_xticks(range(CLASSES), sizes)
    flow.set_yticks(range(CLASSES + 1), [*sizes, "itself"])
    flow.set(xlabel="sample's class, by training images", ylabel="losses of others, by class")

    title = "four test images, by size of their class, and whom they attend to most (multiple of even attention)"
    bottom.suptitle(title, fontsize=10)
    axes = bottom.subplots(2, 17, width_ratios=[1] * 8 + [0.4] + [1] * 8)
    for ax in axes[:, 8]:
        ax.axis("off")
    for row, rank in zip((axes[0, :8], axes[0, 9:], axes[1, :8], axes[1, 9:]), (0, 5, 8, 9), strict=True):
        query = rank * PER_CLASS
        others = [i for i in np.argsort(-shown.weights[query]) if i != query][:7]
        for ax, i in zip(row, [query, *others], strict=True):
            ax.imshow(shown.images[i], cmap="gray_r")
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(f"{shown.weights[query, i]:.1f}", fontsize=8)
        row[0].set_xlabel(f"{sizes[rank]} images", fontsize=7)
        row[0].spines[:].set(color=WITH, linewidth=3)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path


def main(argv: list[str] | None = None) -> dict[int, Relations]:
    """Runs the example; returns the maps of every seed."""
    args = arguments(__doc__, argv)
    introduce(fastbf.BatchFormer(CHANNELS, device=args.device), torch.empty(50, CHANNELS, device=args.device))
    settings = Settings(epochs=20 if args.quick else 100, amp=False)
    results = run_all(partial(relate, settings=settings), range(args.seeds), args.device)
    attention, gradient = (np.stack([results[seed][i] for seed in range(args.seeds)]) for i in range(2))
    print(f"\nmean ± standard error over {args.seeds} seeds\n")
    print("\n".join([*report(attention, gradient), "", *FOOTNOTE]))
    print(f"\npicture: {draw(args.out / 'relations.png', attention[:, 1], gradient[:, 1], results[0])}")
    return results


if __name__ == "__main__":
    main()
