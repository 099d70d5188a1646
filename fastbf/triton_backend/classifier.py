"""The shared classifier's loss on kernels, between matrix products.

The logits are kept once, in the dtype of the product that makes them, as long as that takes no more than a share of the
device's memory; above it they are made in chunks of rows, and made again in backward. Their gradient takes the place of
the logits, or, where these are needed once more because the graph is retained, is made in chunks of rows beside them.

Source: docs/design.md, the mathematics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from fastbf.kernels import cross_entropy
from fastbf.kernels.cross_entropy import Options
from fastbf.kernels.launch import BuildError
from fastbf.precision import loss_dtype
from fastbf.reference import LossOptions
from fastbf.torch_state import autocast_dtype, copy_all, differentiated, donated, no_autocast
from fastbf.triton_backend.functions import by_kernels, dense, distinct, limits_of, product_dtype
from fastbf.triton_backend.matmul import add_weight_gradient, linear_into, product_into, weight_gradient

__all__ = ["BuildError", "linear_cross_entropy"]

#: Shares of the device's memory: how much the logits that are kept for backward may take (5 GiB of 80), and how much of
#: logits, or of their gradient, is made at a time (1.25 GiB).
KEPT, CHUNK = 1 / 16, 1 / 64
#: Rows of a chunk, at least: each chunk reads the whole weight and adds to its whole gradient.
MIN_ROWS = 512


class Head(NamedTuple):
    """A call without its tensors."""

    scale: float  #: this and the next five are those of ``LossOptions``
    reduction: str
    ignore_index: int
    label_smoothing: float
    forked: bool
    stats: bool
    keep: bool  #: the logits, for backward
    compute: torch.dtype  #: of the matrix products
    loss: torch.dtype

    def options(self, bias: Tensor | None, weight: Tensor | None, logit_bias: Tensor | None) -> Options:
        """What both kernels take."""
        return Options(weight, bias, logit_bias, self.scale, self.ignore_index, self.label_smoothing)

    @property
    def streams(self) -> int:
        """2 for a fork, else 1."""
        return 2 if self.forked else 1


def keeps(rows: int, num_classes: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the logits of a call are kept for backward."""
    return rows * num_classes * dtype.itemsize <= KEPT * limits_of(device).memory


