"""The torch backend's classifier loss: a linear map and cross-entropy, as one autograd Function.

Forward computes the gradient of the logits with the loss, while they are in the cache, by PyTorch's own cross-entropy.
Backward scales it and multiplies it by the input and the weight. It takes the memory of the logits, unless they are
large: then both directions compute them in chunks of rows. For a graph of the gradient (double backward) the reference
is differentiated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastbf import reference, tape
from fastbf.autograd import Gradients, applying, recording
from fastbf.precision import chunk_elements, compute_dtype, loss_dtype, widened
from fastbf.reference import LossOptions
from fastbf.repeats import Tape, What
from fastbf.torch_backend.matmul import linear, mm
from fastbf.torch_state import (
    autocast,
    autocast_dtype,
    differentiated,
    donated,
    is_batched,
    no_autocast,
    release_saved,
    traced,
)

# The least number of rows in a matrix product.
_MIN_ROWS = 512
# Up to this many bytes of logits have their gradient kept for backward. Larger ones are computed again, in chunks.
KEEP_LOGITS_BYTES = 1 << 30
# Up to this many logits are one part.
SMALL = 1 << 19


class _Call(NamedTuple):
    """A call without its tensors."""

    options: LossOptions
    shape: torch.Size  #: of the input, (M, …, C)
    dtype: torch.dtype  #: of the loss
    autocast: torch.dtype | None
    grad: bool  #: whether backward follows
    keep: bool  #: whether the logits' gradient is kept for it

    @property
    def ignore_index(self) -> int:
        return self.options.ignore_index

    def operands(self, *tensors: Tensor | None) -> list[Any]:
        """The input in rows, the weight and the bias, in the dtype of the product."""
        x, *others = tensors if self.autocast is None else [t if t is None else t.to(self.autocast) for t in tensors]
        assert x is not None
        return [x.reshape(-1, x.shape[-1]), *others]


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


class _LinearCrossEntropy(Function):
    """Returns the loss, and statistics if they are asked for.

    Saves its tensors, the logits' gradient if the call keeps it, and what a mean divides by if the gradient lacks it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, logit_bias: Tensor | None,
        target: Tensor, weight: Tensor | None, call: _Call, what: What | None, found: Tape | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        inputs = x, linear_weight, linear_bias, logit_bias, target, weight
        made = tape.play(what, inputs, None, found)
        if made is None:
            with tape.noting(what, inputs, None, call, again) as made, no_autocast(x):
                made += _forward(call, inputs)
        d_logits, divisor, loss, *stats = made
        ctx.save_for_backward(*inputs, d_logits, divisor)
        ctx.call = call
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Gradients:
        call, needs, tensors = ctx.call, ctx.needs_input_grad, [grad, *ctx.saved_tensors]
        if grad is None:  # that of the statistics alone
            return (None,) * len(needs)
        if torch.is_grad_enabled() or is_batched(grad):
            with torch.enable_grad():
                return _differentiable(call, tensors, needs)
        overwrites = call.keep and donated(grad)
        release_saved(ctx)
        what = "torch: linear_cross_entropy backward", call, needs, overwrites
        made = tape.play(what, tensors)
        if made is None:
            with tape.noting(what, tensors) as made, no_autocast(grad):
                made += _backward(call, tensors, needs, overwrites)
        return tuple(made)


def _forward(call: _Call, tensors: Sequence[Any]) -> list[Tensor | None]:
    """The logits' gradient, what a mean divides by, the loss, and statistics if they are asked for."""
    x, matrix, bias = call.operands(*tensors[:3])
    logit_bias, target, weight = tensors[3:]
    options, rows, num_classes = call.options, x.shape[0], matrix.shape[0]
    compute = compute_dtype(x.dtype)
    logit_bias, factor = (None if t is None else t.to(compute) for t in (logit_bias, weight))
    target = _flat(target)
    if rows * num_classes <= SMALL:
        leaf = reference.class_logits(widened(linear(x, matrix, bias)), options.scale, None).detach()
        with recording(call.grad):
            leaf.requires_grad_(call.grad)
            result, stats = _of_logits(leaf, target, call.shape[:-1], options, factor, logit_bias, call.dtype)
            total = result.sum() if result.dim() else result
            d_logits = torch.autograd.grad(total, leaf)[0] if call.grad else None
        if d_logits is not None and x.dtype == torch.bfloat16:  # fp16 lacks the range before a loss scale multiplies it
            d_logits = d_logits.to(x.dtype)
        return [d_logits, None, result.detach(), *stats]
    loss_of = _Loss(target, factor, logit_bias, options)
    loss = x.new_empty(rows, dtype=compute)
    right = torch.empty(2, rows if options.stats else 0, dtype=torch.bool, device=x.device)
    kept = None
    for r in [range(rows)] if call.keep else _products(x, num_classes):
        z = linear(x[r.start : r.stop], matrix, bias)
        for part in _parts(r, z, len(target)):
            within = slice(part.start - r.start, part.stop - r.start)
            loss[part.start : part.stop], d, correct = loss_of.of_rows(z[within], part.start, call.keep)
            if d is not None:
                z[within] = d
            if correct is not None:
                right[:, part.start : part.stop] = correct
        kept = z if call.keep else None
        del z  # frees its memory before the next product
    divisor = _divisor(target, factor, options, compute)
    result, stats = _reduced(loss, right, target, call.shape[:-1], options, divisor, call.dtype)
    return [kept, divisor if options.reduction == "mean" else None, result, *stats]


