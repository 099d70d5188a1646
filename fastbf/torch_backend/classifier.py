"""The torch backend's classifier loss: linear and cross-entropy in chunks of rows.

The autograd Function keeps the logits once, in the dtype of the product, unless they are large. Their gradient
overwrites them if backward runs only once. For a graph of the gradient (double backward) it differentiates the
reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastbf import reference
from fastbf.precision import chunk_elements, compute_dtype, loss_dtype, widened
from fastbf.reference import LossOptions
from fastbf.torch_backend.matmul import linear, mm
from fastbf.torch_state import autocast, autocast_dtype, differentiated, donated, is_batched, no_autocast, traced

# The least number of rows in a matrix product.
_MIN_ROWS = 512
# Up to this many bytes of logits are kept for backward. Larger ones are computed again, in chunks.
KEEP_LOGITS_BYTES = 1 << 30
# Up to this many logits PyTorch's own operators are quickest.
SMALL = 1 << 19


class _Targets:
    """The targets of rows of logits. Row r has target r mod N, so a fork needs no copy of the target."""

    def __init__(
        self, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float, num_classes: int
    ) -> None:  # fmt: skip
        self.target, self.weight, self.ignore_index = target, weight, ignore_index
        self.smoothing, self.num_classes = smoothing, num_classes
        self.total_weight = num_classes if weight is None else weight.sum()

    def pieces(self, rows: range) -> Iterator[tuple[slice, Tensor]]:
        """Cuts a range of rows at the boundary of the streams: (the piece within the range, its targets)."""
        n, start = self.target.shape[0], rows.start
        while start < rows.stop:
            stop = min(rows.stop, (start // n + 1) * n)
            first = start % n
            yield slice(start - rows.start, stop - rows.start), self.target[first : first + stop - start]
            start = stop

    def distribution(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Class-weighted, smoothed probabilities: what multiplies -log p."""
        t = t.to(dtype)
        if self.smoothing:
            t = t * (1 - self.smoothing) + self.smoothing / self.num_classes
        return t if self.weight is None else t * self.weight

    def loss(self, log_p: Tensor, t: Tensor) -> Tensor:
        """Loss of every row. log_p (R, K) log-probabilities, t the rows' targets → (R,)."""
        if t.is_floating_point():
            return -(self.distribution(t, log_p.dtype) * log_p).sum(-1)
        loss = F.nll_loss(log_p, t, self.weight, ignore_index=self.ignore_index, reduction="none")
        if not self.smoothing:
            return loss
        uniform = log_p.sum(-1) if self.weight is None else log_p @ self.weight
        loss = (1 - self.smoothing) * loss - self.smoothing / self.num_classes * uniform
        return torch.where(t != self.ignore_index, loss, 0)

    def d_logits(self, logits: Tensor, t: Tensor, grad: Tensor, out: Tensor) -> None:
        """Writes into ``out`` (R, K) the gradient of Σ grad · loss by the logits: grad · (p · Σ t - t), row by row."""
        d = torch.softmax(logits, -1, out=out)
        if t.is_floating_point():
            t = self.distribution(t, logits.dtype)
            d.mul_(t.sum(-1, keepdim=True)).sub_(t).mul_(grad[:, None])
            return
        valid = t != self.ignore_index
        index, grad = torch.where(valid, t, 0)[:, None], torch.where(valid, grad, 0)[:, None]
        hit = grad if self.weight is None else grad * self.weight[index]
        if not self.smoothing:
            d.mul_(hit)
        else:
            hit, uniform = hit * (1 - self.smoothing), grad * (self.smoothing / self.num_classes)
            d.mul_(hit + uniform * self.total_weight)
            d -= uniform if self.weight is None else uniform * self.weight
        d.scatter_add_(1, index, -hit)


