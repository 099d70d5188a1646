"""The torch backend's classifier loss: linear and cross-entropy in chunks of rows.

An autograd Function that keeps the logits once, in the dtype of the product, or not at all where they are large.
Asked for a graph of the gradient (double backward), it differentiates the reference.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import Function

from fastbf import gemm, reference
from fastbf.chunks import chunk_elements, compute_dtype
from fastbf.context import no_autocast

_MIN_ROWS = 512
# Up to this many bytes of logits are kept for backward; above, each chunk's logits are computed again.
KEEP_LOGITS_BYTES = 1 << 30


class _Targets:
    """Rows r of the logits and the target row r mod N they belong to: a fork repeats the target without a copy."""

    def __init__(
        self,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        smoothing: float,
        num_classes: int,
        dtype: torch.dtype,
    ) -> None:
        self.target, self.ignore_index = target, ignore_index
        self.smoothing, self.num_classes = smoothing, num_classes
        self.weight = None if weight is None else weight.to(dtype)
        self.total_weight = num_classes if weight is None else self.weight.sum()

    def pieces(self, rows: range) -> Iterator[tuple[slice, Tensor]]:
        """Cuts a range of rows at the stream boundary: (the piece within the range, its targets)."""
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

    def indices(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """For class indices: which rows count, the index (0 where ignored), and its class weight."""
        valid = t != self.ignore_index
        index = torch.where(valid, t, 0)
        return valid, index, 1.0 if self.weight is None else self.weight[index]

    def loss(self, log_p: Tensor, t: Tensor) -> Tensor:
        """Loss of every row. log_p (R, K) log-probabilities, t the rows' targets → (R,)."""
        if t.is_floating_point():
            return -(self.distribution(t, log_p.dtype) * log_p).sum(-1)
        valid, index, weight = self.indices(t)
        loss = -log_p.gather(1, index[:, None])[:, 0] * weight
        if self.smoothing:
            uniform = log_p.sum(-1) if self.weight is None else log_p @ self.weight
            loss = (1 - self.smoothing) * loss - self.smoothing / self.num_classes * uniform
        return torch.where(valid, loss, 0)

    def d_logits(self, logits: Tensor, t: Tensor, grad: Tensor, out: Tensor) -> None:
        """Writes into ``out`` (R, K) the gradient of Σ grad · loss by the logits: grad · (p · Σ t - t), row by row."""
        d = torch.softmax(logits, -1, out=out)
        if t.is_floating_point():
            t = self.distribution(t, logits.dtype)
            d.mul_(t.sum(-1, keepdim=True)).sub_(t).mul_(grad[:, None])
            return
        valid, index, weight = self.indices(t)
        grad = torch.where(valid, grad, 0)
        hit = grad * weight * (1 - self.smoothing)
        uniform = grad * (self.smoothing / self.num_classes)
        d.mul_((hit + uniform * self.total_weight)[:, None])
        if self.smoothing:
            d -= uniform[:, None] if self.weight is None else uniform[:, None] * self.weight
        d.scatter_add_(1, index[:, None], -hit[:, None])


