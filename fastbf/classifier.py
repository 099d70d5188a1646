"""The shared classifier's loss as matrix products and kernels, forward and backward, on plain tensors.

The logits are kept once, in the dtype of the product that makes them; their gradient is a second tensor of that size.
Class indices only, and logits up to a size (``fastbf/functional.py`` says which); the rest is the torch backend's.

Source: DESIGN sections 1 and 6.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastbf.context import no_autocast
from fastbf.kernels import cross_entropy
from fastbf.kernels.limits import device_limits
from fastbf.kernels.rows import partial_sums
from fastbf.products import linear_into, weight_gradient


class Head(NamedTuple):
    """A call without its tensors. Numbers, names and dtypes only, so that a registered operator can take it."""

    streams: int  #: 2 for a fork, else 1
    reduction: str
    scale: float
    ignore_index: int
    smoothing: float
    count: bool  #: whether to find each stream's accuracy
    compute: torch.dtype  #: of the matrix products
    loss: torch.dtype

    def options(self, weight: Tensor | None, logit_bias: Tensor | None) -> dict[str, object]:
        """What both kernels take."""
        return {
            "weight": weight, "logit_bias": logit_bias, "scale": self.scale, "ignore_index": self.ignore_index,
            "smoothing": self.smoothing,
        }  # fmt: skip


class Results(NamedTuple):
    """What forward gives, and leaves for backward."""

    loss: Tensor  #: (), or (M,) for "none"
    stats: Tensor  #: fp32 (2, streams)
    total: Tensor  #: fp32 (1,): what a mean divides by
    x: Tensor | None  #: (M, C) in the products' dtype, unless x has it
    matrix: Tensor | None  #: (K, C): the classifier's weight likewise
    z: Tensor  #: (M, K): the products
    of_rows: Tensor  #: fp32 (5, M): ``kernels.cross_entropy.ROW``


def allocate(x: Tensor, matrix: Tensor, head: Head) -> Results:
    """Empty tensors for a call."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    rows, num_classes = x.shape[0], matrix.shape[0]
    return Results(
        empty(*(rows,) if head.reduction == "none" else (), dtype=head.loss),
        empty(2, head.streams),
        empty(1),
        empty(*x.shape, dtype=head.compute) if x.dtype != head.compute else None,
        empty(*matrix.shape, dtype=head.compute) if matrix.dtype != head.compute else None,
        empty(rows, num_classes, dtype=head.compute),
        empty(cross_entropy.ROW, rows),
    )


def forward(
    x: Tensor, matrix: Tensor, bias: Tensor | None, target: Tensor, weight: Tensor | None, logit_bias: Tensor | None,
    head: Head,
) -> Results:  # fmt: skip
    """The loss of logits = scale · (x · matrixᵀ + bias) + logit_bias, and what backward needs.

    Args:
        x: (M, C), contiguous.
        matrix: (K, C), the classifier's weight; bias (K,) or None.
        target: (N,) int64, M = N or 2N.
        weight, logit_bias: (K,) or None.
        head: the call.
    """
    made = allocate(x, matrix, head)
    with no_autocast(x):
        narrow = [(to, t) for to, t in ((made.x, x), (made.matrix, matrix)) if to is not None]
        if bias is not None and bias.dtype != head.compute:
            narrow.append((torch.empty(bias.shape, dtype=head.compute, device=bias.device), bias))
            bias = narrow[-1][0]
        if narrow:
            torch._foreach_copy_([to for to, _ in narrow], [t for _, t in narrow])
        x, matrix = x if made.x is None else made.x, matrix if made.matrix is None else made.matrix
        linear_into(x, matrix, bias, made.z)
    options = head.options(weight, logit_bias)
    cross_entropy.forward(made.z, target, **options, count=head.count, of_rows=made.of_rows)
    whole, mean = head.reduction != "none", head.reduction == "mean"
    if not whole:
        made.loss.copy_(made.of_rows[0])
    if whole or head.count:
        loss = made.loss if whole else made.total
        cross_entropy.finish(
            made.of_rows, streams=head.streams, mean=mean, loss=loss, total=made.total, stats=made.stats
        )
    return made


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    matrix: bool
    bias: bool
    logit_bias: bool


class Gradients(NamedTuple):
    """What backward gives, None where it is not wanted."""

    x: Tensor | None  #: in x's dtype
    matrix: Tensor | None  #: in fp32 or the products' dtype
    sums: Tensor | None  #: fp32 (K,): of the logits' gradient, over rows


def backward(
    grad: Tensor, x: Tensor, matrix: Tensor, z: Tensor, of_rows: Tensor, total: Tensor, target: Tensor,
    weight: Tensor | None, logit_bias: Tensor | None, head: Head, wanted: Wanted,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> Gradients:  # fmt: skip
    """The gradients of one call.

    Args:
        grad: of the loss, () or (M,), contiguous.
        x, matrix: in the products' dtype, as forward multiplied them.
        z, of_rows, total: as forward left them.
        target, weight, logit_bias, head: as in forward.
        wanted: which gradients; at least one.
        dtypes: of x's gradient, and of the weight's, fp32 or that of the products.
    """
    dz = torch.empty_like(z)
    partials = None
    if wanted.bias or wanted.logit_bias:
        parts = partial_sums(z.shape[0], device_limits(z.device))
        partials = torch.empty(parts, z.shape[1], dtype=torch.float32, device=z.device)
    cross_entropy.backward(
        grad, z, target, of_rows, **head.options(weight, logit_bias), dz=dz, partials=partials,
        total=total if head.reduction == "mean" else None,
    )  # fmt: skip
    with no_autocast(x):
        return Gradients(
            torch.mm(dz, matrix).to(dtypes[0]) if wanted.x else None,
            weight_gradient(dz, x, dtypes[1]) if wanted.matrix else None,
            None if partials is None else partials.sum(0),
        )
