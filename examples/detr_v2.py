"""A small DETR on scenes of handwritten digits, with and without BatchFormerV2 in its encoder.

    python examples/detr_v2.py [--epochs N] [--out DIR] [--seeds N] [--device auto|cpu|cuda] [--quick]

One to three of scikit-learn's digits, in random sizes, on canvases of different sizes padded to one; a pretrained conv
stem, encoder and decoder in DETR's layout (L, N, C), and its matching loss on both streams. It shows the wiring:
padding masks, positional encodings and targets are doubled by the module that doubles the features; the queries are
made afterwards. The wiring is the point: training as short as this loses by the second stream, and one of 20 epochs
gains nothing. docs/examples.md has the results.
"""

from __future__ import annotations

import copy
import itertools
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from comparison import FOOTNOTE, Mean, table
from experiment import arguments, introduce, run_all
from plots import WITH, WITHOUT, plt
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastbf

CLASSES, CHANNELS, STRIDE = 10, 64, 4
SIDES, SIZES = (20, 24, 28), (8, 10, 12)  # of canvases and of digits, in pixels
TEST_DIGITS, TEST_SCENES = 500, 300

Target = dict[
    str, Tensor
]  # "labels" (T,) and "boxes" (T, 4): centre, width and height in shares of the image without padding
Found = dict[str, np.ndarray]  # the same of predictions, with "scores" (T,)


class Run(NamedTuple):
    """One training run."""

    batchformer: bool
    seed: int


class Scenes(NamedTuple):
    images: Tensor  # (N, 1, H, W)
    padding: Tensor  # (N, H / STRIDE, W / STRIDE), True where there is no image
    targets: list[Target]


class Result(NamedTuple):
    ap: np.ndarray  # mean average precision in percent, at IoU 0.5 and 0.75
    parameters: tuple[int, int]  # before and after strip


class Detector(nn.Module):
    """DETR with one BatchFormer behind each encoder layer: the first forks the stream, the second finds it forked."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS),
        )  # fmt: skip
        sizes = {"d_model": CHANNELS, "nhead": 4, "dim_feedforward": 2 * CHANNELS, "dropout": 0.0, "norm_first": True}
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(**sizes) for _ in range(2))
        self.streams = nn.ModuleList(fastbf.BatchFormer(CHANNELS, batch_dim=1, forked=i > 0) for i in range(2))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(**sizes) for _ in range(2))
        self.norm = nn.LayerNorm(CHANNELS)
        # Queries begin at a grid of anchors, as in Anchor DETR: minutes are too few to learn places for them.
        anchors = torch.cartesian_prod(*[torch.linspace(0.2, 0.8, 3)] * 2)
        self.register_buffer("anchors", torch.cat([anchors, torch.full_like(anchors, 0.4)], dim=-1))  # (Q, 4)
        self.queries = nn.Parameter(torch.zeros(len(anchors), 1, CHANNELS))
        self.classify = nn.Linear(CHANNELS, CLASSES + 1)  # the last class: no object
        self.locate = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, 4))

    def forward(self, images: Tensor, padding: Tensor, *targets: list[Target]) -> tuple:
        """(list of logits (N, Q, K + 1) and boxes (N, Q, 4) of each decoder layer, *targets); training: 2N for N."""
        x = self.stem(images).flatten(2).permute(2, 0, 1)  # (L, N, C)
        # Like targets, whatever is to be doubled has the samples in front: (N, L, C) and (N, L).
        positions, padding = encode(shares(padding)), padding.flatten(1)
        for layer, stream in zip(self.encoder, self.streams, strict=True):
            x = layer(x + positions.transpose(0, 1), src_key_padding_mask=padding)
            # Everything that belongs to a sample goes through the module: doubled by the first, left by the second.
            x, padding, positions, *targets = stream(x, padding, positions, *targets)
        memory = x + positions.transpose(0, 1)
        # As many queries as the memory has samples, made here: nothing to double.
        hidden = (self.queries + encode(self.anchors[:, None, :2])).expand(-1, memory.shape[1], -1)
        outputs = []
        for layer in self.decoder:
            hidden = layer(hidden, memory, memory_key_padding_mask=padding)
            found = self.norm(hidden)
            boxes = (self.locate(found) + self.anchors.logit()[:, None]).sigmoid()
            outputs.append((self.classify(found).transpose(0, 1), boxes.transpose(0, 1)))
        return outputs, *targets


def shares(padding: Tensor) -> Tensor:
    """Where a position's middle lies in its image without the padding: (N, H, W) → (N, H · W, 2), x and y in [0, 1]."""
    inside = (~padding).float()
    steps = [(inside.cumsum(dim) - 0.5) / inside.sum(dim, keepdim=True).amax((1, 2), keepdim=True) for dim in (2, 1)]
    return torch.stack(steps, dim=-1).flatten(1, 2)