class _LinearCrossEntropy(Function):
    """Per-row losses of a linear classifier. Saves the input, the weight, the target, and the product
    input · Wᵀ + b in its own dtype unless that passes ``KEEP_LOGITS_BYTES``."""

    @staticmethod
    def forward(ctx, x, linear_weight, linear_bias, logit_bias, target, weight, scale, ignore_index, smoothing, count):
        rows, num_classes = x.shape[0], linear_weight.shape[0]
        dtype = compute_dtype(x.dtype)
        targets = _Targets(target, weight, ignore_index, smoothing, num_classes, dtype)
        keep = any(ctx.needs_input_grad) and rows * num_classes * x.dtype.itemsize <= KEEP_LOGITS_BYTES
        products = []
        loss = x.new_empty(rows, dtype=dtype)
        correct = torch.empty(rows if count else 0, dtype=torch.bool, device=x.device)
        for r in _row_chunks(x, num_classes):
            z = gemm.linear(x[r.start : r.stop], linear_weight, linear_bias)
            if keep:
                products.append(z)
            logits = reference.class_logits(z.to(dtype), scale, logit_bias)
            log_p = torch.log_softmax(logits, -1)
            for piece, t in targets.pieces(r):
                at = slice(r.start + piece.start, r.start + piece.stop)
                loss[at] = targets.loss(log_p[piece], t)
                if count:
                    correct[at] = reference.correct(logits[piece], t, ignore_index)[0]
        ctx.save_for_backward(x, linear_weight, linear_bias, logit_bias, target, weight, *products)
        ctx.options = (scale, ignore_index, smoothing)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, grad, _):
        x, linear_weight, linear_bias, logit_bias, target, weight, *products = ctx.saved_tensors
        scale, ignore_index, smoothing = ctx.options
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, grad)
        num_classes = linear_weight.shape[0]
        targets = _Targets(target, weight, ignore_index, smoothing, num_classes, grad.dtype)
        dx = torch.empty_like(x) if needs[0] else None
        dw = db = None
        with no_autocast(x):
            for i, r in enumerate(_row_chunks(x, num_classes)):
                rows = slice(r.start, r.stop)
                z = products[i] if products else gemm.linear(x[rows], linear_weight, linear_bias)
                logits = reference.class_logits(z.to(grad.dtype), scale, logit_bias)
                d = torch.empty_like(logits)
                for piece, t in targets.pieces(r):
                    targets.d_logits(logits[piece], t, grad[rows][piece], out=d[piece])
                if needs[2] or needs[3]:
                    db = d.sum(0) if db is None else db + d.sum(0)
                d = d.to(x.dtype) if scale == 1.0 else d.mul_(scale).to(x.dtype)
                if needs[0]:
                    dx[rows] = gemm.mm(d, linear_weight)
                if needs[1]:
                    dw = _accumulate(dw, d, x[rows], grad.dtype)
        return (
            dx,
            None if dw is None else dw.to(linear_weight.dtype),
            (db * scale).to(linear_bias.dtype) if needs[2] else None,
            db.to(logit_bias.dtype) if needs[3] else None,
            *[None] * 6,
        )


def _accumulate(total: Tensor | None, d: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """total + dᵀ x, where partial sums of half-precision products are kept in fp32."""
    part = gemm.mm(d.mT, x)
    return part if total is None else total.to(dtype).add_(part)


def _differentiable_backward(ctx, grad: Tensor):
    x, linear_weight, linear_bias, logit_bias, target, weight, *_ = ctx.saved_tensors
    scale, ignore_index, smoothing = ctx.options
    needs = ctx.needs_input_grad[:4]
    # Aliases: where one input was computed from another, only the direct dependence is wanted here.
    x, linear_weight, linear_bias, logit_bias = (
        None if t is None else t.view_as(t) for t in (x, linear_weight, linear_bias, logit_bias)
    )
    terms, _ = reference.linear_cross_entropy_terms(
        x,
        linear_weight,
        target if x.shape[0] == target.shape[0] else torch.cat([target, target]),
        linear_bias=linear_bias,
        weight=weight,
        logit_bias=logit_bias,
        scale=scale,
        ignore_index=ignore_index,
        label_smoothing=smoothing,
    )
    inputs = [t for t, need in zip((x, linear_weight, linear_bias, logit_bias), needs, strict=True) if need]
    grads = iter(torch.autograd.grad(terms.loss, inputs, grad.to(terms.loss.dtype), create_graph=True))
    return *(next(grads) if need else None for need in needs), *[None] * 6


def _row_chunks(x: Tensor, num_classes: int) -> Iterator[range]:
    elements = 2 * chunk_elements(x.device, compute_dtype(x.dtype))
    step = max(_MIN_ROWS, elements // num_classes)
    for start in range(0, x.shape[0], step):
        yield range(start, min(start + step, x.shape[0]))


def linear_cross_entropy_rows(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    logit_bias: Tensor | None,
    scale: float,
    ignore_index: int,
    label_smoothing: float,
    count_correct: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of every row of logits = scale · (x Wᵀ + b) + logit_bias, and whether its largest logit is right.

    x (M, C); target of N rows with M = N or 2N, the fork repeating it. Returns ((M,) in fp32 or fp64, (M,) bool, or
    an empty tensor unless ``count_correct``).
    """
    if logit_bias is not None:
        logit_bias = logit_bias.to(compute_dtype(x.dtype))
    with no_autocast(x):
        return _LinearCrossEntropy.apply(
            x, linear_weight, linear_bias, logit_bias, target, weight, scale, ignore_index, label_smoothing,
            count_correct,
        )  # fmt: skip
