"""The shared classifier's loss as matrix products and kernels, forward and backward, on plain tensors.

The logits are kept once, in the dtype of the product that makes them, as long as that takes no more than a share of the
device's memory; above it they are made in chunks of rows, and made again in backward. Their gradient takes the place of
the logits, or, where these are needed once more because the graph is retained, is made in chunks of rows beside them.

Source: DESIGN sections 1 and 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastbf.kernels import cross_entropy
from fastbf.kernels.limits import device_limits
from fastbf.torch_state import no_autocast, traced_as_constant
from fastbf.triton_backend.matmul import add_weight_gradient, linear_into, product_into, weight_gradient

#: Shares of the device's memory: how much the logits that are kept for backward may take (5 GiB of 80), and how much of
#: logits, or of their gradient, is made at a time (1.25 GiB).
KEPT, CHUNK = 1 / 16, 1 / 64
#: A chunk has so many rows at least: each one reads the whole weight, and adds to the whole of its gradient.
MIN_ROWS = 512


class Head(NamedTuple):
    """A call without its tensors. Numbers, names and dtypes only, so that a registered operator can take it."""

    streams: int  #: 2 for a fork, else 1
    reduction: str
    scale: float
    ignore_index: int
    smoothing: float
    count: bool  #: whether to find each stream's accuracy
    keep: bool  #: the logits, for backward
    compute: torch.dtype  #: of the matrix products
    loss: torch.dtype

    def options(
        self, weight: Tensor | None, bias: Tensor | None, logit_bias: Tensor | None
    ) -> cross_entropy.Options:  # fmt: skip
        """What both kernels take."""
        return cross_entropy.Options(weight, bias, logit_bias, self.scale, self.ignore_index, self.smoothing)


@traced_as_constant
def _memory(device: torch.device) -> int:
    return device_limits(device).memory


def keeps(rows: int, num_classes: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the logits of a call are kept for backward."""
    return rows * num_classes * dtype.itemsize <= KEPT * _memory(device)