def encode(points: Tensor) -> Tensor:
    """Sine encodings of x and y: (…, 2) → (…, C)."""
    phases = points.unsqueeze(-1) * torch.arange(1, CHANNELS // 4 + 1, device=points.device) * (torch.pi / 2)
    return torch.cat([phases.sin(), phases.cos()], dim=-1).flatten(-2)


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of boxes (…, 4) as centre, width and height, broadcast."""
    a, b = (torch.cat([x[..., :2] - x[..., 2:] / 2, x[..., :2] + x[..., 2:] / 2], dim=-1) for x in (a, b))

    def area(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).clamp(min=0).prod(-1)

    common = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - common
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    iou = common / union.clamp(min=1e-9)
    return iou, iou - (hull - union) / hull.clamp(min=1e-9)


def matching_loss(outputs: list[tuple[Tensor, Tensor]], targets: list[Target]) -> Tensor:
    """DETR's loss, over all decoder layers; of as many targets as there are samples, so of both streams if forked."""
    labels, boxes = (torch.cat([t[name] for t in targets]) for name in ("labels", "boxes"))
    counts = [len(t["labels"]) for t in targets]
    weight = torch.ones(CLASSES + 1, device=labels.device)
    weight[-1] = 0.1
    total = torch.zeros((), device=labels.device)
    for logits, found in outputs:
        if len(logits) != len(targets):
            raise ValueError(f"{len(logits)} samples need as many targets, got {len(targets)}")
        with torch.no_grad():
            distance = (found[:, :, None] - boxes).abs().sum(-1)
            cost = 5 * distance - logits.softmax(-1)[..., labels] - 2 * overlap(found[:, :, None], boxes)[1]
        columns = cost.cpu().split(counts, dim=-1)  # of each sample, its own targets
        pairs = [linear_sum_assignment(part[i]) for i, part in enumerate(columns)]
        sample = torch.arange(len(targets)).repeat_interleave(torch.tensor(counts))
        query = torch.from_numpy(np.concatenate([rows for rows, _ in pairs]))
        offsets = np.cumsum([0, *counts[:-1]])
        order = torch.from_numpy(np.concatenate([c + o for (_, c), o in zip(pairs, offsets, strict=True)]))
        wanted = torch.full(logits.shape[:2], CLASSES, device=labels.device)
        wanted[sample, query] = labels[order]
        matched, truth = found[sample, query], boxes[order]
        total = total + F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight)
        total = total + (5 * (matched - truth).abs().sum() + 2 * (1 - overlap(matched, truth)[1]).sum()) / len(boxes)
    return total


def average_precision(found: list[Found], targets: list[Target], iou: float) -> float:
    """Mean over classes of the area under the precision-recall curve, every precision the best at that recall or more.

    A detection is right if it has the class of a box that no better-scored detection has taken, and overlaps it by
    ``iou`` or more; of several such boxes it takes the one it overlaps most.
    """
    areas = []
    for label in range(CLASSES):
        boxes = [t["boxes"][t["labels"] == label].cpu() for t in targets]
        count = sum(map(len, boxes))
        free = [np.ones(len(b), bool) for b in boxes]
        mine = [
            (f["scores"][i], n, f["boxes"][i])
            for n, f in enumerate(found)
            for i in np.flatnonzero(f["labels"] == label)
        ]
        right = []
        for _, n, box in sorted(mine, key=lambda detection: -detection[0]):
            overlaps = np.where(free[n], overlap(torch.from_numpy(box), boxes[n])[0].numpy(), 0)
            right.append(len(overlaps) > 0 and overlaps.max() >= iou)
            if right[-1]:
                free[n][overlaps.argmax()] = False
        if count:
            hits = np.cumsum(right)
            precision = hits / np.arange(1, len(right) + 1)
            best = np.maximum.accumulate(precision[::-1])[::-1]
            areas.append(best[np.array(right, bool)].sum() / count)
    return 100 * float(np.mean(areas))


