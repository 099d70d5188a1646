"""The torch backend's classifier loss: a linear map and cross-entropy.

PyTorch's operators compute few logits. Of more, forward computes the gradient with the loss, while they are in the
cache, by PyTorch's own cross-entropy. It takes the memory of the logits, unless they are large: then both directions
compute them in chunks of rows. A call that repeats runs from tapes (``joint.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastbf import joint, reference
from fastbf.autograd import Gradients, applying, recording
from fastbf.precision import chunk_elements, compute_dtype, loss_dtype, widened
from fastbf.reference import LossOptions
from fastbf.repeats import Tape, What
from fastbf.torch_backend.matmul import linear, mm
from fastbf.torch_state import autocast, autocast_dtype, differentiated, donated, is_batched, no_autocast, traced

# The least number of rows in a matrix product.
_MIN_ROWS = 512
# Up to this many bytes of logits have their gradient kept for backward. Larger ones are computed again, in chunks.
KEEP_LOGITS_BYTES = 1 << 30
# Up to this many logits PyTorch's own operators are quickest.
SMALL = 1 << 19


class _Loss(NamedTuple):
    """What the loss of a row depends on besides its logits."""

    target: Tensor  #: of one stream, (N,) or (N, K)
    weight: Tensor | None
    logit_bias: Tensor | None
    options: LossOptions

    def of_rows(self, z: Tensor, first: int, grad: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss of rows of products z, of which the first is row ``first``; their gradient; and whether each is right.

        The rows are those of one stream.
        """
        target = self.target[first % len(self.target) :][: len(z)]
        unadjusted = reference.class_logits(widened(z), self.options.scale, None)
        logits = reference.class_logits(unadjusted, 1.0, self.logit_bias)
        with recording(grad):
            leaf = logits.detach().requires_grad_(grad)
            loss = F.cross_entropy(
                leaf, target, self.weight, reduction="none", ignore_index=self.options.ignore_index,
                label_smoothing=self.options.label_smoothing,
            )  # fmt: skip
            d_logits = torch.autograd.grad(loss.sum(), leaf)[0] if grad else None
        right = None
        if self.options.stats:
            right = reference.correct(logits, unadjusted, target, self.options.ignore_index)
        return loss.detach(), d_logits, right