def _chunks(x: Tensor, num_classes: int) -> list[slice]:
    """The rows to work on at a time: as few chunks as memory allows, of about the same size."""
    rows, most = x.shape[0], max(MIN_ROWS, int(CHUNK * limits_of(x.device).memory) // (num_classes * x.dtype.itemsize))
    if rows <= most:
        return [slice(0, rows)]
    step = -(-rows // -(-rows // most))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _buffer(x: Tensor, num_classes: int, rows: int) -> Tensor:
    """Room for the logits of so many rows, or for their gradient."""
    return torch.empty(rows, cross_entropy.padded(num_classes, x.dtype), dtype=x.dtype, device=x.device)


class Results(NamedTuple):
    """What forward gives, and leaves for backward."""

    loss: Tensor  #: (), or (M,) for "none"
    stats: Tensor  #: fp32 (3, streams): ``kernels.cross_entropy.STATS``
    total: Tensor  #: fp32 (1,): what a mean divides by
    x: Tensor  #: (M, C) in the products' dtype
    matrix: Tensor  #: (K, C): the classifier's weight likewise
    z: Tensor  #: (M, K + padding), or no rows of it if they are not kept: the products
    of_rows: Tensor  #: fp32 (6, M): ``kernels.cross_entropy.ROW``


def forward(x: Tensor, matrix: Tensor, target: Tensor, options: Options, head: Head) -> Results:
    """The loss of logits = scale · (x · matrixᵀ + bias) + logit_bias, and what backward needs.

    Args:
        x: (M, C), contiguous.
        matrix: (K, C), the classifier's weight.
        target: (N,) int64 or (N, K) floating point, M = N or 2N.
        options: of the loss, with its tensors.
        head: the call.
    """

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    rows, num_classes, whole = x.shape[0], matrix.shape[0], head.reduction != "none"
    loss = empty(*() if whole else (rows,), dtype=head.loss)
    total, stats, of_rows = empty(1), empty(cross_entropy.STATS, head.streams), empty(cross_entropy.ROW, rows)
    with no_autocast(x):
        x, matrix = _narrowed(x, matrix, head.compute)
        kept = _buffer(x, num_classes, rows if head.keep else 0)
        chunks = [slice(0, rows)] if head.keep else _chunks(x, num_classes)
        room = kept if head.keep else _buffer(x, num_classes, chunks[0].stop)
        for part in chunks:
            z = room[: part.stop - part.start, :num_classes]
            linear_into(x[part], matrix, None, z)
            cross_entropy.forward(z, target, options, count=head.stats, first=part.start, of_rows=of_rows)
    if not whole:
        loss.copy_(of_rows[0])
    cross_entropy.finish(
        of_rows, streams=head.streams, mean=head.reduction == "mean", loss=loss if whole else total, total=total,
        stats=stats,
    )  # fmt: skip
    return Results(loss, stats, total, x, matrix, kept, of_rows)


def _narrowed(x: Tensor, matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both in ``dtype``, by one launch."""
    found = [t if t.dtype == dtype else torch.empty(t.shape, dtype=dtype, device=t.device) for t in (x, matrix)]
    copies = [(to, t) for to, t in zip(found, (x, matrix), strict=True) if to is not t]
    if copies:
        copy_all([to for to, _ in copies], [t for _, t in copies])
    return found[0], found[1]


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    matrix: bool
    bias: bool
    logit_bias: bool

    @property
    def sums(self) -> bool:
        """Whether that of the logits is, summed over rows."""
        return self.bias or self.logit_bias


class Gradients(NamedTuple):
    """What backward gives, None where it is not wanted."""

    x: Tensor | None  #: in x's dtype
    matrix: Tensor | None  #: in fp32 or the products' dtype
    sums: Tensor | None  #: fp32 (K,): of the logits' gradient, over rows


def backward(
    grad: Tensor, made: Results, target: Tensor, options: Options, head: Head, wanted: Wanted,
    dtypes: tuple[torch.dtype, torch.dtype], donated: bool = False,
) -> Gradients:  # fmt: skip
    """The gradients of one call.

    Args:
        grad: of the loss, () or (M,), contiguous.
        made: as forward left it.
        target, options, head: as in forward.
        wanted: which gradients; at least one.
        dtypes: of x's gradient, and of the weight's, fp32 or that of the products.
        donated: whether the products may be overwritten, which spares their gradient room of its own.
    """
    x, matrix, kept, num_classes = made.x, made.matrix, made.z, made.matrix.shape[0]
    dx = torch.empty(x.shape, dtype=dtypes[0], device=x.device) if wanted.x else None
    d_matrix = sums = None
    in_place = head.keep and donated  # the kernel writes to each element after it has read it
    chunks = [slice(0, x.shape[0])] if in_place else _chunks(x, num_classes)
    room = kept if in_place else _buffer(x, num_classes, chunks[0].stop)
    if in_place:
        increment_version(kept)  # if this fails half-way, autograd knows that they are overwritten
    with no_autocast(x):
        for rows in chunks:
            dz = room[: rows.stop - rows.start, :num_classes]
            logits = kept[rows, :num_classes] if head.keep else dz
            if not head.keep:
                linear_into(x[rows], matrix, None, logits)
            part = torch.empty(num_classes, dtype=torch.float32, device=x.device) if wanted.sums else None
            cross_entropy.backward(
                grad, logits, target, made.of_rows, options, total=made.total if head.reduction == "mean" else None,
                first=rows.start, dz=dz, sums=part,
            )  # fmt: skip
            if dx is not None:
                product_into(dz, matrix, dx[rows])
            if wanted.matrix and d_matrix is None:
                # The sum over several chunks is kept in fp32.
                d_matrix = weight_gradient(dz, x[rows], dtypes[1] if len(chunks) == 1 else torch.float32)
            elif d_matrix is not None:
                add_weight_gradient(d_matrix, dz, x[rows])
            sums = part if sums is None or part is None else sums.add_(part)
    return Gradients(dx, None if d_matrix is None else d_matrix.to(dtypes[1]), sums)


class _Classifier(Function):
    """The shared classifier's loss. Saves x and the weight in the products' dtype, the products [M, K] in it unless
    they are too large, the target, and six fp32 numbers a row. Also gives each stream's loss and accuracy, (2,
    streams), without gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None, logit_bias: Tensor | None, target: Tensor,
        weight: Tensor | None, head: Head,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        made = forward(x, matrix, target, head.options(bias, weight, logit_bias), head)
        ctx.save_for_backward(*made[2:], target, bias, weight, logit_bias)
        ctx.head, ctx.dtypes = head, [None if t is None else t.dtype for t in (x, matrix, bias, logit_bias)]
        ctx.mark_non_differentiable(made.stats)
        ctx.set_materialize_grads(False)  # zeros for the statistics would cost a launch
        return made.loss, made.stats

    @staticmethod
    @by_kernels("linear_cross_entropy")
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        head, wanted = ctx.head, Wanted(*ctx.needs_input_grad[:4])
        x_dtype, matrix_dtype, bias_dtype, logit_bias_dtype = ctx.dtypes
        *made, target, bias, weight, logit_bias = ctx.saved_tensors
        grads = backward(
            grad.contiguous(), Results(grad, grad, *made), target, head.options(bias, weight, logit_bias), head, wanted,
            (x_dtype, product_dtype(matrix_dtype, head.compute)), donated(grad),
        )  # fmt: skip
        d_matrix = None if grads.matrix is None else grads.matrix.to(matrix_dtype)
        d_bias = d_logit_bias = None
        if grads.sums is not None and wanted.bias:
            d_bias = (grads.sums if head.scale == 1 else grads.sums * head.scale).to(bias_dtype)
        if grads.sums is not None and wanted.logit_bias:
            d_logit_bias = grads.sums.to(logit_bias_dtype)
        return grads.x, d_matrix, d_bias, d_logit_bias, None, None, None


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, options: LossOptions, *, linear_bias: Tensor | None,
    weight: Tensor | None, logit_bias: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """The loss, and each stream's loss, accuracy and unadjusted accuracy, anything without ``stats``."""
    autocasts = autocast_dtype(input)
    compute, num_classes = autocasts or input.dtype, linear_weight.shape[0]
    rows = input.flatten(0, -2)
    keep = differentiated(input, linear_weight, linear_bias, logit_bias)
    keep = keep and keeps(rows.shape[0], num_classes, compute, input.device)
    target = target.reshape(-1, num_classes) if target.is_floating_point() else target.flatten()
    loss_type = torch.float32 if autocasts else loss_dtype(input.dtype, target, logit_bias)
    head = Head(*options, keep=keep, compute=compute, loss=loss_type)
    x, target, linear_bias, weight, logit_bias = dense(rows, target, linear_bias, weight, logit_bias)
    x, linear_weight, linear_bias, logit_bias = distinct(x, linear_weight, linear_bias, logit_bias)
    loss, of_streams = _Classifier.apply(x, linear_weight, linear_bias, logit_bias, target, weight, head)
    return loss.view(input.shape[:-1] if options.reduction == "none" else ()), of_streams.unbind()
