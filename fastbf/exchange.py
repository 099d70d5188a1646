"""Attention to keys and values that come from other ranks a chunk at a time, so that none holds all of them.

Results for a chunk of keys are merged by their log-sum-exp (Milakov and Gimelshein, arXiv 1805.02867; across devices:
Ring Attention, Liu et al., arXiv 2310.01889). Backward lets the chunks come again. A rank's queries, own keys and two
chunks are all there is in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastbf.chunks import compute_dtype
from fastbf.collectives import Returned, chunks
from fastbf.process_groups import Batch


def split_kv(kv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values side by side in (N, L, 2C): two (N, L, H, D) views."""
    return kv.unflatten(-1, (2, num_heads, -1)).unbind(-3)


def forward(part: Callable[..., None], q: Tensor, kv: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """o and the log-sum-exp, to the base 2, of attention to all ranks' keys.

    Args:
        part: ``part(q, k, v, o=, lse=, first_row=, first_key=)`` writes those of some keys, o in fp32.
        q: (N, L, H, D).
        kv: (N, L, 2C), contiguous: this rank's.
        batch: where this rank's samples stand.

    Returns:
        o (N, L, H, D) and lse (L · H, N), fp32, or fp64 where q is.
    """
    n, positions, heads, _ = q.shape
    total = None
    for first, chunk in chunks(kv, batch):
        o = torch.empty(q.shape, dtype=compute_dtype(q.dtype), device=q.device)
        lse = torch.empty(positions * heads, n, dtype=o.dtype, device=q.device)
        part(q, *split_kv(chunk, heads), o=o, lse=lse, first_row=batch.first, first_key=first)
        del chunk  # the next but one is on its way when this is asked for again
        total = (o, lse) if total is None else _merged(*total, o, lse)
    return total


def _merged(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.logaddexp2(lse, other_lse)

    def share(part: Tensor) -> Tensor:  # (L · H, N) → (N, L, H, 1)
        return torch.exp2(part - both).T.unflatten(-1, o.shape[1:3])[..., None]

    return o.mul_(share(lse)).addcmul_(other_o, share(other_lse)), both


def backward(
    part: Callable[..., None], do: Tensor, q: Tensor, kv: Tensor, o: Tensor, lse: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """The gradients of q and of this rank's kv.

    Args:
        part: ``part(do, q, k, v, o, lse, dq=, dk=, dv=, first_row=, first_key=)`` writes those of some keys, in fp32.
        do: (N, L, H, D).
        q, kv, batch: as in :func:`forward`; o and lse as it returned them, o in q's dtype.

    Returns:
        (N, L, H, D) and (N, L, 2C), fp32, or fp64 where q is.
    """
    dtype = compute_dtype(q.dtype)
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    d_kv = torch.zeros(kv.shape, dtype=dtype, device=q.device)
    returned = Returned(d_kv, batch)
    for first, chunk in chunks(kv, batch):
        dq_part = torch.empty(q.shape, dtype=dtype, device=q.device)
        d_chunk = torch.empty(chunk.shape, dtype=dtype, device=q.device)
        dk, dv = split_kv(d_chunk, q.shape[-2])
        k, v = split_kv(chunk, q.shape[-2])
        part(do, q, k, v, o, lse, dq=dq_part, dk=dk, dv=dv, first_row=batch.first, first_key=first)
        del chunk, k, v
        dq += dq_part
        returned.send(d_chunk, first)
    returned.wait()
    return dq, d_kv