class _Losses(Function):
    """The loss of every row of logits scale · (x Wᵀ + b) + logit_bias, and ``reference.correct`` if it is asked for.

    Saves its tensors and, if ``keep``, the logits' gradient in the memory of the product.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None, logit_bias: Tensor | None, target: Tensor,
        weight: Tensor | None, options: LossOptions, keep: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows, loss_of, kept = x.shape[0], _Loss(target, weight, logit_bias, options), None
        loss = x.new_empty(rows, dtype=compute_dtype(x.dtype))
        right = torch.empty(2, rows if options.stats else 0, dtype=torch.bool, device=x.device)
        with no_autocast(x):
            for r in [range(rows)] if keep else _products(x, matrix.shape[0]):
                z = linear(x[r.start : r.stop], matrix, bias)
                for part in _parts(r, z, len(target)):
                    within = slice(part.start - r.start, part.stop - r.start)
                    loss[part.start : part.stop], d, correct = loss_of.of_rows(z[within], part.start, keep)
                    if d is not None:
                        z[within] = d
                    if correct is not None:
                        right[:, part.start : part.stop] = correct
                kept = z if keep else None
                del z  # frees its memory before the next product
        ctx.save_for_backward(x, matrix, bias, logit_bias, target, weight, kept)
        ctx.options = options
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> Gradients:
        needs, rest = ctx.needs_input_grad[:4], [None] * 4
        if torch.is_grad_enabled() or is_batched(grad):
            with torch.enable_grad():
                return *_differentiable(ctx, grad, needs), *rest
        with no_autocast(grad):
            return *_backward(ctx, grad, needs), *rest


def _backward(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> Gradients:
    """The gradients of input, weight, bias and ``logit_bias``, of which ``needs`` says which are wanted."""
    x, matrix, bias, logit_bias, target, weight, kept = ctx.saved_tensors
    scale = ctx.options.scale
    overwrites = kept is not None and donated(grad)
    chunks = [range(x.shape[0])] if overwrites else list(_products(x, matrix.shape[0]))
    loss_of = _Loss(target, weight, logit_bias, ctx.options._replace(stats=False))
    dx = torch.empty_like(x) if needs[0] and len(chunks) > 1 else None
    dw: Any = None
    sums: Any = None
    for r in chunks:
        rows = slice(r.start, r.stop)
        if kept is None:
            d = linear(x[rows], matrix, bias)
            for part in _parts(r, d, len(target)):
                within = slice(part.start - r.start, part.stop - r.start)
                _, of_part, _ = loss_of.of_rows(d[within], part.start, True)
                assert of_part is not None
                d[within] = of_part
        else:
            d = kept[rows] if overwrites else kept[rows].clone()
        d.mul_(grad[rows, None])
        if needs[2] or needs[3]:
            sum_ = d.sum(0, dtype=grad.dtype)
            sums = sum_ if sums is None else sums.add_(sum_)
        dz = d if scale == 1.0 else d.mul_(scale)
        if dx is not None:
            dx[rows] = mm(dz, matrix)
        elif needs[0]:
            dx = mm(dz, matrix)
        if needs[1]:
            dw = mm(dz.mT, x[rows]) if dw is None else _add_mm(dw.to(grad.dtype), dz.mT, x[rows])
        del d, dz
    return dx, dw, sums * scale if needs[2] else None, sums if needs[3] else None


def _differentiable(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> Iterator[Tensor | None]:
    """As :func:`_backward`, with a graph of the gradients' own, by autograd from the reference."""
    # Views, because one input may be computed from another and only the direct dependence counts.
    inputs: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors[:4]]
    x, matrix, bias, logit_bias = inputs
    target, weight, _ = ctx.saved_tensors[4:]
    with no_autocast(grad):
        logits = reference.class_logits(widened(F.linear(x, matrix, bias)), ctx.options.scale, logit_bias)
        loss, _ = reference.cross_entropy_terms(
            logits, target if len(target) == len(x) else torch.cat([target, target]), weight=weight,
            ignore_index=ctx.options.ignore_index, label_smoothing=ctx.options.label_smoothing,
        )  # fmt: skip
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
    return (next(grads) if need else None for need in needs)


