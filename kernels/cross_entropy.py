"""Cross-entropy over logits that lie in memory in the dtype of the product that made them, forward and backward.

logits = scale · z + logit_bias, z (M, K); class indices, of which row r has that of row r mod N: a fork repeats its
targets without a copy. Statistics in fp32, over chunks of the classes, so that any K does. Forward leaves a few numbers
a row, which one program then adds up in a fixed order; backward computes the probabilities again from z and those
numbers, and leaves partial sums of the bias's gradient.

NaN and Inf go where ``F.cross_entropy`` takes them. A class index out of range is never read at: its loss is NaN.
"""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from fastbf.kernels.launch import cdiv, launch
from fastbf.kernels.rows import Tile

#: Numbers that forward leaves of a row: its loss; what it adds to the mean's denominator; its largest logit, and the
#: log of the sum of exponentials relative to that (their sum would lose what tells large logits apart); and 0 where the
#: row is ignored, 1 where the largest logit is another class, 2 where it is the target's.
ROW = 5

_RUNTIME = ["rows", "targets", "ignore_index", "tiles", "stride", "grad_stride"]
# Eight rows: what is kept of each row, in every thread that shares it, spills where a tile holds many.
_TILE_ELEMENTS, _MAX_ROWS, _MAX_CLASSES, _WARPS = 2048, 8, 2048, 4
BACKWARD_REGISTERS = 160


