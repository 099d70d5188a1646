"""Cross-entropy of logits that a matrix product left in memory in its dtype, forward and backward.

logits = scale · (z + bias) + logit_bias, z (M, K). Row r has target r mod N, so a fork needs no copy of its targets.
A target is a distribution q over the classes that multiplies -log p: of a class index t, q = weight ·
((1 - ε) [c = t] + ε / K), and of probabilities t, q = weight · ((1 - ε) t + ε / K), with ε the label smoothing.
Statistics are fp32. Kernels walk over chunks of the classes, so that K is not limited. Forward writes a few numbers a
row, which one program adds up in a fixed order. Backward computes the probabilities again from z and those numbers, and
writes partial sums of the logits' gradient. A call may cover some of the rows.

NaN and Inf propagate as in ``F.cross_entropy``. Nothing is read at a class index out of range. Its loss is NaN, and the
program that adds up stops the device with an assertion, as PyTorch's own kernel does.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbf.kernels.launch import at_16_bytes, cdiv, launch, operator
from fastbf.kernels.limits import device_limits
from fastbf.kernels.rows import Tile, partial_sums

#: Numbers that forward writes of a row: its loss; what it adds to the mean's denominator; its largest logit; the log of
#: the sum of exponentials relative to that (adding the two would round off what tells large logits apart); a code; and
#: Σ q. The code is -1 if the class index is out of range, 0 if the row is ignored, else 1, plus 1 if the largest logit
#: is the target's, plus 2 if the largest without logit_bias is.
ROW = 6
#: Numbers of each stream: its loss, its accuracy, and that of logits without logit_bias.
STATS = 3

_RUNTIME = ["rows", "first", "of_all", "targets", "pieces", "aligned_classes", "ignore_index"]
PIECE = 16  #: bytes of one load
# At most eight rows: every thread keeps numbers of each row of its tile, and more of them would spill.
_TILE_ELEMENTS, _MAX_ROWS, _MAX_CLASSES, _WARPS = 2048, 8, 2048, 4
#: Up to so many rows one program adds up the numbers of all of them; of more, one for every part of so many.
PART = 1 << 14
_MOST_PARTS = 1024
#: Registers of a thread. Without a limit, ptxas spills a few values to fit more programs on a multiprocessor.
REGISTERS = 168


@cache
def class_tile(num_classes: int) -> Tile:
    """Rows and classes of a tile. Kernels walk over rows of more classes."""
    width = min(_MAX_CLASSES, max(32, 1 << (num_classes - 1).bit_length()))
    return Tile(min(_MAX_ROWS, _TILE_ELEMENTS // width), width, _WARPS)


def alignment(num_classes: int) -> int:
    """The largest power of two up to 8 that divides the number of classes: elements of one load in a row of K."""
    return min(8, num_classes & -num_classes)


def padded(num_classes: int, dtype: torch.dtype) -> int:
    """Elements from one row of logits to the next.

    Rows start at multiples of 16 bytes, for matrix products and wide loads.
    """
    step = PIECE // dtype.itemsize
    return cdiv(num_classes, step) * step


@triton.jit
def _target(p_target, index, inside, targets, ignore_index, K):
    """Class indices of rows [BM]: the class (0 if invalid), whether it is valid, whether the row counts."""
    t = tl.load(p_target + index % targets, mask=inside, other=0)
    valid = (t >= 0) & (t < K) & inside
    return tl.where(valid, t, 0).to(tl.int32), valid, inside & (t != ignore_index)


@triton.jit
def _first_of_largest(x, highest, columns, mask, K):
    """Of rows [BM, BC], the first column that holds the largest value [BM]."""
    return tl.min(tl.where((x == highest[:, None]) & mask[None, :], columns[None, :], K), 1)


@triton.jit
def _largest(top, best, x, columns, mask, K):
    """The largest value of rows so far and its first column, [BM] both, after another tile x [BM, BC]."""
    highest = tl.max(x, 1)
    best = tl.where(highest > top, _first_of_largest(x, highest, columns, mask, K), best)
    return tl.maximum(top, highest), best


@triton.jit
def _shift(p_bias, p_logit_bias, columns, mask, scale, HAS_BIAS: tl.constexpr, HAS_LOGIT_BIAS: tl.constexpr):
    """What is added to scale · z: fp32, of the columns' shape."""
    shift = tl.zeros(columns.shape, tl.float32)
    if HAS_BIAS:
        shift += tl.load(p_bias + columns, mask=mask, other=0.0).to(tl.float32) * scale
    if HAS_LOGIT_BIAS:
        shift += tl.load(p_logit_bias + columns, mask=mask, other=0.0).to(tl.float32)
    return shift