def _products(x: Tensor, num_classes: int) -> Iterator[range]:
    """The rows of each matrix product, if one does not compute all rows."""
    elements = 2 * chunk_elements(x.device, compute_dtype(x.dtype))
    return _cut(range(x.shape[0]), max(_MIN_ROWS, elements // num_classes))


def _parts(rows: range, z: Tensor, n: int) -> Iterator[range]:
    """Cuts rows into parts that fit the cache, each of one stream of n rows, for the work between two products."""
    # Half a chunk, because cross-entropy and its gradient take several tensors of the logits' size.
    step, start = max(1, chunk_elements(z.device, compute_dtype(z.dtype)) // (2 * z.shape[1])), rows.start
    while start < rows.stop:
        stop = min(rows.stop, (start // n + 1) * n)
        yield from _cut(range(start, stop), step)
        start = stop


def _add_mm(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a · b, in total's dtype, which may be wider than that of a and b."""
    # Counters of FLOPs know no addmm_.
    return torch.addmm(total, a, b, out=total) if total.dtype == a.dtype else total.add_(torch.mm(a, b))


def _cut(rows: range, step: int) -> Iterator[range]:
    for start in range(rows.start, rows.stop, step):
        yield range(start, min(start + step, rows.stop))


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, options: LossOptions, *, linear_bias: Tensor | None,
    weight: Tensor | None, logit_bias: Tensor | None, what: What | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """The loss, and with ``stats`` each stream's loss, accuracy and unadjusted accuracy, else nothing.

    Tapes of the call are for calls of ``what``, and :func:`again` makes them by these.
    """
    tensors = input, linear_weight, linear_bias, logit_bias, target, weight
    loss, *stats = joint.call(partial(_formula, options), what, tensors, again)
    return loss, tuple(stats)


def again(found: Tape, tensors: tuple[Any, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A call that a tape fits, given input, linear_weight, linear_bias, logit_bias, target and weight."""
    loss, *stats = joint.play(found, tensors)
    return loss, tuple(stats)


def _formula(
    options: LossOptions, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, logit_bias: Tensor | None,
    target: Tensor, weight: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The loss, and statistics if they are asked for. The number of logits chooses the way."""
    rows, num_classes, target = input.shape[:-1], linear_weight.shape[0], _flat(target)
    operands: Any = autocast(input.flatten(0, -2), linear_weight, linear_bias)
    x, matrix, bias = operands
    autocasts = autocast_dtype(input) is not None
    dtype = compute_dtype(x.dtype) if autocasts else loss_dtype(x.dtype, target, logit_bias)
    plain = traced() or target.requires_grad or (weight is not None and weight.requires_grad)
    if plain or rows.numel() * num_classes <= SMALL:
        logits = reference.class_logits(widened(linear(x, matrix, bias)), options.scale, None)
        loss, stats = _of_logits(logits, target, rows, options, weight, logit_bias, dtype)
        return loss, *stats
    compute = compute_dtype(x.dtype)
    prior, factor = (None if t is None else t.to(compute) for t in (logit_bias, weight))
    keep = rows.numel() * num_classes * x.dtype.itemsize <= KEEP_LOGITS_BYTES
    keep = keep and differentiated(x, matrix, bias, prior)
    terms, right = applying(_Losses, x)(x, matrix, bias, prior, target, factor, options, keep)
    loss, stats = _reduced(terms, right, target, rows, options, _divisor(target, factor, options, compute), dtype)
    return loss, *stats


def cross_entropy(
    logits: Tensor, target: Tensor, options: LossOptions, *, weight: Tensor | None, logit_bias: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As :func:`linear_cross_entropy`, of logits (M, …, K), which the options' scale leaves alone."""
    autocasts = autocast_dtype(logits) is not None
    dtype = compute_dtype(logits.dtype) if autocasts else loss_dtype(logits.dtype, target, logit_bias)
    flat = widened(logits.flatten(0, -2))
    return _of_logits(flat, _flat(target), logits.shape[:-1], options, weight, logit_bias, dtype)


def _flat(target: Tensor) -> Tensor:
    """Class indices (N, …) as (N',), probabilities (N, …, K) as (N', K)."""
    return target.flatten(0, -2 if target.is_floating_point() else -1)


def _of_logits(
    unadjusted: Tensor, target: Tensor, rows: torch.Size, options: LossOptions, weight: Tensor | None,
    logit_bias: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """The results, by PyTorch's own operators, from logits (M', K) without ``logit_bias``; ``rows`` is (M, …)."""
    kind: dict[str, Any] = {"ignore_index": options.ignore_index, "label_smoothing": options.label_smoothing}
    repeated = torch.cat([target, target]) if options.forked else target
    logits = unadjusted if logit_bias is None else unadjusted + logit_bias
    factor = None if weight is None else weight.to(logits.dtype)
    if not options.stats:
        result = F.cross_entropy(logits, repeated, factor, reduction=options.reduction, **kind)
        result = result.view(rows) if options.reduction == "none" else result
        return result if result.dtype == dtype else result.to(dtype), ()
    loss, _ = reference.cross_entropy_terms(logits, repeated, weight=factor, **kind)
    right = reference.correct(logits, unadjusted, repeated, options.ignore_index)
    return _reduced(loss, right, target, rows, options, _divisor(target, weight, options, loss.dtype), dtype)


def _divisor(target: Tensor, weight: Tensor | None, options: LossOptions, dtype: torch.dtype) -> Tensor:
    """What the mean over all streams divides by: NaN if no row counts, smoothed or not."""
    total = reference.row_norm(target, weight, options.ignore_index, dtype).sum() * (2 if options.forked else 1)
    return torch.where(total == 0, torch.nan, total)


def _reduced(
    loss: Tensor, right: Tensor, target: Tensor, rows: torch.Size, options: LossOptions, divisor: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """The results from the loss of every row and ``reference.correct``."""
    result = loss.view(rows) if options.reduction == "none" else loss.sum()
    result = (result / divisor if options.reduction == "mean" else result).to(dtype)
    if not options.stats:
        return result, ()
    streams = loss.detach().view(2 if options.forked else 1, -1)
    counts = target.is_floating_point() or target != options.ignore_index
    counted = streams.shape[1] if counts is True else counts.sum()
    accuracy, unadjusted_accuracy = right.view(2, *streams.shape).to(loss.dtype).sum(-1) / counted
    return result, (streams.sum(-1) * len(streams) / divisor.detach(), accuracy, unadjusted_accuracy)
