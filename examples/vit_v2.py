"""BatchFormerV2 in a small ViT on handwritten digits, and in a ViT of timm.

    python examples/vit_v2.py [--data digits|mnist] [--steps N] [--sizes N ...] [--out DIR] [--seeds N]
                              [--device auto|cpu|cuda] [--quick]

Images of 8 × 8 pixels as 16 patches and a class token, four blocks, few training images. `insert_batchformer` puts one
BatchFormer behind the second block, which forks the tokens, and one behind the third, which finds them forked; training
runs on both streams, prediction on the plain one. ``--data mnist`` takes images of 28 × 28 pixels as 49 patches, trains
longer, and has one BatchFormer behind three quarters of the blocks, as the authors' DeiT. Prints accuracies and paired
differences with their intervals, shows that the stripped model predicts the same, saves a picture; where timm is
installed, does the same to one of its ViTs.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mnist
import numpy as np
import torch
from comparison import FOOTNOTE, Mean, table
from experiment import arguments, introduce, run_all
from plots import WITH, WITHOUT, plt
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastbf

CLASSES, CHANNELS, DEPTH, BATCH = 10, 32, 4, 64
SIZES = (40,)  # training images of each class
RATE = 4e-3  # chosen without BatchFormer, of 2e-3 and 4e-3, on other seeds


def load_digits_8x8() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) with values in [0, 1] and labels (1797,)."""
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.from_numpy(digits.target)


class Data(NamedTuple):
    """Where images and labels come from, and what is trained on them."""

    load: Callable[[], tuple[Tensor, Tensor]]
    patch: int  # pixels along a side
    patches: int
    after: tuple[int, ...]  # blocks that a BatchFormer follows
    test: int  # images of every class
    steps: int


DATA = {
    "digits": Data(load_digits_8x8, 2, 16, (1, 2), 50, 400),
    "mnist": Data(mnist.load, 4, 49, (2,), 100, 600),
}


class Run(NamedTuple):
    """One training run."""

    size: int
    batchformer: bool
    seed: int


class Result(NamedTuple):
    curve: np.ndarray  # (10,) test accuracy in percent, at even distances
    model: ViT
    test: tuple[Tensor, Tensor]  # images and labels


class ViT(nn.Module):
    """A small one, with timm's names: ``blocks`` is an ``nn.Sequential`` on (N, L, C), ``embed_dim`` is C."""

    def __init__(self, patch: int = 2, patches: int = 16) -> None:
        super().__init__()
        self.embed_dim = CHANNELS
        self.patch_embed = nn.Conv2d(1, CHANNELS, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, CHANNELS))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + patches, CHANNELS))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(CHANNELS, 4, 2 * CHANNELS, 0.0, batch_first=True, norm_first=True)
                for _ in range(DEPTH)
            )
        )
        self.norm = nn.LayerNorm(CHANNELS)
        self.head = fastbf.SharedClassifier(CHANNELS, CLASSES)

    def embed(self, images: Tensor) -> Tensor:
        """(N, 1, height, width) → (N, 1 + patches, C), the class token first."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed

    def features(self, images: Tensor) -> Tensor:
        """The class token at the end: N rows, or 2N in training with BatchFormer."""
        return self.norm(self.blocks(self.embed(images)))[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def insert_batchformer(vit: nn.Module, after: Collection[int], **options: Any) -> list[fastbf.BatchFormer]:
    """Puts a BatchFormer behind some blocks of a ViT: the first forks the tokens, the others find them forked.

    Blocks keep their names, so checkpoints made without BatchFormer load with ``strict=False``, and those of the
    stripped model load into a ViT that never had one. In training ``vit(images)`` then has 2N rows for N images:
    repeat the targets.

    Args:
        vit: changed in place; ``blocks`` is an ``nn.Sequential`` on (N, L, C), ``embed_dim`` is C, as in timm.
        after: indices of blocks.
        options: of every ``fastbf.BatchFormer``.

    Returns:
        The new modules, for a parameter group of their own.
    """
    if not after or not set(after) <= set(range(len(vit.blocks))):
        raise ValueError(f"after must hold indices of the {len(vit.blocks)} blocks, got {after}")
    parts, inserted = OrderedDict(), []
    for i, (name, block) in enumerate(vit.blocks.named_children()):
        parts[name] = block
        if i in after:
            former = fastbf.BatchFormer(vit.embed_dim, forked=bool(inserted), **options)
            parts[f"batchformer{i}"] = former.to(next(block.parameters())).train(vit.training)
            inserted.append(former)
    vit.blocks = nn.Sequential(parts)
    return inserted


def load(data: Data, size: int, seed: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) for training, ``size`` of each class, and for testing, sorted by class."""
    images, labels = data.load()
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = [order[labels.numpy()[order] == c] for c in range(CLASSES)]
    test, train = (
        torch.from_numpy(np.concatenate([rows[part] for rows in by_class]))
        for part in (slice(data.test), slice(data.test, data.test + size))
    )
    return (images[train].to(device), labels[train].to(device)), (images[test].to(device), labels[test].to(device))


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The class of every image, from the model in evaluation mode."""
    return model.eval()(images).argmax(-1)


def train(run: Run, data: Data, steps: int, device: torch.device) -> Result:
    """Trains one ViT and measures it ten times on the way."""
    torch.manual_seed(run.seed)
    (images, labels), test = load(data, run.size, run.seed, device)
    model = ViT(data.patch, data.patches).to(device)
    groups = [{"params": list(model.parameters()), "max_lr": RATE}]
    if run.batchformer:  # made last, so that both arms begin with the same weights
        formers = nn.ModuleList(insert_batchformer(model, data.after))
        groups.append({"params": list(formers.parameters()), "max_lr": RATE / 2})  # half, as in the paper's code
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.05)
    rates = [group["max_lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, cycle_momentum=False)
    # A generator of its own, so that both arms see the same batches.
    random = torch.Generator().manual_seed(run.seed)
    curve = []
    for step in range(steps):
        rows = torch.randperm(len(labels), generator=random)[:BATCH].to(device)
        loss = model.head.loss(model.train().features(images[rows]), labels[rows])  # 2N rows, N labels
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % (steps // 10) == 0:
            curve.append((predict(model, test[0]) == test[1]).float().mean().item() * 100)
    return Result(np.array(curve), model.eval(), test)


def accuracy(run: Run, device: torch.device, data: Data, steps: int) -> np.ndarray:
    """During training, in percent."""
    return train(run, data, steps, device).curve


def check_strip(model: nn.Module, images: Tensor) -> str:
    """Strips a model, compares its predictions, and says so."""
    stripped = fastbf.strip(copy.deepcopy(model))
    if not torch.equal(predict(stripped, images), predict(model, images)):
        raise RuntimeError("the stripped model predicts something else: please report this")
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, stripped))
    return f"stripped: {before:,} → {after:,} parameters, the same {len(images)} test predictions"


def check_timm(device: torch.device) -> str:
    """The same insertion in one of timm's ViTs, if there is timm; behind the ninth of its twelve blocks."""
    try:
        import timm
    except ImportError as error:
        return f"timm: not imported ({error})"
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=CLASSES).to(device)
    insert_batchformer(vit, after=[8])
    images = torch.randn(4, 3, 64, 64, device=device)
    rows = len(vit.train()(images)), len(vit.eval()(images))
    return f"timm {timm.__version__}: {rows[0]} rows in training, {rows[1]} in evaluation; {check_strip(vit, images)}"