class _LinearCrossEntropy(Function):
    """Loss of every row of logits scale · (x Wᵀ + b) + logit_bias, and ``reference.correct`` of them.

    Saves the input, the weight, the target and, if ``keep``, the product x Wᵀ + b in its own dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, logit_bias: Tensor | None,
        targets: _Targets, scale: float, count: bool, keep: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows = x.shape[0]
        loss = x.new_empty(rows, dtype=compute_dtype(x.dtype))
        correct = torch.empty(2, rows if count else 0, dtype=torch.bool, device=x.device)
        kept = None
        for r in [range(rows)] if keep else _products(x, linear_weight.shape[0]):
            z = linear(x[r.start : r.stop], linear_weight, linear_bias)
            _losses(z, r, targets, scale, logit_bias, loss=loss, correct=correct if count else None)
            kept = z if keep else None
            del z  # frees its memory before the next product
        ctx.save_for_backward(x, linear_weight, linear_bias, logit_bias, targets.target, targets.weight, kept)
        ctx.targets, ctx.scale = targets, scale
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        *inputs, _, _, kept = ctx.saved_tensors
        x, linear_weight, linear_bias, logit_bias = inputs
        needs, targets, scale, rest = ctx.needs_input_grad[:4], ctx.targets, ctx.scale, [None] * 4
        if torch.is_grad_enabled() or is_batched(grad):
            with torch.enable_grad():
                return *_differentiable(inputs, needs, targets, scale, grad), *rest
        in_place = kept is not None and donated(x)
        chunks = [range(x.shape[0])] if in_place else list(_products(x, linear_weight.shape[0]))
        room = None if kept is None or in_place else x.new_empty(len(chunks[0]), linear_weight.shape[0])
        dx, dw, db = torch.empty_like(x) if needs[0] and len(chunks) > 1 else None, None, None
        with no_autocast(x):
            for r in chunks:
                rows = slice(r.start, r.stop)
                z = linear(x[rows], linear_weight, linear_bias) if kept is None else kept[rows]
                dz = z if room is None else room[: len(r)]
                sums = _d_products(z, r, targets, grad, scale, logit_bias, needs[2] or needs[3], out=dz)
                db = sums if db is None or sums is None else db.add_(sums)
                if dx is not None:
                    dx[rows] = mm(dz, linear_weight)
                elif needs[0]:
                    dx = mm(dz, linear_weight)
                if needs[1]:
                    dw = torch.mm(dz.mT, x[rows]) if dw is None else _add_mm(dw.to(grad.dtype), dz.mT, x[rows])
                del z, dz
        return (
            dx,
            None if dw is None else dw.to(linear_weight.dtype),
            (db * scale).to(linear_bias.dtype) if needs[2] and db is not None else None,
            db.to(logit_bias.dtype) if needs[3] and db is not None else None,
            *rest,
        )


def _losses(
    z: Tensor, rows: range, targets: _Targets, scale: float, logit_bias: Tensor | None, *, loss: Tensor,
    correct: Tensor | None,
) -> None:  # fmt: skip
    """Writes loss and ``reference.correct`` of ``rows``, whose products are z, into the tensors of all rows."""
    for part in _parts(rows, z):
        unadjusted = reference.class_logits(_within(z, rows, part).to(loss.dtype), scale, None)
        logits = reference.class_logits(unadjusted, 1.0, logit_bias)
        log_p = torch.log_softmax(logits, -1)
        for piece, t in targets.pieces(part):
            at = slice(part.start + piece.start, part.start + piece.stop)
            loss[at] = targets.loss(log_p[piece], t)
            if correct is not None:
                correct[:, at] = reference.correct(logits[piece], unadjusted[piece], t, targets.ignore_index)


def _d_products(
    z: Tensor, rows: range, targets: _Targets, grad: Tensor, scale: float, logit_bias: Tensor | None, wanted: bool, *,
    out: Tensor,
) -> Tensor | None:  # fmt: skip
    """Writes the gradient of z, which holds ``rows``. If ``wanted``, returns the logits' gradient summed over rows."""
    sums = None
    for part in _parts(rows, z):
        logits = reference.class_logits(_within(z, rows, part).to(grad.dtype), scale, logit_bias)
        d = torch.empty_like(logits)
        for piece, t in targets.pieces(part):
            targets.d_logits(logits[piece], t, grad[part.start : part.stop][piece], out=d[piece])
        if wanted:
            sums = d.sum(0) if sums is None else sums.add_(d.sum(0))
        _within(out, rows, part).copy_(d if scale == 1.0 else d.mul_(scale))
    return sums


def _differentiable(
    inputs: Sequence[Any], needs: Sequence[bool], targets: _Targets, scale: float, grad: Tensor
) -> Iterator[Tensor | None]:
    """The gradients with a graph of their own, by autograd from the reference."""
    # Views, because one input may be computed from another and only the direct dependence counts.
    inputs = [None if t is None else t.view_as(t) for t in inputs]
    x, linear_weight, linear_bias, logit_bias = inputs
    target = targets.target if len(x) == len(targets.target) else torch.cat([targets.target, targets.target])
    terms, _ = reference.linear_cross_entropy_terms(
        x, linear_weight, target, linear_bias=linear_bias, weight=targets.weight, logit_bias=logit_bias, scale=scale,
        ignore_index=targets.ignore_index, label_smoothing=targets.smoothing,
    )  # fmt: skip
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(terms.loss, wanted, grad.to(terms.loss.dtype), create_graph=True))
    return (next(grads) if need else None for need in needs)


