"""Collectives that gather samples, at once or in parts, and that sum their gradients over ranks.

Tensors are contiguous and hold samples along their first dimension: n of one rank, M of all ranks. A rank without
samples has tensors of one row of zeros, and sends nothing. Of a silent batch nothing is sent, and what would be
received has any values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastbf.distributed.process_groups import Batch, all_gather, peers, reduce_scatter

#: Keys and values of the whole batch up to this size are gathered at once. Larger ones come in parts.
GATHER_BYTES = 256 << 20
#: Chunks begin at multiples of this many samples, as dropout's decisions require (``kernels/rng.py``).
ALIGNMENT = 128

Place = TypeVar("Place")


class Pending:
    """A tensor that a collective is still writing."""

    def __init__(self, result: Tensor, works: list[dist.Work], *held: Tensor) -> None:
        """held: tensors that must live while the collective reads them."""
        self.result: Tensor = result
        self.works: list[dist.Work] = works
        self.held: tuple[Tensor, ...] = held

    def wait(self) -> Tensor:
        """The tensor; on a GPU the current stream waits, not the host."""
        for work in self.works:
            work.wait()
        self.works, self.held = [], ()
        return self.result


def gathers(batch: Batch, sample_bytes: int) -> bool:
    """Whether the samples of all ranks, of ``sample_bytes`` each, are gathered at once."""
    return batch.total() * sample_bytes <= GATHER_BYTES


def gather(x: Tensor, out: Tensor, batch: Batch) -> Pending:
    """Begins to gather all ranks' samples, in the order of ranks.

    Args:
        x: (n, …).
        out: (M, …) to write to.
    """
    if not batch.group:
        return Pending(out, [])
    group, own = peers(batch.group).group, x[: batch.own()]
    if _even(batch):
        return Pending(out, [all_gather(out, own, group)], own)
    parts = torch.split(out, list(batch.sizes))
    parts[batch.rank].copy_(own)
    return Pending(out, [_broadcast(part, rank, group) for rank, part in enumerate(parts) if len(part)])


def scatter_sum(x: Tensor, batch: Batch) -> Pending:
    """Begins to sum x (M, …) over ranks, and gives this rank's samples (n, …). x may be overwritten."""
    if not batch.group:
        return Pending(x[: batch.own()], [])
    group = peers(batch.group).group
    if _even(batch):
        out = torch.empty((batch.own(), *x.shape[1:]), dtype=x.dtype, device=x.device)
        return Pending(out, [reduce_scatter(out, x, group)], x)
    parts = torch.split(x, list(batch.sizes))
    works = [_reduce(part, rank, group) for rank, part in enumerate(parts) if len(part)]
    return Pending(parts[batch.rank], works, x)


def _even(batch: Batch) -> bool:
    return all(size == batch.own() for size in batch.sizes)


def _broadcast(x: Tensor, rank: int, group: dist.ProcessGroup) -> dist.Work:
    return dist.broadcast(x, group=group, group_src=rank, async_op=True)


def _reduce(x: Tensor, rank: int, group: dist.ProcessGroup) -> dist.Work:
    return dist.reduce(x, group=group, group_dst=rank, async_op=True)


def one_ahead(coming: Iterator[tuple[Place, Pending]]) -> Iterator[tuple[Place, Tensor]]:
    """Begins each tensor before it waits for the one before; there are never more than two."""
    ready = next(coming, None)
    while ready is not None:
        place, pending = ready
        ready = next(coming, None)
        tensor = pending.wait()
        del pending
        yield place, tensor
        del tensor


def by_positions(batch: Batch) -> bool:
    """Whether parts are all samples at some positions, not chunks of samples: if no rank has 128 samples."""
    return max(batch.sizes) < ALIGNMENT


def blocks(x: Tensor, batch: Batch) -> Iterator[tuple[int, Tensor]]:
    """All ranks' samples x (n, L, W) in blocks of positions: the first position, and (M, l, W).

    A block is about as large as x: l is L over the number of ranks. The next one is sent while one is used.
    """
    parts = torch.split(x, -(-x.shape[1] // len(batch.sizes)), dim=1)
    starts = range(0, x.shape[1], parts[0].shape[1])

    def begun(part: Tensor) -> Pending:
        out = torch.empty((batch.total(), *part.shape[1:]), dtype=x.dtype, device=x.device)
        return gather(part.contiguous(), out, batch)

    yield from one_ahead((start, begun(part)) for start, part in zip(starts, parts, strict=True))


def chunk_rows(batch: Batch) -> int:
    """Samples in a chunk: as many as the largest rank has, rounded up to a multiple of 128."""
    return -(-max(batch.sizes) // ALIGNMENT) * ALIGNMENT


def chunks(x: Tensor, batch: Batch) -> Iterator[tuple[int, Tensor]]:
    """All ranks' samples x (n, …) in chunks: the first sample's index in the whole batch, and (m, …).

    The next one is sent while one is used.
    """
    starts = range(0, batch.total(), chunk_rows(batch))
    yield from one_ahead((start, _chunk(x, start, batch)) for start in starts)


def _chunk(x: Tensor, start: int, batch: Batch) -> Pending:
    stop = min(start + chunk_rows(batch), batch.total())
    out = torch.empty((stop - start, *x.shape[1:]), dtype=x.dtype, device=x.device)
    works = []
    for rank, part, samples in _owners(out, start, batch):
        if rank == batch.rank:
            part.copy_(x[samples])
        if batch.group:
            works.append(_broadcast(part, rank, peers(batch.group).group))
    return Pending(out, works)


def sum_chunk(x: Tensor, start: int, batch: Batch) -> Pending:
    """Begins to sum a chunk x (m, …), which begins at ``start``, over ranks. Each rank gets the sum of its samples."""
    if not batch.group:
        return Pending(x, [])
    return Pending(x, [_reduce(part, rank, peers(batch.group).group) for rank, part, _ in _owners(x, start, batch)])


def take_from_chunk(x: Tensor, start: int, out: Tensor, batch: Batch) -> None:
    """Copies this rank's samples in the chunk x that begins at ``start`` to their places in ``out`` (n, …)."""
    for rank, part, samples in _owners(x, start, batch):
        if rank == batch.rank:
            out[samples].copy_(part)


def _owners(x: Tensor, start: int, batch: Batch) -> Iterator[tuple[int, Tensor, slice]]:
    """(rank, its part of x, where that lies in its own samples) of every rank with samples in the chunk x."""
    first = 0
    for rank, size in enumerate(batch.sizes):
        begin, end = max(start, first), min(start + len(x), first + size)
        if begin < end:
            yield rank, x[begin - start : end - start], slice(begin - first, end - first)
        first += size
