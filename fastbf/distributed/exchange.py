"""Attention to keys and values that come from other ranks in parts, so that none holds all of them.

Either chunks of samples come, and results are merged by their log-sum-exp (Milakov and Gimelshein, arXiv 1805.02867;
across devices: Ring Attention, Liu et al., arXiv 2310.01889), or, where ranks have few samples at many positions, all
samples at some of the positions, which are problems of their own. Backward lets them come again. A rank's queries, own
keys and two such parts are all there is in memory, in backward with as many gradients of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastbf.distributed.collectives import Pending, Returned, blocks, by_positions, chunks, scatter_sum
from fastbf.distributed.process_groups import Batch
from fastbf.precision import compute_dtype


def split_kv(kv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values side by side in (N, L, 2C): two (N, L, H, D) views."""
    return kv.unflatten(-1, (2, num_heads, -1)).unbind(-3)


def forward(part: Callable[..., None], q: Tensor, kv: Tensor, o: Tensor, lse: Tensor | None, batch: Batch) -> None:
    """Writes o and the log-sum-exp, to the base 2, of attention to all ranks' keys.

    Args:
        part: ``part(q, k, v, o=, lse=, origin=)`` writes those at the positions, and of the keys, that k and v have,
            which begin at ``origin``, (group, query, key).
        q: (N, L, H, D).
        kv: (N, L, 2C), contiguous: this rank's.
        o: (N, L, H, D).
        lse: (L · H, N), fp32, or fp64 where q is; None where ``part`` needs none, of 32 keys at most.
        batch: where this rank's samples stand.
    """
    heads = q.shape[-2]
    if by_positions(batch):
        for start, block in blocks(kv, batch):
            part(q, *split_kv(block, heads), o=o, lse=lse, origin=(start * heads, batch.first, 0))
            del block  # the next but one is on its way when this is asked for again
        return
    total = None
    for first, chunk in chunks(kv, batch):
        some = torch.empty(q.shape, dtype=lse.dtype, device=q.device), torch.empty_like(lse)
        part(q, *split_kv(chunk, heads), o=some[0], lse=some[1], origin=(0, batch.first, first))
        del chunk
        total = some if total is None else _merged(*total, *some)
    o.copy_(total[0])
    lse.copy_(total[1])


def _merged(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.logaddexp2(lse, other_lse)

    def share(part: Tensor) -> Tensor:  # (L · H, N) → (N, L, H, 1)
        return torch.exp2(part - both).T.unflatten(-1, o.shape[1:3])[..., None]

    return o.mul_(share(lse)).addcmul_(other_o, share(other_lse)), both


def backward(
    part: Callable[..., None], do: Tensor, q: Tensor, kv: Tensor, o: Tensor, lse: Tensor | None, dq: Tensor,
    d_kv: Tensor, batch: Batch,
) -> None:  # fmt: skip
    """Writes the gradients of q and of this rank's kv; sums over ranks and chunks are taken in fp32, or fp64.

    Args:
        part: ``part(do, q, k, v, o, lse, dq=, dk=, dv=, origin=)`` writes those at the positions, and of the keys, that
            k and v have.
        do: (N, L, H, D).
        q, kv, o, lse, batch: as in :func:`forward`.
        dq: (N, L, H, D).
        d_kv: (N, L, 2C).
    """
    heads, dtype = q.shape[-2], compute_dtype(q.dtype)
    if by_positions(batch):
        pending: tuple[Tensor, Pending] | None = None
        for start, block in blocks(kv, batch):
            d_block = torch.empty(block.shape, dtype=dtype, device=q.device)
            (k, v), (dk, dv) = split_kv(block, heads), split_kv(d_block, heads)
            part(do, q, k, v, o, lse, dq=dq, dk=dk, dv=dv, origin=(start * heads, batch.first, 0))
            del block, k, v
            if pending is not None:
                take_own(pending[1].wait(), pending[0])
            pending = d_kv[:, start : start + d_block.shape[1]], scatter_sum(d_block, batch)
        take_own(pending[1].wait(), pending[0])
        return
    total = torch.zeros(q.shape, dtype=dtype, device=q.device)
    if batch.own == 0:
        d_kv.zero_()
    returned = Returned(d_kv, batch)
    for first, chunk in chunks(kv, batch):
        dq_part = torch.empty(q.shape, dtype=dtype, device=q.device)
        d_chunk = torch.empty(chunk.shape, dtype=dtype, device=q.device)
        (k, v), (dk, dv) = split_kv(chunk, heads), split_kv(d_chunk, heads)
        part(do, q, k, v, o, lse, dq=dq_part, dk=dk, dv=dv, origin=(0, batch.first, first))
        del chunk, k, v
        total += dq_part
        returned.send(d_chunk, first)
    dq.copy_(total)
    returned.wait()


def take_own(received: Tensor, out: Tensor) -> None:
    """Copies what came back to this rank; nothing did to a rank whose one row stands in for none."""
    if len(received):
        out.copy_(received)
    else:
        out.zero_()
