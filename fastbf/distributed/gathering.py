"""The batch across ranks: samples of several processes attend to each other.

Give a layer or a ``BatchFormer`` a ``process_group`` and its queries attend to the keys and values of all ranks of that
group, by ``torch.distributed``'s own collectives (NCCL on GPUs, gloo on CPUs). Every rank keeps its samples: inputs,
outputs, targets and losses stay local.

Exactness. Outputs are those of one process on the whole batch, ranks' samples in their order. Dropout goes by a
sample's place in the whole batch, so ranks that drew the same seed (the same ``torch.manual_seed``) drop what one
process with that seed would. Gradients are those of the *sum* of the ranks' losses: every rank's keys get their share
of every rank's loss. With a mean loss on batches of one size, averaging parameters' gradients over ranks, as
DistributedDataParallel does, gives those of one process. For batches of different sizes the mean over all samples is
``loss(..., reduction="sum") * world_size / rows_on_all_ranks``.

Sizes. Ranks may have different numbers of samples, and none at all (a batch of zero rows, whose forward and backward
run all the same: others wait for it). Before anything is sent the ranks tell each other, host to host, what they are
about to do; where that differs, every rank raises the same ValueError. A rank that does not come at all is waited for
until the timeout of the group that carries the message: the process group itself if it carries CPU tensors, else a
gloo group, with gloo's own timeout, which is made at the first meeting and for ``dist.group.WORLD`` only.

Memory. Keys and values of the whole batch up to 256 MiB (N · L · 2C numbers, L positions; N = 32,768 at L = 1 and
C = 2048 in 16 bits) are gathered at once and kept for backward, with as many fp32 numbers for their gradient there:
O(N · L · C), never N × N. Larger ones come in parts, one in use and one on its way, and once more in backward: chunks
of as many samples as the largest rank has, rounded up to 128, or, where no rank has 128, all samples at L / W of the
positions. That is O(N · L · C / W).

Under ``torch.compile`` every rank must have as many samples as the others; that the torch backend writes out the scores
of a call it gathers for (N / W × N of them, for the compiler to fuse), is as it is on one rank. Ranks must compile
alike: parts of one graph that communicate independently of each other (a layer and a ``gather`` of something else)
belong in graphs of their own, or a compiler may order them differently.

Traffic. With W ranks, N samples in all, C channels and b bytes a number, at L = 1 (else L times as much), a rank
receives in one layer::

    forward     (W - 1)/W · N · 2C · b      keys and values
    backward    (W - 1)/W · N · 2C · 4      their gradients in fp32, summed by a reduce-scatter
                (W - 1)/W · N · 2C · b      more if keys and values come in parts: again

Computing takes a rank 36 N C²/W + 14 N² C/W FLOPs (L times), the layer forward and backward with F = C (DESIGN section
7). So at R FLOP/s and B bytes/s, in 16 bits, communication takes longer than computing while

    36 C + 14 N < 12 (W - 1) R/B      gathered at once; 16 for 12 in parts

that is for batches up to a certain size. For R = 400 TFLOP/s (half of an H100's measured ceiling), W = 8 and C = 2048
that is N = 1400 over NVLink (taken as 360 GB/s a direction), and N = 59,000 over a 400 Gbit/s network (50 GB/s; in
parts, as that many are 460 MiB). The forward's gather takes 2 (W - 1) R / (C B) times as long as the query's projection
beside it, whatever N: 7.6 and 55 times here, so it is hidden in part only. Computed, not measured.

Not here: classes split over ranks, CUDA graphs (whose replays would not meet), second derivatives, ``torch.func``.

Source: DESIGN section 3, ``process_group``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastbf import checks
from fastbf.autograd import once_differentiable
from fastbf.distributed import collectives
from fastbf.distributed.collectives import Pending
from fastbf.distributed.process_groups import BATCH, Batch, Facts, confirm, meet, name_of, rank_and_size
from fastbf.precision import compute_dtype
from fastbf.registered import COMMUNICATES, operator
from fastbf.torch_state import differentiated

__all__ = ["gather"]


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

    Source: DESIGN section 3, ``process_group``; the contrastive loss of MoCo v3 (arXiv 2104.02057), section 3.
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
        x: this rank's; of a rank without any, one row that stands in for none.
        batch: whose samples; one at least.
        coming: the same, begun by :func:`begin`.
    """
    return _Gathered.apply(x.contiguous(), batch, coming)


def confirmed(x: Tensor, batch: Batch) -> Tensor:
    """x, of a batch without samples, once the ranks have met about it."""
    return x if batch.met else _confirmed(x, *batch)


def begin(x: Tensor, batch: Batch) -> Pending | None:
    """Sends x (n, …) on its way; nothing under a compiler, which has operators wait."""
    if torch.compiler.is_compiling():
        return None
    return collectives.gather(x.detach().contiguous(), _empty_for_all(x, batch.sizes), batch)


class _Gathered(Function):
    @staticmethod
    def forward(ctx, x: Tensor, batch: Batch, coming: Pending | None) -> Tensor:
        ctx.batch, ctx.samples = batch, x.shape[0]
        return _gather(x, *batch) if coming is None else coming.wait()

    @staticmethod
    @once_differentiable("what was gathered from other ranks cannot be differentiated twice")
    def backward(ctx, grad: Tensor):
        own = _scatter_sum(grad.contiguous(), *ctx.batch)
        if ctx.batch.own < ctx.samples:  # the row that stands in for none
            own = grad.new_zeros((ctx.samples, *grad.shape[1:]))
        return own, None, None


def _empty_for_all(x: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.empty((sum(sizes), *x.shape[1:]), dtype=x.dtype, device=x.device)


@operator(f"(Tensor x, {BATCH}) -> Tensor", lambda x, *batch: _empty_for_all(x, Batch(*batch).sizes), COMMUNICATES)
def _gather(x: Tensor, *batch: object) -> Tensor:
    batch = Batch(*batch)
    confirm(batch)
    return collectives.gather(x, _empty_for_all(x, batch.sizes), batch).wait()


@operator(f"(Tensor x, {BATCH}) -> Tensor", lambda x, *_: torch.empty_like(x), COMMUNICATES)
def _confirmed(x: Tensor, *batch: object) -> Tensor:
    """A copy: an operator without a result would be taken out of the graph."""
    confirm(Batch(*batch))
    return x.clone()


def _own_part(x: Tensor, *batch: object) -> Tensor:
    return torch.empty((Batch(*batch).own, *x.shape[1:]), dtype=x.dtype, device=x.device)


@operator(f"(Tensor x, {BATCH}) -> Tensor", _own_part, COMMUNICATES)
def _scatter_sum(x: Tensor, *batch: object) -> Tensor:
    """This rank's part of the sum over ranks, which is taken in fp32 at least; x is left as it is."""
    total = x.to(compute_dtype(x.dtype), copy=True)
    return collectives.scatter_sum(total, Batch(*batch)).wait().to(x.dtype, copy=True)