def _chunks(rows: int, num_classes: int, dtype: torch.dtype, device: torch.device) -> Iterator[slice]:
    """The rows to work on at a time: as few chunks as memory allows, of about the same size."""
    most = max(MIN_ROWS, int(CHUNK * _memory(device)) // (num_classes * dtype.itemsize))
    count = -(-rows // most)
    step = -(-rows // count)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class Results(NamedTuple):
    """What forward gives, and leaves for backward."""

    loss: Tensor  #: (), or (M,) for "none"
    stats: Tensor  #: fp32 (3, streams): ``kernels.cross_entropy.STATS``
    total: Tensor  #: fp32 (1,): what a mean divides by
    x: Tensor | None  #: (M, C) in the products' dtype, unless x has it
    matrix: Tensor | None  #: (K, C): the classifier's weight likewise
    z: Tensor  #: (M, K + padding), or no rows of it if they are not kept: the products
    of_rows: Tensor  #: fp32 (6, M): ``kernels.cross_entropy.ROW``


def allocate(x: Tensor, matrix: Tensor, head: Head) -> Results:
    """Empty tensors for a call."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    rows, num_classes = x.shape[0], matrix.shape[0]
    return Results(
        empty(*(rows,) if head.reduction == "none" else (), dtype=head.loss),
        empty(cross_entropy.STATS, head.streams),
        empty(1),
        empty(*x.shape, dtype=head.compute) if x.dtype != head.compute else None,
        empty(*matrix.shape, dtype=head.compute) if matrix.dtype != head.compute else None,
        empty(rows if head.keep else 0, cross_entropy.padded(num_classes, head.compute), dtype=head.compute),
        empty(cross_entropy.ROW, rows),
    )


def _buffer(x: Tensor, num_classes: int, rows: slice) -> Tensor:
    """Room for a chunk's logits, or for their gradient."""
    shape = rows.stop - rows.start, cross_entropy.padded(num_classes, x.dtype)
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def forward(
    x: Tensor, matrix: Tensor, bias: Tensor | None, target: Tensor, weight: Tensor | None, logit_bias: Tensor | None,
    head: Head,
) -> Results:  # fmt: skip
    """The loss of logits = scale · (x · matrixᵀ + bias) + logit_bias, and what backward needs.

    Args:
        x: (M, C), contiguous.
        matrix: (K, C), the classifier's weight; bias (K,) or None.
        target: (N,) int64 or (N, K) floating point, M = N or 2N.
        weight, logit_bias: (K,) or None.
        head: the call.
    """
    made = allocate(x, matrix, head)
    narrow = [(to, t) for to, t in ((made.x, x), (made.matrix, matrix)) if to is not None]
    x, matrix = x if made.x is None else made.x, matrix if made.matrix is None else made.matrix
    options, num_classes = head.options(weight, bias, logit_bias), matrix.shape[0]
    with no_autocast(x):
        if narrow:
            torch._foreach_copy_([to for to, _ in narrow], [t for _, t in narrow])
        every = [slice(0, x.shape[0])]
        chunks = every if head.keep else list(_chunks(x.shape[0], num_classes, x.dtype, x.device))
        buffer = made.z if head.keep else _buffer(x, num_classes, chunks[0])
        for rows in chunks:
            z = buffer[: rows.stop - rows.start, :num_classes]
            linear_into(x[rows], matrix, None, z)
            cross_entropy.forward(z, target, options, count=head.count, first=rows.start, of_rows=made.of_rows)
    whole = head.reduction != "none"
    if not whole:
        made.loss.copy_(made.of_rows[0])
    cross_entropy.finish(
        made.of_rows, streams=head.streams, mean=head.reduction == "mean", loss=made.loss if whole else made.total,
        total=made.total, stats=made.stats,
    )  # fmt: skip
    return made


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
    grad: Tensor, x: Tensor, matrix: Tensor, z: Tensor, of_rows: Tensor, total: Tensor, bias: Tensor | None,
    target: Tensor, weight: Tensor | None, logit_bias: Tensor | None, head: Head, wanted: Wanted,
    dtypes: tuple[torch.dtype, torch.dtype], donated: bool = False,
) -> Gradients:  # fmt: skip
    """The gradients of one call.

    Args:
        grad: of the loss, () or (M,), contiguous.
        x, matrix: in the products' dtype, as forward multiplied them.
        z, of_rows, total: as forward left them.
        bias, target, weight, logit_bias, head: as in forward.
        wanted: which gradients; at least one.
        dtypes: of x's gradient, and of the weight's, fp32 or that of the products.
        donated: whether z may be overwritten, which spares its gradient room of its own.
    """
    options, num_classes = head.options(weight, bias, logit_bias), matrix.shape[0]
    dx = torch.empty(x.shape, dtype=dtypes[0], device=x.device) if wanted.x else None
    d_matrix = sums = None
    in_place = head.keep and donated  # the kernel writes to each element after it has read it
    every = [slice(0, x.shape[0])]
    chunks = every if in_place else list(_chunks(x.shape[0], num_classes, x.dtype, x.device))
    buffer = z if in_place else _buffer(x, num_classes, chunks[0])
    if in_place:
        torch.autograd.graph.increment_version(z)  # should this fail half-way, autograd knows that z is gone
    with no_autocast(x):
        for rows in chunks:
            dz = buffer[: rows.stop - rows.start, :num_classes]
            logits = z[rows, :num_classes] if head.keep else dz
            if not head.keep:
                linear_into(x[rows], matrix, None, logits)
            partials = None
            if wanted.sums:
                parts = cross_entropy.sums_parts(logits.shape[0], num_classes, x.device)
                partials = torch.empty(parts, num_classes, dtype=torch.float32, device=x.device)
            cross_entropy.backward(
                grad, logits, target, of_rows, options, total=total if head.reduction == "mean" else None,
                first=rows.start, dz=dz, sums=partials,
            )  # fmt: skip
            if wanted.x:
                product_into(dz, matrix, dx[rows])
            if wanted.matrix and d_matrix is None:
                # What several chunks add up is fp32 until it is whole.
                d_matrix = weight_gradient(dz, x[rows], dtypes[1] if len(chunks) == 1 else torch.float32)
            elif wanted.matrix:
                add_weight_gradient(d_matrix, dz, x[rows])
            if wanted.sums:
                part = partials.sum(0)
                sums = part if sums is None else sums.add_(part)
    return Gradients(dx, d_matrix.to(dtypes[1]) if wanted.matrix else None, sums)