@cache
def class_tile(num_classes: int) -> Tile:
    """Rows and classes of a tile; a row of more classes is walked over."""
    width = min(_MAX_CLASSES, max(32, 1 << (num_classes - 1).bit_length()))
    return Tile(min(_MAX_ROWS, _TILE_ELEMENTS // width), width, _WARPS)


@triton.jit
def _target(p_target, index, rows, targets, ignore_index, K: tl.constexpr):
    """Of rows [BM]: the class (0 where there is none), whether it is one, whether the row counts."""
    inside = index < rows
    t = tl.load(p_target + (index % targets), mask=inside, other=0)
    valid = (t >= 0) & (t < K) & inside
    return tl.where(valid, t, 0).to(tl.int32), valid, inside & (t != ignore_index)


@triton.jit
def _logits(z, p_logit_bias, columns, scale, HAS_LOGIT_BIAS: tl.constexpr, K: tl.constexpr):
    """z as read → logits, fp32."""
    s = z.to(tl.float32) * scale
    if HAS_LOGIT_BIAS:
        s += tl.load(p_logit_bias + columns, mask=columns < K, other=0.0).to(tl.float32)
    return s


@triton.jit(do_not_specialize=_RUNTIME)
def cross_entropy_forward(
    p_z, p_target, p_weight, p_logit_bias, p_rows,
    rows: tl.int32, targets: tl.int32, ignore_index: tl.int64, scale: tl.float32, smoothing: tl.float32,
    K: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_LOGIT_BIAS: tl.constexpr, SMOOTH: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """BM rows, each as ``ROW`` says. Grid: ⌈rows / BM⌉."""
    index = tl.program_id(0) * BM + tl.arange(0, BM)
    t, valid, counts = _target(p_target, index, rows, targets, ignore_index, K)
    base = index.to(tl.int64) * K
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    shift = tl.zeros((BM,), tl.float32)  # top, or 0 while all classes are switched off
    weighted = tl.zeros((BM,), tl.float32)  # Σ weight · (logit - shift)
    weights = tl.zeros((BM,), tl.float32)  # Σ weight
    best = tl.zeros((BM,), tl.int32)
    for start in range(0, K, BC):
        columns = start + tl.arange(0, BC)
        mask = (columns < K)[None, :]
        offsets = base[:, None] + columns[None, :]
        z = tl.load(p_z + offsets, mask=(index < rows)[:, None] & mask, other=0.0)
        s = _logits(z, p_logit_bias, columns[None, :], scale, HAS_LOGIT_BIAS, K)
        masked = tl.where(mask, s, float("-inf"))
        highest = tl.max(masked, 1)
        if COUNT:
            first = tl.min(tl.where((masked == highest[:, None]) & mask, columns[None, :], K), 1)
            best = tl.where(highest > top, first, best)
        highest = tl.maximum(top, highest)
        before, shift = shift, tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(masked - shift[:, None]), 1)
        top = highest
        if SMOOTH:
            w = tl.full((1, BC), 1.0, tl.float32)
            if HAS_WEIGHT:
                w = tl.load(p_weight + columns, mask=columns < K, other=0.0).to(tl.float32)[None, :]
            weighted += weights * (before - shift) + tl.sum(tl.where(mask, (s - shift[:, None]) * w, 0.0), 1)
            weights += tl.sum(tl.where(mask, w, 0.0), 1)
    log_total = tl.log(total)

    z = tl.load(p_z + base + t, mask=valid, other=0.0)
    logit = _logits(z, p_logit_bias, t, scale, HAS_LOGIT_BIAS, K)
    norm = tl.full((BM,), 1.0, tl.float32)
    if HAS_WEIGHT:
        norm = tl.load(p_weight + t, mask=valid, other=0.0).to(tl.float32)
    loss = (log_total - (logit - shift)) * norm
    if SMOOTH:
        loss = (1.0 - smoothing) * loss + smoothing / K * (log_total * weights - weighted)
    loss = tl.where(valid, loss, float("nan"))
    loss, norm = tl.where(counts, loss, 0.0), tl.where(counts, norm, 0.0)
    inside = index < rows
    p_rows += index
    tl.store(p_rows, loss, mask=inside)
    tl.store(p_rows + rows.to(tl.int64), norm, mask=inside)
    tl.store(p_rows + 2 * rows.to(tl.int64), shift, mask=inside)
    tl.store(p_rows + 3 * rows.to(tl.int64), log_total, mask=inside)
    right = tl.where(counts, 1.0, 0.0)
    if COUNT:
        right += tl.where(counts & valid & (best == t), 1.0, 0.0)
    tl.store(p_rows + 4 * rows.to(tl.int64), right, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def cross_entropy_finish(
    p_rows, p_loss, p_total, p_stats,
    rows: tl.int32, STREAMS: tl.constexpr, BM: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """The loss, what a mean divides by, and each stream's loss and accuracy. One program."""
    loss = 0.0
    total = 0.0
    each = rows // STREAMS
    for stream in tl.static_range(STREAMS):
        losses = tl.zeros((BM,), tl.float32)
        norms = tl.zeros((BM,), tl.float32)
        counted = tl.zeros((BM,), tl.float32)
        right = tl.zeros((BM,), tl.float32)
        for start in range(0, each, BM):
            index = start + tl.arange(0, BM)
            p_row = p_rows + stream * each + index
            losses += tl.load(p_row, mask=index < each, other=0.0)
            norms += tl.load(p_row + rows.to(tl.int64), mask=index < each, other=0.0)
            code = tl.load(p_row + 4 * rows.to(tl.int64), mask=index < each, other=0.0)
            counted += tl.where(code > 0.0, 1.0, 0.0)
            right += tl.where(code > 1.0, 1.0, 0.0)
        stream_loss, stream_norm = tl.sum(losses, 0), tl.sum(norms, 0)
        tl.store(p_stats + stream, stream_loss / stream_norm)
        tl.store(p_stats + STREAMS + stream, tl.sum(right, 0) / tl.sum(counted, 0))
        loss += stream_loss
        total += stream_norm
    if MEAN:
        loss = loss / total
    tl.store(p_loss, loss.to(p_loss.dtype.element_ty))
    tl.store(p_total, total)


@triton.jit(do_not_specialize=_RUNTIME)
def cross_entropy_backward(
    p_grad, p_total, p_z, p_target, p_weight, p_logit_bias, p_rows, p_dz, p_partials,
    rows: tl.int32, targets: tl.int32, ignore_index: tl.int64, tiles: tl.int32, stride: tl.int32,
    grad_stride: tl.int32, scale: tl.float32, smoothing: tl.float32,
    K: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_LOGIT_BIAS: tl.constexpr, SMOOTH: tl.constexpr,
    MEAN: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """dz in every row tile a program comes to, in one tile of classes, and partial sums of the logits' gradient.

    Grid: partial sums · tiles, tiles = ⌈K / BC⌉.
    """
    program = tl.program_id(0)
    columns = program % tiles * BC + tl.arange(0, BC)
    sums = tl.zeros((BM, BC), tl.float32)
    uniform = tl.zeros((1, BC), tl.float32)  # what smoothing takes from every class
    spread = 0.0  # and from all of them together
    if SMOOTH:
        uniform += smoothing / K
        spread = smoothing
        if HAS_WEIGHT:
            uniform *= tl.load(p_weight + columns, mask=columns < K, other=0.0).to(tl.float32)[None, :]
            weights = tl.zeros((BC,), tl.float32)
            for start in range(0, K, BC):
                every = start + tl.arange(0, BC)
                weights += tl.load(p_weight + every, mask=every < K, other=0.0).to(tl.float32)
            spread = smoothing / K * tl.sum(weights, 0)
    # As in add_norm_backward: what is moved out of the loop gets spilled, and so do a few values for occupancy's sake
    # unless ptxas is told how many registers there are.
    for first in tl.range(program // tiles * BM, rows, tl.num_programs(0) // tiles * BM, disable_licm=True):
        index = first + tl.arange(0, BM)
        t, valid, counts = _target(p_target, index, rows, targets, ignore_index, K)
        grad = tl.load(p_grad + index.to(tl.int64) * grad_stride, mask=index < rows, other=0.0).to(tl.float32)
        if MEAN:
            grad /= tl.load(p_total)
        grad = tl.where(counts, grad, 0.0)
        hit = grad * (1.0 - smoothing)
        if HAS_WEIGHT:
            hit *= tl.load(p_weight + t, mask=valid, other=0.0).to(tl.float32)
        hit = tl.where(valid | (counts == 0), hit, float("nan"))
        shift = tl.load(p_rows + 2 * rows.to(tl.int64) + index, mask=index < rows, other=0.0)
        log_total = tl.load(p_rows + 3 * rows.to(tl.int64) + index, mask=index < rows, other=0.0)
        mask = (index < rows)[:, None] & (columns < K)[None, :]
        offsets = index.to(tl.int64)[:, None] * K + columns[None, :]
        z = tl.load(p_z + offsets, mask=mask, other=0.0)
        s = _logits(z, p_logit_bias, columns[None, :], scale, HAS_LOGIT_BIAS, K)
        p = tl.exp(s - shift[:, None] - log_total[:, None])
        d = p * (hit + grad * spread)[:, None] - tl.where(columns[None, :] == t[:, None], hit[:, None], 0.0)
        if SMOOTH:
            d -= grad[:, None] * uniform
        tl.store(p_dz + offsets, (d * scale).to(p_dz.dtype.element_ty), mask=mask)
        if PARTIALS:
            sums += tl.where(mask, d, 0.0)
    if PARTIALS:
        p_partials += (program // tiles).to(tl.int64) * stride
        tl.store(p_partials + columns, tl.sum(sums, 0), mask=columns < K)


def _flags(num_classes: int, weight: Tensor | None, logit_bias: Tensor | None, smoothing: float) -> dict[str, object]:
    tile = class_tile(num_classes)
    return {
        "K": num_classes, "BM": tile.rows, "BC": tile.channels, "HAS_WEIGHT": weight is not None,
        "HAS_LOGIT_BIAS": logit_bias is not None, "SMOOTH": smoothing > 0, "num_warps": tile.num_warps,
    }  # fmt: skip


def forward(
    z: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None,
    logit_bias: Tensor | None,
    scale: float,
    ignore_index: int,
    smoothing: float,
    count: bool,
    of_rows: Tensor,
) -> None:
    """What ``ROW`` lists, of every row.

    Args:
        z: (M, K), contiguous; ``logits = scale · z + logit_bias``.
        target: (N,) int64, M = N or 2N.
        weight, logit_bias: (K,) or None.
        scale: a number.
        ignore_index: rows of this class count nothing.
        smoothing: of the labels, in [0, 1].
        count: whether to find out if the largest logit is right.
        of_rows: (5, M) fp32 to write to, contiguous: ``ROW``.
    """
    rows, num_classes = z.shape
    flags = _flags(num_classes, weight, logit_bias, smoothing)
    tensors = (z, target, z if weight is None else weight, z if logit_bias is None else logit_bias, of_rows)
    numbers = (rows, target.shape[0], ignore_index, scale, smoothing)
    flags["COUNT"] = count
    launch(cross_entropy_forward, cdiv(rows, flags["BM"]), z.device, tensors, numbers, flags)


def finish(of_rows: Tensor, *, streams: int, mean: bool, loss: Tensor, total: Tensor, stats: Tensor) -> None:
    """Adds up what forward left of every row.

    Args:
        of_rows: (5, M) fp32.
        streams: 2 for a fork, else 1.
        mean: whether the loss is a mean or a sum.
        loss: one element to write to, any floating-point dtype.
        total: one fp32 element to write to: what a mean divides by.
        stats: (2, streams) fp32 to write to: each stream's mean loss, and its accuracy.
    """
    flags = {"STREAMS": streams, "BM": 1024, "MEAN": mean, "num_warps": 8}
    launch(cross_entropy_finish, 1, of_rows.device, (of_rows, loss, total, stats), (of_rows.shape[1],), flags)


def backward(
    grad: Tensor,
    z: Tensor,
    target: Tensor,
    of_rows: Tensor,
    *,
    total: Tensor | None,
    weight: Tensor | None,
    logit_bias: Tensor | None,
    scale: float,
    ignore_index: int,
    smoothing: float,
    dz: Tensor,
    partials: Tensor | None,
) -> None:
    """The gradient of z, and partial sums of that of the logits.

    Args:
        grad: one element, the gradient of the loss, or (M,), those of the rows' losses; contiguous.
        z, target, weight, logit_bias, scale, ignore_index, smoothing: as in :func:`forward`.
        of_rows: (5, M), as forward left it.
        total: one fp32 element that ``grad`` is divided by; None is 1.
        dz: (M, K) to write to, contiguous.
        partials: (P, K) fp32 to write to, any row stride, or None.
    """
    rows, num_classes = z.shape
    flags = _flags(num_classes, weight, logit_bias, smoothing)
    flags.update(MEAN=total is not None, PARTIALS=partials is not None, maxnreg=BACKWARD_REGISTERS)
    tiles = cdiv(num_classes, flags["BC"])
    parts = cdiv(rows, flags["BM"]) if partials is None else partials.shape[0]
    optional = (grad, total, z, target, weight, logit_bias, of_rows, dz, partials)
    numbers = (
        rows, target.shape[0], ignore_index, tiles, 0 if partials is None else partials.stride(0),
        int(grad.numel() > 1), scale, smoothing,
    )  # fmt: skip
    launch(
        cross_entropy_backward, parts * tiles, z.device, tuple([grad if t is None else t for t in optional]), numbers,
        flags,
    )  # fmt: skip
