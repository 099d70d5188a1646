"""Compositional zero-shot learning: digits × attributes, some pairs never seen, with and without BatchFormer.

    python examples/compositional_zero_shot.py [--data digits|glyphs] [--out DIR] [--seeds N]
                                               [--device auto|cpu|cuda] [--quick]

Scikit-learn's bundled digits × eight operations (rotated, inverted, thick, ...), or 16 characters × ten fonts. Of each
attribute's pairs three in ten are held out, drawn anew for every seed; the others have ten training images each. A
small network composes the embeddings of an object and of an attribute into one row of classifier weight, so a pair that
was never seen has its row all the same: ``linear_cross_entropy`` takes the computed rows as they are and sends them
their gradient.

All pairs compete at test time (generalized CZSL). Unseen pairs score too low there, so a calibration bias is added to
their scores and swept from -inf to +inf; reported are the accuracy on seen and on unseen pairs at the ends of the
sweep, the best harmonic mean of the two and the area under their curve (Chao et al., ECCV 2016; Purushwalkam et al.,
ICCV 2019; as in CGE, Naeem et al., CVPR 2021, the baseline of BatchFormer's own CZSL experiments). Epochs were chosen
without BatchFormer; its learning rate is a tenth. docs/examples.md has the results.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import glyphs
import numpy as np
import torch
import torch.nn.functional as F
from comparison import FOOTNOTE, Mean, table
from experiment import arguments, introduce, run_all
from plots import WITH, WITHOUT, plt
from scipy import ndimage
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastbf
from fastbf.functional import linear_cross_entropy

TRAIN_PER_PAIR, TEST_PER_PAIR, CHANNELS = 10, 20, 64
TEMPERATURE = 0.05
STRIPES = (np.arange(12) % 3 > 0).astype(float)
# Each takes one image, 12 × 12 with values in [0, 1].
ATTRIBUTES = {
    "plain": lambda x: x,
    "rotated": np.rot90,
    "mirrored": np.fliplr,
    "inverted": lambda x: 1 - x,
    "thick": lambda x: ndimage.grey_dilation(x, (2, 2)),
    "shifted": lambda x: np.roll(x, (2, 2), (0, 1)),
    "faint": lambda x: 0.4 * x,
    "striped": lambda x: x * STRIPES,
}
TEST_IMAGES = 60  # of each digit, shared by the attributes
FONTS = (
    "DejaVuSans", "DejaVuSans-BoldOblique", "DejaVuSerif", "DejaVuSerif-BoldItalic", "DejaVuSansMono",
    "STIXGeneral", "STIXGeneralBolIta", "cmr10", "cmtt10", "cmmi10",
)  # fmt: skip
CHARACTERS = glyphs.CHARACTERS[:16]


class Data(NamedTuple):
    """Objects, digits or characters; attributes, image operations or fonts; and images of a pair."""

    objects: str
    attributes: tuple[str, ...]
    load: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]  # (pairs, n, H, W): training and test images
    epochs: int

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of objects and of attributes; pairs are numbered object by object."""
        return len(self.objects), len(self.attributes)