def _products(x: Tensor, num_classes: int) -> Iterator[range]:
    """The rows of each matrix product, if one does not compute all rows."""
    elements = 2 * chunk_elements(x.device, compute_dtype(x.dtype))
    return _cut(range(x.shape[0]), max(_MIN_ROWS, elements // num_classes))


def _parts(rows: range, z: Tensor) -> Iterator[range]:
    """Cuts rows into parts that fit the cache, for the work between two products."""
    return _cut(rows, max(1, chunk_elements(z.device, compute_dtype(z.dtype)) // z.shape[1]))


def _add_mm(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a · b, in total's dtype, which may be wider than that of a and b."""
    # Counters of FLOPs know no addmm_.
    return torch.addmm(total, a, b, out=total) if total.dtype == a.dtype else total.add_(torch.mm(a, b))


def _cut(rows: range, step: int) -> Iterator[range]:
    for start in range(rows.start, rows.stop, step):
        yield range(start, min(start + step, rows.stop))


def _within(z: Tensor, rows: range, part: range) -> Tensor:
    """The rows ``part`` of z, which holds ``rows``."""
    return z[part.start - rows.start : part.stop - rows.start]


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, options: LossOptions, *, linear_bias: Tensor | None,
    weight: Tensor | None, logit_bias: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """The loss, and with ``stats`` each stream's loss, accuracy and unadjusted accuracy, else nothing."""
    scale, _, ignore_index, label_smoothing, _, stats = options
    rows, num_classes, x = input.shape[:-1], linear_weight.shape[0], input
    if len(rows) > 1:
        x, target = input.flatten(0, -2), _flat(target)
    if autocast_dtype(input) is None:
        dtype = loss_dtype(x.dtype, target, logit_bias)
    else:
        x, linear_weight, linear_bias = autocast(x, linear_weight, linear_bias)  # type: ignore[assignment]
        dtype = compute_dtype(x.dtype)
    plain = traced() or target.requires_grad or (weight is not None and weight.requires_grad)
    if plain or x.shape[0] * num_classes <= SMALL:
        logits = reference.class_logits(widened(linear(x, linear_weight, linear_bias)), scale, None)
        return _of_logits(logits, target, rows, options, weight, logit_bias, dtype)
    compute = compute_dtype(x.dtype)
    prior, factor = (None if t is None else t.to(compute) for t in (logit_bias, weight))
    keep = x.shape[0] * num_classes * x.dtype.itemsize <= KEEP_LOGITS_BYTES
    keep = keep and differentiated(x, linear_weight, linear_bias, prior)
    targets = _Targets(target, factor, ignore_index, label_smoothing, num_classes)
    with no_autocast(x):
        loss, right = _LinearCrossEntropy.apply(x, linear_weight, linear_bias, prior, targets, scale, stats, keep)
    return _reduced(loss, right, target, rows, options, weight, dtype)


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
    return _reduced(loss, right, target, rows, options, weight, dtype)


def _reduced(
    loss: Tensor, right: Tensor, target: Tensor, rows: torch.Size, options: LossOptions, weight: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """The results from the loss of every row and ``reference.correct``."""
    forked, ignore_index = options.forked, options.ignore_index
    norm = reference.row_norm(target, weight, ignore_index, loss.dtype)
    denominator = norm.sum()  # of one stream
    denominator = torch.where(denominator == 0, torch.nan, denominator)  # NaN if no row counts, smoothed or not
    result = loss.view(rows) if options.reduction == "none" else loss.sum()
    result = (result / (denominator * (2 if forked else 1)) if options.reduction == "mean" else result).to(dtype)
    if not options.stats:
        return result, ()
    streams = loss.detach().view(2 if forked else 1, -1)
    counted = torch.ones_like(norm) if target.is_floating_point() else (target != ignore_index).to(norm.dtype)
    accuracy, unadjusted_accuracy = right.view(2, *streams.shape).to(norm.dtype).sum(-1) / counted.sum()
    return result, (streams.sum(-1) / denominator.detach(), accuracy, unadjusted_accuracy)