def draw(path: Path, curves: dict[bool, np.ndarray], size: int, steps: int) -> Path:
    """Accuracy during training, (seeds, 10) for each arm."""
    fig, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for arm, colour, marker in ((False, WITHOUT, "s"), (True, WITH, "o")):
        mean, half = np.array([Mean.of(v) for v in curves[arm].T]).T
        at = steps // 10 * np.arange(1, 11)
        label = "with BatchFormerV2" if arm else "without"
        ax.errorbar(at, mean, half, color=colour, marker=marker, capsize=3, lw=1.8, label=label)
    ax.set_xlabel("training step")
    ax.set_ylabel("test accuracy, percent")
    ax.set_title(f"{size} images a class: mean and 95 % interval of {len(curves[True])} seeds", fontsize=10)
    ax.legend(loc="lower right")
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path


def main(argv: list[str] | None = None) -> dict[Run, np.ndarray]:
    """Runs the example; returns the accuracies of every run."""
    options = {
        "--data": {"choices": tuple(DATA), "default": "digits", "help": "8 or 28 pixels a side"},
        "--steps": {"type": int, "help": "of training, a multiple of ten"},
        "--sizes": {"type": int, "nargs": "+", "default": SIZES, "help": "training images of each class"},
    }
    args = arguments(__doc__, argv, seeds=5, options=options)
    device, seeds = args.device, range(args.seeds)
    data = DATA[args.data]
    sizes, steps = (SIZES, 100) if args.quick else (args.sizes, args.steps or data.steps)
    tokens = torch.empty(BATCH, 1 + data.patches, CHANNELS, device=device)
    introduce(fastbf.BatchFormer(CHANNELS, device=device), tokens)
    runs = [Run(*r) for r in itertools.product(sizes, (False, True), seeds)]
    results = run_all(partial(accuracy, data=data, steps=steps), runs, device)

    def curves(size: int, arm: bool) -> np.ndarray:
        return np.stack([results[Run(size, arm, seed)] for seed in seeds])

    print(f"\n{args.data}: test accuracy in percent, means over {args.seeds} seeds\n")
    rows = {str(size): (curves(size, False)[:, -1], curves(size, True)[:, -1]) for size in sizes}
    print("\n".join([*table("training images per class", rows), "", *FOOTNOTE, ""]))

    torch.set_num_threads(1)  # as in run_all: two threads of so small a net wait for each other
    shown = train(Run(sizes[0], True, 0), data, steps, device)
    print(check_strip(shown.model, shown.test[0]))
    print(check_timm(device))
    per_arm = {arm: curves(sizes[0], arm) for arm in (False, True)}
    print(f"picture: {draw(args.out / f'vit_v2_{args.data}.png', per_arm, sizes[0], steps)}")
    return results


if __name__ == "__main__":
    main()
