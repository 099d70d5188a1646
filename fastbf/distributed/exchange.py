"""Attention to keys and values that other ranks send in parts, so that no rank holds all of them.

A part is a chunk of samples, and results are merged by their log-sum-exp (Milakov and Gimelshein, arXiv 1805.02867;
across devices: Ring Attention, Liu et al., arXiv 2310.01889). Where ranks have few samples at many positions, a part is
all samples at some positions, which are separate problems. Backward receives the parts again. Memory holds a rank's
queries, its own keys and two parts, and in backward two gradients of parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastbf.distributed import collectives
from fastbf.distributed.collectives import Pending
from fastbf.distributed.process_groups import Batch
from fastbf.precision import compute_dtype


def split_kv(kv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values side by side in (N, L, 2C): two (N, L, H, D) views."""
    k, v = kv.unflatten(-1, (2, num_heads, -1)).unbind(-3)
    return k, v


def forward(part: Callable[..., None], q: Tensor, kv: Tensor, o: Tensor, lse: Tensor | None, batch: Batch) -> None:
    """Writes o and the log-sum-exp, to the base 2, of attention to all ranks' keys.

    Args:
        part: ``part(q, k, v, o=, lse=, origin=)`` writes both for the positions and keys of k and v, which begin at
            ``origin``, (group, query, key).
        q: (N, L, H, D).
        kv: (N, L, 2C), contiguous: this rank's.
        o: (N, L, H, D).
        lse: (L · H, N), fp32, or fp64 where q is; None if ``part`` needs none, with up to 32 keys.
        batch: the samples of all ranks.
    """
    heads = q.shape[-2]
    if lse is None or collectives.by_positions(batch):
        for start, block in collectives.blocks(kv, batch):
            part(q, *split_kv(block, heads), o=o, lse=lse, origin=(start * heads, batch.first(), 0))
            del block  # frees it before another block is begun
        return
    total = None
    for first, chunk in collectives.chunks(kv, batch):
        some = torch.empty(q.shape, dtype=lse.dtype, device=q.device), torch.empty_like(lse)
        part(q, *split_kv(chunk, heads), o=some[0], lse=some[1], origin=(0, batch.first(), first))
        del chunk
        total = some if total is None else _merged(*total, *some)
    assert total is not None  # a batch has samples
    o.copy_(total[0])
    lse.copy_(total[1])


def _merged(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.logaddexp2(lse, other_lse)

    def share(part: Tensor) -> Tensor:  # (L · H, N) → (N, L, H, 1)
        return torch.exp2(part - both).T.view(*o.shape[:3], 1)

    return o.mul_(share(lse)).addcmul_(other_o, share(other_lse)), both


def backward(
    part: Callable[..., None], do: Tensor, q: Tensor, kv: Tensor, o: Tensor, lse: Tensor | None, dq: Tensor,
    d_kv: Tensor, batch: Batch,
) -> None:  # fmt: skip
    """Writes the gradients of q and of this rank's kv; sums over ranks and chunks are taken in fp32, or fp64.

    Args:
        part: ``part(do, q, k, v, o, lse, dq=, dk=, dv=, origin=)`` writes them for the positions and keys of
            k and v.
        do: (N, L, H, D).
        q, kv, o, lse, batch: as in :func:`forward`.
        dq: (N, L, H, D).
        d_kv: (N, L, 2C).
    """
    heads, dtype = q.shape[-2], compute_dtype(q.dtype)

    def gradient(kv_part: Tensor, dq: Tensor, position: int, key: int) -> Tensor:
        """Writes dq, and returns the gradient of keys and values that begin at a position and a key."""
        d_part = torch.empty(kv_part.shape, dtype=dtype, device=q.device)
        (k, v), (dk, dv) = split_kv(kv_part, heads), split_kv(d_part, heads)
        part(do, q, k, v, o, lse, dq=dq, dk=dk, dv=dv, origin=(position * heads, batch.first(), key))
        return d_part

    def of_blocks() -> Iterator[tuple[Tensor, Pending]]:
        for start, block in collectives.blocks(kv, batch):
            stop = start + block.shape[1]
            d_block = gradient(block, dq, start, 0)
            del block
            yield d_kv[:, start:stop], collectives.scatter_sum(d_block, batch)

    def of_chunks() -> Iterator[tuple[int, Pending]]:
        for first, chunk in collectives.chunks(kv, batch):
            dq_part = torch.empty(q.shape, dtype=dtype, device=q.device)
            d_chunk = gradient(chunk, dq_part, 0, first)
            del chunk
            total.add_(dq_part)
            yield first, collectives.sum_chunk(d_chunk, first, batch)

    if collectives.by_positions(batch):
        for out, summed in collectives.one_ahead(of_blocks()):
            take_own(summed, out)
            del summed  # frees it before another gradient is computed
        return
    total = torch.zeros(q.shape, dtype=dtype, device=q.device)
    if batch.own() == 0:
        d_kv.zero_()
    for first, d_chunk in collectives.one_ahead(of_chunks()):
        collectives.take_from_chunk(d_chunk, first, d_kv, batch)
        del d_chunk
    dq.copy_(total)


def take_own(received: Tensor, out: Tensor) -> None:
    """Copies what a rank received. A rank without samples receives nothing: the one row of its ``out`` becomes zero."""
    if len(received):
        out.copy_(received)
    else:
        out.zero_()