def _backward(call: _Call, tensors: list[Any], needs: Sequence[bool], overwrites: bool) -> list[Tensor | None]:
    """The gradients of forward's arguments, of which ``needs`` says which are wanted.

    ``tensors`` are the loss's gradient and what forward saved; the list is emptied. ``overwrites`` allows the products'
    gradient to take the place of what was kept.
    """
    grad, x, matrix, bias, logit_bias, target, weight, kept, divisor = tensors
    tensors.clear()
    shape, options = x.shape, call.options
    x, matrix, bias = call.operands(x, matrix, bias)
    compute, num_classes = compute_dtype(x.dtype), matrix.shape[0]
    grad = (grad.reshape(-1, 1) if options.reduction == "none" else grad).to(compute)
    grad = grad if divisor is None else grad / divisor
    chunks = [range(x.shape[0])] if overwrites else list(_products(x, num_classes))
    dx = torch.empty_like(x) if needs[0] and len(chunks) > 1 else None
    dw: Any = None
    sums: Any = None
    prior, factor = (None if t is None else t.to(compute) for t in (logit_bias, weight))
    loss_of = _Loss(_flat(target), factor, prior, options._replace(stats=False))
    for r in chunks:
        rows = slice(r.start, r.stop)
        if kept is None:
            d = linear(x[rows], matrix, bias)
            for part in _parts(r, d, len(loss_of.target)):
                within = slice(part.start - r.start, part.stop - r.start)
                _, of_part, _ = loss_of.of_rows(d[within], part.start, True)
                assert of_part is not None
                d[within] = of_part
        else:
            d = kept[rows] if overwrites else kept[rows].clone()
        d.mul_(grad if grad.dim() == 0 else grad[rows])
        if needs[2] or needs[3]:
            sum_ = d.sum(0, dtype=compute)
            sums = sum_ if sums is None else sums.add_(sum_)
        dz = (d if options.scale == 1.0 else d.mul_(options.scale)).to(x.dtype)
        if dx is not None:
            dx[rows] = mm(dz, matrix)
        elif needs[0]:
            dx = mm(dz, matrix)
        if needs[1]:
            dw = mm(dz.mT, x[rows]) if dw is None else _add_mm(dw.to(compute), dz.mT, x[rows])
        del d, dz
    d_bias = None
    if needs[2]:
        d_bias = sums if options.scale == 1.0 and not needs[3] else sums * options.scale
    return [None if dx is None else dx.view(shape), dw, d_bias, sums if needs[3] else None, *[None] * 5]


def _differentiable(call: _Call, tensors: Sequence[Any], needs: Sequence[bool]) -> Gradients:
    """As :func:`_backward`, with a graph of the gradients' own, by autograd from the reference."""
    grad, *inputs = tensors[:5]
    target, weight = tensors[5:7]
    # Views, because one input may be computed from another and only the direct dependence counts.
    inputs = [None if t is None else t.view_as(t) for t in inputs]
    options = call.options
    with no_autocast(grad):
        x, matrix, bias = call.operands(*inputs[:3])
        loss, _ = _of_logits(
            reference.class_logits(widened(F.linear(x, matrix, bias)), options.scale, None), _flat(target),
            call.shape[:-1], options._replace(stats=False), weight, inputs[3], call.dtype,
        )  # fmt: skip
    wanted = [t for t, need in zip(inputs, needs[:4], strict=True) if need]
    grads = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
    return *(next(grads) if need else None for need in needs[:4]), *[None] * 5


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

    A tape of the call is for calls of ``what``, and :func:`again` makes them by it.
    """
    autocasts, tensors = autocast_dtype(input), (input, linear_weight, linear_bias, logit_bias, target, weight)
    dtype = loss_dtype(input.dtype, target, logit_bias) if autocasts is None else compute_dtype(autocasts)
    if traced() or input.numel() == 0 or target.requires_grad or (weight is not None and weight.requires_grad):
        operands: Any = autocast(input.flatten(0, -2), linear_weight, linear_bias)
        logits = reference.class_logits(widened(F.linear(*operands)), options.scale, None)
        return _of_logits(logits, _flat(target), input.shape[:-1], options, weight, logit_bias, dtype)
    grad = differentiated(*tensors)
    size = input.shape[:-1].numel() * linear_weight.shape[0] * (autocasts or input.dtype).itemsize
    call = _Call(options, input.shape, dtype, autocasts, grad, grad and size <= KEEP_LOGITS_BYTES)
    what = what or ("torch: linear_cross_entropy", call)
    loss, *stats = applying(_LinearCrossEntropy, tensors[0])(*tensors, call, what, None)
    return loss, tuple(stats)


def again(found: Tape, tensors: tuple[Any, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A call that a tape fits, given input, linear_weight, linear_bias, logit_bias, target and weight."""
    loss, *stats = applying(_LinearCrossEntropy, tensors[0])(*tensors, found.of, None, found)
    return loss, tuple(stats)


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
