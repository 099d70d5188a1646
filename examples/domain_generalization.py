"""Domain generalization: rotated digits or families of fonts, one domain left out, with and without BatchFormer.

    python examples/domain_generalization.py [--data digits|glyphs] [--out DIR] [--seeds N]
                                             [--device auto|cpu|cuda] [--quick]

Scikit-learn's bundled digits in six domains, rotated by 0 to 75 degrees, every image in one domain only, dealt anew for
every seed (as Rotated MNIST in DomainBed, Gulrajani and Lopez-Paz, ICLR 2021); or 49 characters in five families of
fonts. A small conv net learns from all domains but one by ERM, that is plain cross-entropy over all of them with the
same number of images of each in a batch, and is measured on that one. With BatchFormer the images of all source domains
attend to each other along the batch. Net, rate and epochs were chosen without BatchFormer, to fit in minutes.
docs/examples.md has the results.
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
from plots import WITH, plt
from scipy import ndimage
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastbf

ANGLES = (0, 15, 30, 45, 60, 75)
#: What names of fonts begin with; a font belongs to the longest that fits.
FAMILIES = {"sans": "DejaVuSans", "serif": "DejaVuSerif", "mono": "DejaVuSansMono", "STIX": "STIX", "TeX": "cm"}
CHANNELS, PER_DOMAIN = 64, 16  # images of each source domain in a batch


class Run(NamedTuple):
    """One training run."""

    held_out: int  # a domain
    batchformer: bool
    seed: int


class Net(nn.Module):
    """An ERM network; BatchFormer changes nothing but its loss."""

    def __init__(self, classes: int, side: int, batchformer: bool) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * (side // 4) ** 2, CHANNELS), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Linear(CHANNELS, classes)
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


class Data(NamedTuple):
    """Domains of as many images each."""

    domains: tuple[str, ...]
    classes: int
    side: int
    load: Callable[[int], tuple[Tensor, Tensor]]  # seed → images (domains, n, 1, side, side) and labels (domains, n)
    epochs: int


def rotated_digits(seed: int) -> tuple[Tensor, Tensor]:
    """Images (6, 299, 1, 10, 10) and labels (6, 299): every image in one domain only."""
    digits = load_digits()
    images = np.pad(digits.images / 16, ((0, 0), (1, 1), (1, 1)))  # room for the corners
    count = len(images) // len(ANGLES)
    dealt = np.random.default_rng(seed).permutation(len(images))[: count * len(ANGLES)].reshape(len(ANGLES), count)
    rotated = [
        ndimage.rotate(images[rows], angle, axes=(2, 1), reshape=False, order=1)
        for angle, rows in zip(ANGLES, dealt, strict=True)
    ]
    return torch.tensor(np.stack(rotated)[:, :, None], dtype=torch.float32), torch.from_numpy(digits.target[dealt])


def members(family: str) -> list[int]:
    """Places of a family's fonts in ``glyphs.FONTS``."""
    of = [
        max((f for f in FAMILIES if name.startswith(FAMILIES[f])), key=lambda f: len(FAMILIES[f]))
        for name in glyphs.FONTS
    ]
    return [place for place, name in enumerate(of) if name == family]


def families_of_fonts(seed: int) -> tuple[Tensor, Tensor]:
    """Images (5, 490, 1, 14, 14) and labels (5, 490): ten of each character in each family, in any of its fonts."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(glyphs.CHARACTERS)).repeat_interleave(10)
    domains = []
    for family in FAMILIES:
        fonts = torch.tensor(members(family))
        chosen = fonts[torch.randint(len(fonts), labels.shape, generator=random)]
        domains.append(F.avg_pool2d(glyphs.distort(glyphs.draw()[chosen, labels], random, strength=0.5), 2))
    return torch.stack(domains), labels.expand(len(domains), -1)


DATA = {
    "digits": Data(tuple(f"{angle} degrees" for angle in ANGLES), 10, 10, rotated_digits, 20),
    "glyphs": Data(tuple(FAMILIES), len(glyphs.CHARACTERS), 14, families_of_fonts, 15),
}


def train(run: Run, device: torch.device, name: str, epochs: int) -> float:
    """Trains one model on all domains but one, strips it, and returns its accuracy on that one in percent."""
    torch.manual_seed(run.seed)
    data = DATA[name]
    images, labels = (x.to(device) for x in data.load(run.seed))
    sources = torch.tensor([i for i in range(len(data.domains)) if i != run.held_out], device=device)[:, None]
    model = Net(data.classes, data.side, run.batchformer).to(device)
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
    with torch.no_grad():
        return 100 * (model(images[run.held_out]).argmax(1) == labels[run.held_out]).float().mean().item()


def draw(path: Path, data: Data, rows: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """Paired difference for every held-out domain, each above an image of that domain."""
    images, _ = data.load(0)
    fig, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    differences = [rows[name][1] - rows[name][0] for name in data.domains]
    means, halves = np.array([Mean.of(d) for d in differences]).T
    places = np.arange(len(differences))
    ax.axhline(0, color="#666666", lw=0.8)
    ax.plot(places, np.array(differences), ".", color="#BBBBBB")
    ax.errorbar(places, means, halves, color=WITH, marker="D", ls="", capsize=4, lw=1.8)
    ax.set_ylabel("with BatchFormer minus without, points")
    ax.set_title(f"every seed (grey), mean and 95 % interval of {len(differences[0])} seeds", fontsize=10)
    ax.set_xticks(places, data.domains)
    ax.set_xlabel("held-out domain")
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.35 * (high - low), high)  # room for the images
    for place, image in zip(places, images[:, 0, 0], strict=True):
        inset = ax.inset_axes((place - 0.2, 0.02, 0.4, 0.22), transform=ax.get_xaxis_transform())
        inset.imshow(image, cmap="gray")
        inset.axis("off")
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path


def main(argv: list[str] | None = None) -> dict[Run, float]:
    """Runs the example; returns the accuracy of every run."""
    options = {"--data": {"choices": tuple(DATA), "default": "digits", "help": "rotated digits, or families of fonts"}}
    args = arguments(__doc__, argv, options=options)
    data = DATA[args.data]
    introduce(fastbf.BatchFormer(CHANNELS, device=args.device), torch.empty(80, CHANNELS, device=args.device))
    domains = range(len(data.domains))
    runs = [Run(held, arm, seed) for held in domains for arm in (False, True) for seed in range(args.seeds)]
    epochs = 5 if args.quick else data.epochs
    results = run_all(partial(train, name=args.data, epochs=epochs), runs, args.device)

    def accuracies(held: int, arm: bool) -> np.ndarray:
        return np.array([results[Run(held, arm, seed)] for seed in range(args.seeds)])

    rows = {name: (accuracies(i, False), accuracies(i, True)) for i, name in enumerate(data.domains)}
    rows["mean of all"] = tuple(np.mean([r[arm] for r in rows.values()], axis=0) for arm in (0, 1))
    print(f"\n{args.data}: accuracy on the held-out domain in percent, means over {args.seeds} seeds\n")
    print("\n".join([*table("held-out domain", rows), "", *FOOTNOTE]) + "\n")
    print(f"picture: {draw(args.out / f'domain_generalization_{args.data}.png', data, rows)}")
    return results


if __name__ == "__main__":
    main()