@triton.jit
def _uniform(p_weight, columns, mask, uniform, HAS_WEIGHT: tl.constexpr):
    """What smoothing gives to every class: weight · ε / K [1, BC]."""
    q = tl.full((1, columns.shape[0]), 0.0, tl.float32) + uniform
    if HAS_WEIGHT:
        q *= tl.load(p_weight + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    return q


@triton.jit
def _probabilities(p_target, index, inside, targets, columns, mask, K):
    """The targets of rows [BM] in a tile of classes: fp32 [BM, BC]."""
    offsets = (index % targets).to(tl.int64)[:, None] * K + columns[None, :]
    return tl.load(p_target + offsets, mask=inside[:, None] & mask[None, :], other=0.0).to(tl.float32)


@triton.jit
def _smoothed(t, p_weight, columns, mask, keep, uniform, HAS_WEIGHT: tl.constexpr):
    """q of probabilities t [BM, BC]."""
    q = t * keep + uniform
    if HAS_WEIGHT:
        q *= tl.load(p_weight + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    return q


@triton.jit(do_not_specialize=_RUNTIME)
def cross_entropy_forward(
    p_z, p_target, p_weight, p_bias, p_logit_bias, p_rows,
    rows: tl.int32, first: tl.int32, of_all: tl.int32, targets: tl.int32, pieces: tl.int32, aligned_classes: tl.int32,
    ignore_index: tl.int64, scale: tl.float32, keep: tl.float32, uniform: tl.float32,
    BM: tl.constexpr, BC: tl.constexpr, ALIGN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LOGIT_BIAS: tl.constexpr,
    SMOOTH: tl.constexpr, SOFT: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The numbers of ``ROW`` for BM rows. Grid: ⌈rows / BM⌉.

    z's row stride is given in pieces of 16 bytes, and K in multiples of ALIGN. The compiler then knows what divides
    them, and loads many elements at once.
    """
    K = aligned_classes * ALIGN
    stride = pieces * (128 // p_z.dtype.element_ty.primitive_bitwidth)
    index = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = index < rows
    base = index.to(tl.int64) * stride
    index += first
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    shift = tl.zeros((BM,), tl.float32)  # top, or 0 while all classes are switched off
    weighted = tl.zeros((BM,), tl.float32)  # Σ q · (logit - shift), without a class index's own part
    mass = tl.zeros((BM,), tl.float32)  # Σ q, without a class index's own part
    best = tl.zeros((BM,), tl.int32)
    unadjusted = tl.full((BM,), float("-inf"), tl.float32)  # the largest logit without logit_bias
    best_unadjusted = tl.zeros((BM,), tl.int32)
    likeliest = tl.full((BM,), float("-inf"), tl.float32)
    label = tl.zeros((BM,), tl.int32)
    for start in range(0, K, BC):
        columns = start + tl.arange(0, BC)
        mask = columns < K
        p_tile = p_z + base[:, None] + columns[None, :]
        z = tl.load(p_tile, mask=inside[:, None] & (columns < stride)[None, :], other=0.0)
        s = z.to(tl.float32) * scale
        if COUNT and HAS_LOGIT_BIAS:
            u = s
            if HAS_BIAS:
                u += _shift(p_bias, p_logit_bias, columns, mask, scale, True, False)[None, :]
            u = tl.where(mask[None, :], u, float("-inf"))
            unadjusted, best_unadjusted = _largest(unadjusted, best_unadjusted, u, columns, mask, K)
        if HAS_BIAS or HAS_LOGIT_BIAS:
            s += _shift(p_bias, p_logit_bias, columns, mask, scale, HAS_BIAS, HAS_LOGIT_BIAS)[None, :]
        s = tl.where(mask[None, :], s, float("-inf"))
        if COUNT:
            highest, best = _largest(top, best, s, columns, mask, K)
        else:
            highest = tl.maximum(top, tl.max(s, 1))
        before, shift = shift, tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        top = highest
        if SMOOTH or SOFT:
            if SOFT:
                t = _probabilities(p_target, index, inside, targets, columns, mask, K)
                if COUNT:
                    classes = tl.where(mask[None, :], t, float("-inf"))
                    likeliest, label = _largest(likeliest, label, classes, columns, mask, K)
                q = _smoothed(t, p_weight, columns, mask, keep, uniform, HAS_WEIGHT)
            else:
                q = _uniform(p_weight, columns, mask, uniform, HAS_WEIGHT)
            weighted += mass * (before - shift) + tl.sum(tl.where(mask[None, :], (s - shift[:, None]) * q, 0.0), 1)
            mass += tl.sum(tl.where(mask[None, :], q, 0.0), 1)
    log_total = tl.log(total)
    loss = log_total * mass - weighted
    norm = tl.full((BM,), 1.0, tl.float32)
    code = tl.full((BM,), 1.0, tl.float32)
    if not HAS_LOGIT_BIAS:
        best_unadjusted = best
    if SOFT:
        if COUNT:
            code += tl.where(best == label, 1.0, 0.0) + tl.where(best_unadjusted == label, 2.0, 0.0)
    else:
        t, valid, counts = _target(p_target, index, inside, targets, ignore_index, K)
        z = tl.load(p_z + base + t, mask=valid, other=0.0)
        logit = z.to(tl.float32) * scale + _shift(p_bias, p_logit_bias, t, valid, scale, HAS_BIAS, HAS_LOGIT_BIAS)
        if HAS_WEIGHT:
            norm = tl.load(p_weight + t, mask=valid, other=0.0).to(tl.float32)
        loss += (log_total - (logit - shift)) * (norm * keep)
        mass += norm * keep
        loss, mass = tl.where(valid, loss, float("nan")), tl.where(valid, mass, float("nan"))
        if COUNT:
            code += tl.where(best == t, 1.0, 0.0) + tl.where(best_unadjusted == t, 2.0, 0.0)
        code = tl.where(valid, code, -1.0)
        loss, norm, mass = tl.where(counts, loss, 0.0), tl.where(counts, norm, 0.0), tl.where(counts, mass, 0.0)
        code = tl.where(counts, code, 0.0)
    p_rows += index
    of_all = of_all.to(tl.int64)
    tl.store(p_rows, loss, mask=inside)
    tl.store(p_rows + of_all, norm, mask=inside)
    tl.store(p_rows + 2 * of_all, shift, mask=inside)
    tl.store(p_rows + 3 * of_all, log_total, mask=inside)
    tl.store(p_rows + 4 * of_all, code, mask=inside)
    tl.store(p_rows + 5 * of_all, mass, mask=inside)


@triton.jit
def _mean(loss, total):
    """loss / total; NaN where no row counts, even if smoothing leaves a loss."""
    return tl.where(total == 0.0, float("nan"), loss / total)


@triton.jit
def _sums(p_rows, of_all, first, stop, BM: tl.constexpr):
    """Of rows from ``first`` on: loss, what a mean divides by, and how many count, are right, are right unadjusted."""
    losses = tl.zeros((BM,), tl.float32)
    norms = tl.zeros((BM,), tl.float32)
    counted = tl.zeros((BM,), tl.float32)
    right = tl.zeros((BM,), tl.float32)
    right_unadjusted = tl.zeros((BM,), tl.float32)
    lowest = tl.zeros((BM,), tl.float32)
    for start in range(first, stop, BM):
        index = start + tl.arange(0, BM)
        p_row = p_rows + index
        losses += tl.load(p_row, mask=index < stop, other=0.0)
        norms += tl.load(p_row + of_all.to(tl.int64), mask=index < stop, other=0.0)
        code = tl.load(p_row + 4 * of_all.to(tl.int64), mask=index < stop, other=0.0)
        lowest = tl.minimum(lowest, code)
        counted += tl.where(code != 0.0, 1.0, 0.0)
        right += tl.where((code == 2.0) | (code == 4.0), 1.0, 0.0)
        right_unadjusted += tl.where(code > 2.0, 1.0, 0.0)
    tl.device_assert(lowest >= 0.0, "fastbf linear_cross_entropy: a class index in target is out of range")
    return tl.sum(losses, 0), tl.sum(norms, 0), tl.sum(counted, 0), tl.sum(right, 0), tl.sum(right_unadjusted, 0)


@triton.jit(do_not_specialize=["rows", "parts", "part_rows"])
def cross_entropy_sums(
    p_rows, p_parts, rows: tl.int32, parts: tl.int32, part_rows: tl.int32, STREAMS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The numbers of :func:`_sums` of one part of a stream, to p_parts (5, STREAMS, parts). Grid: STREAMS · parts."""
    program, each = tl.program_id(0), rows // STREAMS
    first, end = program // parts * each, (program // parts + 1) * each
    first += program % parts * part_rows
    sums = _sums(p_rows, rows, first, tl.minimum(first + part_rows, end), BM)
    for i in tl.static_range(5):
        tl.store(p_parts + i * STREAMS * parts + program, sums[i])


@triton.jit
def _sums_of_parts(p_parts, parts, stream, STREAMS: tl.constexpr, BM: tl.constexpr):
    """The sums over a stream's parts, BM at most."""
    index = tl.arange(0, BM)
    p_part, step, mask = p_parts + stream * parts + index, STREAMS * parts, index < parts
    return (
        tl.sum(tl.load(p_part, mask=mask, other=0.0), 0),
        tl.sum(tl.load(p_part + step, mask=mask, other=0.0), 0),
        tl.sum(tl.load(p_part + 2 * step, mask=mask, other=0.0), 0),
        tl.sum(tl.load(p_part + 3 * step, mask=mask, other=0.0), 0),
        tl.sum(tl.load(p_part + 4 * step, mask=mask, other=0.0), 0),
    )


@triton.jit(do_not_specialize=["rows", "parts"])
def cross_entropy_finish(
    p_rows, p_loss, p_total, p_stats, rows: tl.int32, parts: tl.int32,
    STREAMS: tl.constexpr, BM: tl.constexpr, MEAN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The loss, what a mean divides by, and each stream's ``STATS``. One program.

    With PARTS ``p_rows`` is what :func:`cross_entropy_sums` wrote.
    """
    loss = 0.0
    total = 0.0
    each = rows // STREAMS
    for stream in tl.static_range(STREAMS):
        if PARTS:
            sums = _sums_of_parts(p_rows, parts, stream, STREAMS, BM)
        else:
            sums = _sums(p_rows, rows, stream * each, (stream + 1) * each, BM)
        tl.store(p_stats + stream, _mean(sums[0], sums[1]))
        tl.store(p_stats + STREAMS + stream, sums[3] / sums[2])
        tl.store(p_stats + 2 * STREAMS + stream, sums[4] / sums[2])
        loss += sums[0]
        total += sums[1]
    if MEAN:
        loss = _mean(loss, total)
    tl.store(p_loss, loss.to(p_loss.dtype.element_ty))
    tl.store(p_total, total)


@triton.jit(do_not_specialize=[*_RUNTIME, "tiles", "sums_stride", "grad_stride"])
def cross_entropy_backward(
    p_grad, p_total, p_z, p_target, p_weight, p_bias, p_logit_bias, p_rows, p_dz, p_sums,
    rows: tl.int32, first: tl.int32, of_all: tl.int32, targets: tl.int32, pieces: tl.int32, aligned_classes: tl.int32,
    ignore_index: tl.int64, tiles: tl.int32, sums_stride: tl.int32, grad_stride: tl.int32,
    scale: tl.float32, keep: tl.float32, uniform: tl.float32,
    BM: tl.constexpr, BC: tl.constexpr, ALIGN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LOGIT_BIAS: tl.constexpr,
    SMOOTH: tl.constexpr, SOFT: tl.constexpr, MEAN: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """One tile of classes in several row tiles: dz, which may be z, and a partial sum of the logits' gradient.

    Grid: partial sums · tiles, tiles = ⌈K / BC⌉.
    """
    K = aligned_classes * ALIGN
    stride = pieces * (128 // p_z.dtype.element_ty.primitive_bitwidth)
    program = tl.program_id(0)
    columns = program % tiles * BC + tl.arange(0, BC)
    mask = columns < K
    within = columns < stride
    sums = tl.zeros((BM, BC), tl.float32)
    # Invariant code stays in the loop, as in add_norm_backward.
    for start in tl.range(program // tiles * BM, rows, tl.num_programs(0) // tiles * BM, disable_licm=True):
        index = start + tl.arange(0, BM)
        inside = index < rows
        offsets = index.to(tl.int64)[:, None] * stride + columns[None, :]
        index += first
        grad = tl.load(p_grad + index.to(tl.int64) * grad_stride, mask=inside, other=0.0).to(tl.float32)
        if MEAN:
            grad /= tl.load(p_total)
        p_row = p_rows + index
        shift = tl.load(p_row + 2 * of_all.to(tl.int64), mask=inside, other=0.0)
        log_total = tl.load(p_row + 3 * of_all.to(tl.int64), mask=inside, other=0.0)
        mass = tl.load(p_row + 5 * of_all.to(tl.int64), mask=inside, other=0.0)
        z = tl.load(p_z + offsets, mask=inside[:, None] & within[None, :], other=0.0)
        s = z.to(tl.float32) * scale
        if HAS_BIAS or HAS_LOGIT_BIAS:
            s += _shift(p_bias, p_logit_bias, columns, mask, scale, HAS_BIAS, HAS_LOGIT_BIAS)[None, :]
        p = tl.exp(s - shift[:, None] - log_total[:, None])
        if SOFT:
            t = _probabilities(p_target, index, inside, targets, columns, mask, K)
            d = (p * mass[:, None] - _smoothed(t, p_weight, columns, mask, keep, uniform, HAS_WEIGHT)) * grad[:, None]
        else:
            t, valid, counts = _target(p_target, index, inside, targets, ignore_index, K)
            grad = tl.where(counts, grad, 0.0)
            hit = grad * keep
            if HAS_WEIGHT:
                hit *= tl.load(p_weight + t, mask=valid, other=0.0).to(tl.float32)
            d = p * (grad * mass)[:, None] - tl.where(columns[None, :] == t[:, None], hit[:, None], 0.0)
            if SMOOTH:
                d -= grad[:, None] * _uniform(p_weight, columns, mask, uniform, HAS_WEIGHT)
        tl.store(p_dz + offsets, (d * scale).to(p_dz.dtype.element_ty), mask=inside[:, None] & within[None, :])
        if SUMS:
            sums += tl.where(inside[:, None] & mask[None, :], d, 0.0)
    if SUMS:
        tl.store(p_sums + (program // tiles).to(tl.int64) * sums_stride + columns, tl.sum(sums, 0), mask=mask)


class Options(NamedTuple):
    """The arguments of the loss besides logits and targets."""

    weight: Tensor | None  #: (K,): a factor for each class
    bias: Tensor | None  #: (K,): of the linear layer
    logit_bias: Tensor | None  #: (K,)
    scale: float
    ignore_index: int
    smoothing: float  #: of the labels, in [0, 1]


def _flags(num_classes: int, target: Tensor, options: Options) -> dict[str, Any]:
    tile = class_tile(num_classes)
    return {
        "BM": tile.rows, "BC": tile.channels, "ALIGN": alignment(num_classes),
        "HAS_WEIGHT": options.weight is not None, "HAS_BIAS": options.bias is not None,
        "HAS_LOGIT_BIAS": options.logit_bias is not None, "SMOOTH": options.smoothing > 0,
        "SOFT": target.is_floating_point(), "num_warps": tile.num_warps,
    }  # fmt: skip


def _numbers(
    z: Tensor, target: Tensor, options: Options, first: int, of_rows: Tensor, *launch: int
) -> tuple[Any, ...]:  # fmt: skip
    """The kernels' arguments that are numbers, in order; ``launch`` is backward's own."""
    rows, num_classes = z.shape
    pieces, aligned_classes = z.stride(0) * z.itemsize // PIECE, num_classes // alignment(num_classes)
    return (
        rows, first, of_rows.shape[1], target.shape[0], pieces, aligned_classes, options.ignore_index, *launch,
        options.scale, 1 - options.smoothing, options.smoothing / num_classes,
    )  # fmt: skip


def _pointers(first: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors, with the first in place of each None, where kernels do not read it."""
    return first, *[first if t is None else t for t in others]


@operator("of_rows")
def forward(z: Tensor, target: Tensor, options: Options, *, count: bool, first: int, of_rows: Tensor) -> None:
    """Writes the numbers of ``ROW`` for some rows.

    Args:
        z: (R, K), a view of rows of ``padded`` length: R of the M rows, from ``first`` on.
        target: (N,) int64 or (N, K) floating point, contiguous; M = N or 2N.
        options: the loss.
        count: whether codes say if the largest logit is the target's.
        first: the first row's number.
        of_rows: (6, M) fp32 to write to, contiguous: ``ROW``.
    """
    rows, num_classes = z.shape
    target = target if target.is_floating_point() else at_16_bytes(target)
    flags = _flags(num_classes, target, options)
    flags.update(COUNT=count, maxnreg=REGISTERS)
    pointers = _pointers(z, target, options.weight, options.bias, options.logit_bias, of_rows)
    numbers = _numbers(z, target, options, first, of_rows)
    launch(cross_entropy_forward, cdiv(rows, flags["BM"]), z.device, pointers, numbers, flags)


@operator("loss", "total", "stats")
def finish(of_rows: Tensor, *, streams: int, mean: bool, loss: Tensor, total: Tensor, stats: Tensor) -> None:
    """Adds up the numbers of all rows; asserts on the device that no class index was out of range.

    Args:
        of_rows: (6, M) fp32.
        streams: 2 for a fork, else 1.
        mean: whether the loss is a mean or a sum.
        loss: one element to write to, any floating-point dtype.
        total: one fp32 element to write to: what a mean divides by.
        stats: (3, streams) fp32 to write to: ``STATS``.
    """
    rows, device, parts = of_rows.shape[1], of_rows.device, 0
    flags = {"STREAMS": streams, "BM": _MOST_PARTS, "num_warps": 8, "debug": True}  # debug: the assertion is on
    if rows > PART:
        each = rows // streams
        part_rows = max(PART, cdiv(each, _MOST_PARTS))
        parts = cdiv(each, part_rows)
        sums = torch.empty(5, streams, parts, dtype=torch.float32, device=device)
        launch(cross_entropy_sums, streams * parts, device, (of_rows, sums), (rows, parts, part_rows), flags)
        of_rows = sums
    flags = {**flags, "MEAN": mean, "PARTS": parts > 0}
    launch(cross_entropy_finish, 1, device, (of_rows, loss, total, stats), (rows, parts), flags)


@operator("dz", "sums")
def backward(
    grad: Tensor, z: Tensor, target: Tensor, of_rows: Tensor, options: Options, *, total: Tensor | None, first: int,
    dz: Tensor, sums: Tensor | None,
) -> None:  # fmt: skip
    """The gradient of z, and the sums over rows of that of the logits.

    Args:
        grad: one element, the gradient of the loss, or (M,), those of the rows' losses; contiguous.
        z, target, options, first: as in :func:`forward`.
        of_rows: (6, M), as forward wrote it.
        total: one fp32 element that ``grad`` is divided by; None is 1.
        dz: (R, K) to write to, with z's strides; may be z.
        sums: (K,) fp32 to write to, or None.
    """
    rows, num_classes = z.shape
    target = target if target.is_floating_point() else at_16_bytes(target)
    flags = _flags(num_classes, target, options)
    flags.update(MEAN=total is not None, SUMS=sums is not None, maxnreg=REGISTERS)
    tiles = cdiv(num_classes, flags["BC"])
    parts, partials = cdiv(rows, flags["BM"]), None
    if sums is not None:
        parts = sums_parts(rows, num_classes, z.device)
        partials = torch.empty(parts, num_classes, dtype=torch.float32, device=z.device)
    pointers = _pointers(
        grad, total, z, target, options.weight, options.bias, options.logit_bias, of_rows, dz, partials
    )  # fmt: skip
    row_strides = 0 if partials is None else num_classes, int(grad.numel() > 1)
    numbers = _numbers(z, target, options, first, of_rows, tiles, *row_strides)
    launch(cross_entropy_backward, parts * tiles, z.device, pointers, numbers, flags)
    if partials is not None:
        torch.sum(partials, 0, out=sums)


def sums_parts(rows: int, num_classes: int, device: torch.device) -> int:
    """The number of backward's partial sums of the logits' gradient over ``rows``: as few as fill the device."""
    limits = device_limits(device)
    tiles = cdiv(num_classes, class_tile(num_classes).channels)
    return min(partial_sums(rows, limits), cdiv(2 * limits.multiprocessors, tiles))