def changed_digits(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Training and test images of digit × operation, (80, n, 12, 12), from different digits."""
    digits = load_digits()
    images = np.pad(digits.images / 16, ((0, 0), (2, 2), (2, 2)))
    sets = [], []
    for digit in range(10):
        samples = random.permutation(np.flatnonzero(digits.target == digit))
        parts = (samples[TEST_IMAGES:], TRAIN_PER_PAIR), (samples[:TEST_IMAGES], TEST_PER_PAIR)
        for change in ATTRIBUTES.values():
            for images_of_pairs, (part, count) in zip(sets, parts, strict=True):
                images_of_pairs.append([change(images[n]) for n in random.choice(part, count, replace=False)])
    return np.array(sets[0]), np.array(sets[1])


def written_characters(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Training and test images of character × font, (160, n, 14, 14), each distorted for itself."""
    fonts = [glyphs.FONTS.index(name) for name in FONTS]
    sources = glyphs.draw()[fonts, : len(CHARACTERS)].transpose(0, 1).flatten(0, 1)
    generator = torch.Generator().manual_seed(int(random.integers(2**31)))
    count = TRAIN_PER_PAIR + TEST_PER_PAIR
    images = glyphs.distort(sources.repeat_interleave(count, dim=0), generator, strength=0.5)
    images = F.avg_pool2d(images, 2).view(len(sources), count, 14, 14).numpy()
    return images[:, :TRAIN_PER_PAIR], images[:, TRAIN_PER_PAIR:]


DATA = {
    "digits": Data("0123456789", tuple(ATTRIBUTES), changed_digits, 100),
    "glyphs": Data(CHARACTERS, FONTS, written_characters, 40),
}


class Run(NamedTuple):
    """One training run."""

    batchformer: bool
    seed: int


class Curve(NamedTuple):
    """Accuracy in percent at every calibration bias that changes a prediction, the least bias first."""

    seen: np.ndarray  # falls from its best to 0
    unseen: np.ndarray  # rises from 0 to its best

    def metrics(self) -> dict[str, float]:
        """Best accuracy on seen and on unseen pairs, best harmonic mean, area under the curve; in percent."""
        harmonic = 2 * self.seen * self.unseen / np.maximum(self.seen + self.unseen, 1e-9)
        area = (np.diff(self.unseen) * (self.seen[1:] + self.seen[:-1]) / 2).sum() / 100
        return {"seen": self.seen.max(), "unseen": self.unseen.max(), "harmonic mean": harmonic.max(), "AUC": area}


def seen_unseen_curve(scores: np.ndarray, labels: np.ndarray, unseen: np.ndarray) -> Curve:
    """The exact curve: one point for each bias at which a sample goes over from a seen to an unseen pair.

    Args:
        scores: (N, K) of all pairs.
        labels: (N,) the right pairs; some seen, some unseen.
        unseen: (K,) whether a pair was held out.
    """
    rows = np.arange(len(labels))
    best_seen = np.where(unseen, -np.inf, scores).argmax(1)
    best_unseen = np.where(unseen, scores, -np.inf).argmax(1)
    margin = scores[rows, best_seen] - scores[rows, best_unseen]  # a bias above it makes the prediction an unseen pair
    of_unseen = unseen[labels]
    biases = [*np.unique(margin), np.inf]
    kept = np.sort(margin[(best_seen == labels) & ~of_unseen])
    won = np.sort(margin[(best_unseen == labels) & of_unseen])
    return Curve(
        100 * (len(kept) - np.searchsorted(kept, biases)) / (~of_unseen).sum(),
        100 * np.searchsorted(won, biases) / of_unseen.sum(),
    )


class Net(nn.Module):
    """Image features on one side, composed pair embeddings on the other; the score is their cosine."""

    def __init__(self, data: Data, batchformer: bool) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(576, CHANNELS),
        )  # fmt: skip
        self.objects, self.attributes = (nn.Embedding(count, CHANNELS) for count in data.shape)
        self.compose = nn.Sequential(nn.Linear(2 * CHANNELS, CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, CHANNELS))
        # Made last, so that both arms begin with the same weights.
        self.batchformer = fastbf.BatchFormer(CHANNELS) if batchformer else nn.Identity()

    def pair_weight(self, pairs: Tensor) -> Tensor:
        """One row of classifier weight for each pair: (K,) → (K, C)."""
        count = self.attributes.num_embeddings
        parts = self.objects(pairs // count), self.attributes(pairs % count)
        return F.normalize(self.compose(torch.cat(parts, dim=1)), dim=1)

    def features(self, images: Tensor) -> Tensor:
        """(N, C); in training with BatchFormer the fork, (2N, C)."""
        return F.normalize(self.batchformer(self.backbone(images)), dim=1)

    def loss(self, images: Tensor, target: Tensor, seen: Tensor) -> Tensor:
        """Cross-entropy over the seen pairs, in whose numbering the N targets are, of N or 2N rows of features."""
        return linear_cross_entropy(self.features(images), self.pair_weight(seen), target, scale=1 / TEMPERATURE)

    def forward(self, images: Tensor, pairs: Tensor) -> Tensor:
        """Scores of any pairs, seen or not."""
        return self.features(images) @ self.pair_weight(pairs).T


def unseen_pairs(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """(objects · attributes,) with three in ten objects of each attribute held out, as even as can be by object."""
    objects, attributes = random.permutation(shape[0])[:, None], random.permutation(shape[1])
    return ((objects + attributes * shape[0] // shape[1]) % shape[0] < round(0.3 * shape[0])).ravel()


def load(
    data: Data, random: np.random.Generator, unseen: np.ndarray
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, pairs) for training, seen pairs only, and for testing, all pairs, from other images."""
    train, test = data.load(random)

    def flat(images: np.ndarray, pairs: np.ndarray) -> tuple[Tensor, Tensor]:
        flat = torch.tensor(images[pairs].reshape(-1, 1, *images.shape[2:]), dtype=torch.float32)
        return flat, torch.from_numpy(pairs.repeat(images.shape[1]))

    return flat(train, np.flatnonzero(~unseen)), flat(test, np.arange(len(unseen)))


def train(run: Run, device: torch.device, name: str, epochs: int) -> Curve:
    """Trains one model, strips it and measures it."""
    torch.manual_seed(run.seed)
    random, data = np.random.default_rng(run.seed), DATA[name]
    unseen = unseen_pairs(random, data.shape)
    (images, pairs), (test_images, test_pairs) = load(data, random, unseen)
    seen = torch.from_numpy(np.flatnonzero(~unseen))
    images, target, seen = images.to(device), torch.searchsorted(seen, pairs).to(device), seen.to(device)
    model = Net(data, run.batchformer).to(device)
    rate, steps = 0.05, epochs * -(-len(target) // 64)
    module = list(model.batchformer.parameters())
    others = [p for name, p in model.named_parameters() if not name.startswith("batchformer.")]
    groups = [{"params": others, "max_lr": rate}] + [{"params": module, "max_lr": rate / 10}] * bool(module)
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["max_lr"] for g in groups], total_steps=steps, cycle_momentum=False
    )
    # A generator of its own, so that both arms see the same batches.
    order = torch.Generator().manual_seed(run.seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(target), generator=order).to(device).split(64):
            loss = model.loss(images[rows], target[rows], seen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    fastbf.strip(model).eval()
    with torch.no_grad():
        scores = model(test_images.to(device), torch.arange(len(unseen), device=device))
    return seen_unseen_curve(scores.cpu().numpy(), test_pairs.numpy(), unseen)


def draw(path: Path, curves: dict[bool, list[Curve]]) -> Path:
    """The curves of both arms, averaged over seeds."""
    fig, ax = plt.subplots(figsize=(6, 4.6), layout="constrained")
    for arm, colour in ((False, WITHOUT), (True, WITH)):
        # Every curve has points of its own: they are averaged along rays from the origin, which each meets once.
        rays = np.linspace(0, np.pi / 2, 200)
        radii = np.stack([np.interp(rays, np.arctan2(c.unseen, c.seen), np.hypot(*c)) for c in curves[arm]])
        mean, half = np.array([Mean.of(radius) for radius in radii.T]).T
        directions = np.stack([np.sin(rays), np.cos(rays)])
        ax.plot(*(mean * directions), color=colour, lw=1.8, label="with BatchFormer" if arm else "without")
        band = np.concatenate([(mean - half) * directions, ((mean + half) * directions)[:, ::-1]], axis=1)
        ax.fill(*band, color=colour, alpha=0.25, lw=0)
    ax.set(xlabel="accuracy on unseen pairs, percent", ylabel="accuracy on seen pairs, percent")
    ax.set(xlim=(0, None), ylim=(0, None))
    ax.set_title(f"mean and 95 % interval of {len(curves[True])} seeds, along rays from 0", fontsize=10)
    ax.legend(loc="lower left")
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path


def main(argv: list[str] | None = None) -> dict[Run, Curve]:
    """Runs the example; returns the curve of every run."""
    options = {
        "--data": {
            "choices": tuple(DATA),
            "default": "digits",
            "help": "of pairs",
        }
    }
    args = arguments(__doc__, argv, options=options)
    introduce(fastbf.BatchFormer(CHANNELS, device=args.device), torch.empty(64, CHANNELS, device=args.device))
    runs = [Run(arm, seed) for arm in (False, True) for seed in range(args.seeds)]
    epochs = 10 if args.quick else DATA[args.data].epochs
    results = run_all(partial(train, name=args.data, epochs=epochs), runs, args.device)
    curves = {arm: [results[Run(arm, seed)] for seed in range(args.seeds)] for arm in (False, True)}
    metrics = {arm: [curve.metrics() for curve in curves[arm]] for arm in curves}
    rows = {
        name: tuple(np.array([m[name] for m in metrics[arm]]) for arm in (False, True)) for name in metrics[True][0]
    }
    unseen = unseen_pairs(np.random.default_rng(0), DATA[args.data].shape)
    print(f"\n{args.data}: generalized zero-shot accuracy in percent, means over {args.seeds} seeds\n")
    print("\n".join([*table(f"{sum(~unseen)} seen and {sum(unseen)} unseen pairs", rows), "", *FOOTNOTE]) + "\n")
    print(f"picture: {draw(args.out / f'compositional_zero_shot_{args.data}.png', curves)}")
    return results


if __name__ == "__main__":
    main()
