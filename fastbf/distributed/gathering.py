"""All ranks' samples at one of them, with gradients: what attention across ranks and contrastive losses stand on.

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
from fastbf.torch_state import differentiated


def gather(x: Tensor, process_group: Any) -> tuple[Tensor, int]:
    """All ranks' samples, with the gradient that a sum over the ranks' losses has.

    For a contrastive loss over all ranks' keys::

        keys, first = fastbf.distributed.gather(keys, group)
        loss = linear_cross_entropy(queries, keys, first + torch.arange(n), scale=1 / 0.2)

    Each rank takes the loss of its own queries. Backward sums over ranks what each of them sends a sample's gradient,
    so DistributedDataParallel's average gives the gradients of one process on the whole batch. (Where every rank
    computes the loss of all queries, that sum counts it once for each rank: take the own queries only.)

    Args:
        x: (n, …), floating point; n may differ between ranks and be 0, the rest must be the same.
        process_group: a ``torch.distributed`` group; every one of its ranks calls. None is this process alone.

    Returns:
        (M, …), the samples of rank 0, then those of rank 1, …; and where this rank's begin among them.

    Raises:
        TypeError: x is not a tensor of fp16, bf16, fp32 or fp64, process_group is not a group.
        ValueError: ranks that do not fit each other, on all of them; a group that this process is not in.

    Source: docs/distributed.md; the contrastive loss of MoCo v3 (arXiv 2104.02057), section 3.
    """
    checks.floating("x", x)
    checks.min_rank("x", x, 1, "(n, …)")
    name = name_of(process_group)
    if name is None or rank_and_size(name)[1] == 1:
        return x, 0
    batch = meet(name, x.shape[0], Facts("gather", x.dtype, differentiated(x), "torch", 0, 0, x.shape[1:]))
    return gather_batch(x, batch) if batch.total else confirmed(x, batch), batch.first


def gather_batch(x: Tensor, batch: Batch, coming: Pending | None = None) -> Tensor:
    """All ranks' samples (M, …) of x (n, …).

    Args:
        x: this rank's samples; one row of zeros if it has none.
        batch: whose samples; one at least.
        coming: the same, begun by :func:`begin`.
    """
    return _Gathered.apply(x.contiguous(), batch, coming)


def confirmed(x: Tensor, batch: Batch) -> Tensor:
    """x, of a batch without samples, once the ranks have met about it."""
    if batch.met:
        return x
    zero = x.new_zeros(())
    _confirm(zero, *batch)
    return x + zero  # the result depends on the operator, so that a compiler keeps it


def begin(x: Tensor, batch: Batch) -> Pending | None:
    """Sends x (n, …) on its way; nothing under a compiler, which has operators wait."""
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
        own = grad.new_empty((ctx.batch.own, *grad.shape[1:]))
        _scatter_sum(grad.contiguous(), own, *ctx.batch)
        if ctx.batch.own < ctx.samples:  # this rank has no samples, and x is a row of zeros
            own = grad.new_zeros((ctx.samples, *grad.shape[1:]))
        return own, None, None


def _empty_for_all(x: Tensor, batch: Batch) -> Tensor:
    return torch.empty((batch.total, *x.shape[1:]), dtype=x.dtype, device=x.device)


@communicating("Tensor(a!) zero", "zero")
def _confirm(zero: Tensor, *batch: Any) -> None:
    """Writes nothing."""
    confirm(Batch(*batch))


@communicating("Tensor x, Tensor(a!) out", "out")
def _gather(x: Tensor, out: Tensor, *batch: Any) -> None:
    """Writes all ranks' samples (M, …)."""
    confirm(Batch(*batch))
    collectives.gather(x, out, Batch(*batch)).wait()


@communicating("Tensor x, Tensor(a!) out", "out")
def _scatter_sum(x: Tensor, out: Tensor, *batch: Any) -> None:
    """Writes this rank's part of the sum over ranks, which is taken in fp32 at least; x is left as it is."""
    total = x.to(compute_dtype(x.dtype), copy=True)
    out.copy_(collectives.scatter_sum(total, Batch(*batch)).wait())