def make_scenes(images: np.ndarray, labels: np.ndarray, count: int, seed: int, device: torch.device) -> Scenes:
    """Scenes of one to three of the digits given, without overlap."""
    random = np.random.default_rng(seed)
    side = max(SIDES)
    canvases, targets = torch.zeros(count, 1, side, side), []
    padding = torch.ones(count, side // STRIDE, side // STRIDE, dtype=torch.bool)
    for canvas, mask in zip(canvases[:, 0], padding, strict=True):
        limit = random.choice(SIDES)
        mask[: limit // STRIDE, : limit // STRIDE] = False
        found = []
        for _ in range(random.integers(1, 4)):
            sample, size = random.integers(len(images)), int(random.choice(SIZES))
            digit = torch.tensor(images[sample], dtype=torch.float32)[None, None]
            digit = F.interpolate(digit, size=(size, size), mode="bilinear")[0, 0]
            y, x = random.integers(0, limit - size + 1, 2)
            if canvas[y : y + size, x : x + size].any():
                continue  # taken: a digit fewer
            canvas[y : y + size, x : x + size] = digit
            rows, columns = (digit > 0.2).nonzero().T
            low, high = (torch.stack([f(columns) + int(x), f(rows) + int(y)]) for f in (torch.min, torch.max))
            found.append((labels[sample], torch.cat([low + high + 1, 2 * (high + 1 - low)]) / (2 * limit)))
        classes, boxes = zip(*found, strict=True)
        classes = torch.tensor(np.array(classes), device=device)
        targets.append({"labels": classes, "boxes": torch.stack(boxes).to(device)})
    return Scenes(canvases.to(device), padding.to(device), targets)


def load(seed: int, count: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], Scenes, Scenes]:
    """Single digits (images and labels) and scenes of them for training, scenes of other digits for testing."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    train, test = ((digits.images[rows] / 16, digits.target[rows]) for rows in np.split(order, [-TEST_DIGITS]))
    single = torch.tensor(train[0], dtype=torch.float32, device=device)[:, None], torch.tensor(train[1], device=device)
    return single, make_scenes(*train, count, 2 * seed, device), make_scenes(*test, TEST_SCENES, 2 * seed + 1, device)


def pretrain(stem: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Teaches the stem single digits in all sizes: a DETR begins with a pretrained backbone, or learns slowly."""
    head = nn.Linear(CHANNELS, CLASSES, device=images.device)
    optimizer = torch.optim.AdamW([*stem.parameters(), *head.parameters()], lr=2e-3)
    for _, size in itertools.product(range(epochs), SIZES):
        sized = F.interpolate(images, size=(size, size), mode="bilinear")
        for rows in torch.randperm(len(labels)).to(images.device).split(64):
            loss = F.cross_entropy(head(stem(sized[rows]).mean((2, 3))), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def detect(model: Detector, scenes: Scenes) -> list[Found]:
    """A detection for every query: its best class that is an object, and that class's probability as the score."""
    outputs, *_ = model.eval()(scenes.images, scenes.padding)
    logits, boxes = outputs[-1]
    scores, labels = logits.softmax(-1)[..., :-1].max(-1)
    rows = zip(scores.cpu().numpy(), labels.cpu().numpy(), boxes.cpu().numpy(), strict=True)
    return [dict(zip(("scores", "labels", "boxes"), row, strict=True)) for row in rows]


def train(run: Run, device: torch.device, epochs: int, count: int) -> Result:
    """Trains one detector and measures it."""
    torch.manual_seed(run.seed)
    single, train_set, test_set = load(run.seed, count, device)
    model = Detector().to(device)
    pretrain(model.stem, *single, epochs=min(epochs, 3))
    if not run.batchformer:
        fastbf.strip(model)  # the same initial weights, without the module
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    steps = epochs * -(-count // 16)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    order = torch.Generator().manual_seed(run.seed)  # of its own, so that both arms see the same batches
    for _ in range(epochs):
        for rows in torch.randperm(count, generator=order).split(16):
            targets = [train_set.targets[row] for row in rows]
            rows = rows.to(device)
            loss = matching_loss(*model.train()(train_set.images[rows], train_set.padding[rows], targets))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    found = detect(model, test_set)
    stripped = fastbf.strip(copy.deepcopy(model))
    if not all(np.array_equal(a[k], b[k]) for a, b in zip(found, detect(stripped, test_set), strict=True) for k in a):
        raise RuntimeError("the stripped model detects something else: please report this")
    ap = np.array([average_precision(found, test_set.targets, iou) for iou in (0.5, 0.75)])
    return Result(ap, tuple(sum(p.numel() for p in m.parameters()) for m in (model, stripped)))


def draw(path: Path, without: np.ndarray, mixed: np.ndarray) -> Path:
    """Average precision at IoU 0.5 of every seed, (seeds,) in each arm, and the difference with its interval."""
    fig, (ax, gain) = plt.subplots(1, 2, figsize=(6, 3.6), layout="constrained", width_ratios=(2, 1))
    ax.plot((0, 1), (without, mixed), color="#BBBBBB", lw=1)
    for place, values, colour in ((0, without, WITHOUT), (1, mixed, WITH)):
        ax.plot(np.full(len(values), place), values, "o", color=colour)
    ax.set_xticks((0, 1), ("without", "with BatchFormerV2"))
    ax.set_xlim(-0.4, 1.4)
    ax.set_ylabel("average precision at IoU 0.5, percent")
    ax.set_title("every seed", fontsize=10)
    difference = Mean.of(mixed - without)
    gain.axhline(0, color="#666666", lw=0.8)
    gain.errorbar(0, difference.value, difference.half, color=WITH, marker="D", capsize=4, lw=1.8)
    gain.set_xticks([])
    gain.set_title("with minus without", fontsize=10)
    fig.savefig(path, dpi=150)
    plt.close(fig)
    return path


def main(argv: list[str] | None = None) -> dict[Run, Result]:
    """Runs the example; returns the result of every run."""
    options = {"--epochs": {"type": int, "default": 8, "help": "of training on 1000 scenes"}}
    args = arguments(__doc__, argv, seeds=5, options=options)
    epochs, count = (1, 64) if args.quick else (args.epochs, 1000)
    features = torch.empty(49, 16, CHANNELS, device=args.device)
    introduce(fastbf.BatchFormer(CHANNELS, batch_dim=1, device=args.device), features)
    runs = [Run(*r) for r in itertools.product((False, True), range(args.seeds))]
    results = run_all(partial(train, epochs=epochs, count=count), runs, args.device)
    print(f"\nmean average precision in percent, {TEST_SCENES} test scenes, means over {args.seeds} seeds")
    ap = {arm: np.stack([results[Run(arm, seed)].ap for seed in range(args.seeds)]) for arm in (False, True)}
    rows = {f"IoU ≥ {iou}": (ap[False][:, i], ap[True][:, i]) for i, iou in enumerate((0.5, 0.75))}
    print("\n".join([*table("a detection needs", rows), "", *FOOTNOTE]) + "\n")
    before, after = results[Run(True, 0)].parameters
    print(f"stripped: {before:,} → {after:,} parameters, the same detections in all {TEST_SCENES} test scenes")
    print(f"picture: {draw(args.out / 'detr_v2.png', ap[False][:, 0], ap[True][:, 0])}")
    return results


if __name__ == "__main__":
    main()
