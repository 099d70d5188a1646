"""Gathers all ranks' samples, with gradients, for attention across ranks and contrastive losses.

docs/distributed.md says what is exact, what is sent and what is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastbf import checks
from fastbf.autograd import once_differentiable
from fastbf.distributed import collectives
from fastbf.distributed.collectives import Pending
from fastbf.distributed.operators import communicating
from fastbf.distributed.process_groups import Batch, Facts, confirm, meet, name_of, rank_and_size
from fastbf.precision import compute_dtype
from fastbf.suggestions import suggesting
from fastbf.torch_state import differentiated


@suggesting
def gather(x: Tensor, process_group: Any) -> tuple[Tensor, int]:
    """Gathers all ranks' samples. Gradients are those of the sum of all ranks' losses.

    In a contrastive loss over all ranks' keys each rank takes the loss of its own queries. If each took that of all
    queries, they would count once for each rank. Backward sums a sample's gradients over ranks, so
    DistributedDataParallel's average gives the gradients of one process on the whole batch.

    Args:
        x: (n, …), floating point; n may differ between ranks and be 0, the rest must be the same.
        process_group: a ``torch.distributed`` group; every rank of it calls. None is this process alone.

    Returns:
        (M, …), the samples of rank 0, then those of rank 1, …; and the index of this rank's first sample.

    Raises:
        TypeError: x is not a tensor of fp16, bf16, fp32 or fp64, process_group is not a group.
        ValueError: calls that do not fit each other, on every rank; a group that this process is not in.

    Examples:
        >>> queries, own_keys, group = torch.randn(6, 32), torch.randn(6, 32), None  # None: one process
        >>> keys, first = fastbf.distributed.gather(own_keys, group)
        >>> target = first + torch.arange(6)
        >>> fastbf.functional.linear_cross_entropy(queries, keys, target, scale=1 / 0.2).shape
        torch.Size([])

    Source: docs/distributed.md; the contrastive loss of MoCo v3 (arXiv 2104.02057), section 3.
    """
    checks.floating("x", x)
    checks.min_rank("x", x, 1, "(n, …)")
    name = name_of(process_group)
    if name is None or rank_and_size(name)[1] == 1:
        return x, 0
    batch = meet(name, x.shape[0], Facts("gather", x.dtype, differentiated(x), "torch", 0, 0, x.shape[1:]))
    return gather_batch(x, batch) if batch.total() else confirmed(x, batch), batch.first()


def gather_batch(x: Tensor, batch: Batch, coming: Pending | None = None) -> Tensor:
    """All ranks' samples (M, …) of x (n, …).

    Args:
        x: this rank's samples; one row of zeros if it has none.
        batch: the samples of all ranks, one at least.
        coming: what :func:`begin` returned for x.
    """
    return _Gathered.apply(x.contiguous(), batch, coming)


def confirmed(x: Tensor, batch: Batch) -> Tensor:
    """Holds the meeting of a batch without samples, if it was not held, and returns x."""
    if batch.met:
        return x
    zero = x.new_zeros(())
    _confirm(zero, *batch)
    return x + zero  # the result depends on the operator, so that a compiler keeps it


def begin(x: Tensor, batch: Batch) -> Pending | None:
    """Begins to gather x (n, …); None under a compiler, where operators wait for the other ranks."""
    if torch.compiler.is_compiling():
        return None
    return collectives.gather(x.detach().contiguous(), _empty_for_all(x, batch), batch)


class _Gathered(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch, coming: Pending | None) -> Tensor:
        ctx.batch, ctx.samples = batch, x.shape[0]
        if coming is not None:
            return coming.wait()
        out = _empty_for_all(x, batch)
        _gather(x, out, *batch)
        return out

    @staticmethod
    @once_differentiable("what was gathered from other ranks cannot be differentiated twice")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own = grad.new_empty((ctx.batch.own(), *grad.shape[1:]))
        _scatter_sum(grad.contiguous(), own, *ctx.batch)
        if ctx.batch.own() < ctx.samples:  # this rank has no samples, and x is a row of zeros
            own = grad.new_zeros((ctx.samples, *grad.shape[1:]))
        return own, None, None


def _empty_for_all(x: Tensor, batch: Batch) -> Tensor:
    return torch.empty((batch.total(), *x.shape[1:]), dtype=x.dtype, device=x.device)


@communicating("Tensor(a!) zero")
def _confirm(zero: Tensor, *batch: Any) -> None:
    """Holds the meeting; writes nothing."""
    confirm(Batch(*batch))


@communicating("Tensor x, Tensor(a!) out")
def _gather(x: Tensor, out: Tensor, *batch: Any) -> None:
    """Writes all ranks' samples (M, …)."""
    confirm(Batch(*batch))
    collectives.gather(x, out, Batch(*batch)).wait()


@communicating("Tensor x, Tensor(a!) out")
def _scatter_sum(x: Tensor, out: Tensor, *batch: Any) -> None:
    """Writes this rank's part of the sum over ranks, which is taken in fp32 at least; x is left as it is."""
    total = x.to(compute_dtype(x.dtype), copy=True)
    out.copy_(collectives.scatter_sum(total, Batch(*batch)).wait())
