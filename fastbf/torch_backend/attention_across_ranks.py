"""The torch backend's attention to keys and values that other ranks send in parts (``fastbf/distributed/exchange.py``).

The autograd Function holds neither all ranks' keys nor anything of size N × M. Backward draws dropout decisions again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastbf.autograd import once_differentiable
from fastbf.distributed import exchange
from fastbf.distributed.operators import communicating
from fastbf.distributed.process_groups import Batch, confirm
from fastbf.dropout import Dropout
from fastbf.precision import compute_dtype
from fastbf.torch_backend.attention import Call, batched, pieces, scaled_bmm, unbatched
from fastbf.torch_state import no_autocast


class _AcrossRanks(Function):
    """Saves q, this rank's keys and values, the result, its log-sum-exp and the seed."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, seed: Tensor | None, scale: float, dropout_p: float, batch: Batch
    ) -> Tensor:
        lse = torch.empty(q[0, ..., 0].numel(), q.shape[0], dtype=compute_dtype(q.dtype), device=q.device)
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        _torch_attention_across_ranks_forward(q, kv, o, lse, seed, scale, dropout_p, *batch)
        ctx.save_for_backward(q, kv, o, lse, seed)
        ctx.scale, ctx.dropout_p, ctx.batch = scale, dropout_p, batch
        return o

    @staticmethod
    @once_differentiable("attention across ranks cannot be differentiated twice")
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, o, lse, seed = ctx.saved_tensors
        dq, d_kv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, kv))
        with no_autocast(do):
            numbers = seed, ctx.scale, ctx.dropout_p
            _torch_attention_across_ranks_backward(do, q, kv, o, lse, dq, d_kv, *numbers, *ctx.batch)
        return dq, d_kv, None, None, None, None


@communicating(
    "Tensor q, Tensor kv, Tensor(a!) o, Tensor(b!) lse, Tensor? seed, float scale, float dropout_p"
)  # fmt: skip
def _torch_attention_across_ranks_forward(
    q: Tensor, kv: Tensor, o: Tensor, lse: Tensor, seed: Tensor | None, scale: float, dropout_p: float, *of_batch: Any
) -> None:  # fmt: skip
    """Writes o and lse for q (N, L, H, D) and kv (N, L, 2C)."""
    batch = Batch(*of_batch)
    confirm(batch)
    exchange.forward(_Part(seed, scale, dropout_p).forward, q, kv, o, lse, batch)


@communicating(
    "Tensor do, Tensor q, Tensor kv, Tensor o, Tensor lse, Tensor(a!) dq, Tensor(b!) d_kv, Tensor? seed, float scale,"
    " float dropout_p",
)  # fmt: skip
def _torch_attention_across_ranks_backward(
    do: Tensor, q: Tensor, kv: Tensor, o: Tensor, lse: Tensor, dq: Tensor, d_kv: Tensor, *numbers: Any
) -> None:  # fmt: skip
    """Writes dq and the gradient of kv."""
    seed, scale, dropout_p, *of_batch = numbers
    exchange.backward(_Part(seed, scale, dropout_p).backward, do, q, kv, o, lse, dq, d_kv, Batch(*of_batch))


class _Part(NamedTuple):
    """Attention to one part of the keys; ``exchange`` calls its methods."""

    seed: Tensor | None
    scale: float
    dropout_p: float

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, o: Tensor, lse: Tensor, origin: tuple[int, int, int]
    ) -> None:  # fmt: skip
        """Writes o (N, L, H, D) and lse (L · H, N), to the base 2, at the keys' positions."""
        q, o, lse = _at(k, origin, q, o, lse=lse)
        q, k, v = (batched(t, lse.dtype) for t in (q, k, v))
        total, call = torch.empty_like(q), self._call(origin, lse.dtype)
        for group, row in pieces((*q.shape[:2], k.shape[1]), q.device):
            scores = scaled_bmm(q[group, row], k[group].mT, self.scale)
            of_rows = torch.logsumexp(scores, dim=-1)
            lse[group, row] = of_rows / math.log(2)
            words = call.words(scores.shape, q.device, group.start, row.start)
            weights = call.sign(scores.sub_(of_rows[..., None]).exp_(), words, torch.empty_like(scores))
            scaled_bmm(weights.clamp_min_(0), v[group], call.kept_scale(), out=total[group, row])
        o.copy_(unbatched(total, like=o))

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, dq: Tensor, dk: Tensor,
        dv: Tensor, origin: tuple[int, int, int],
    ) -> None:  # fmt: skip
        """Writes this part's gradients, at its keys' positions; o and lse are those of attention to all keys."""
        do, q, o, dq, lse = _at(k, origin, do, q, o, dq, lse=lse)
        do, o, q, k, v = (batched(t, lse.dtype) for t in (do, o, q, k, v))
        gq, gk, gv = (torch.zeros_like(t) for t in (q, k, v))
        delta, call = (do * o).sum(-1, keepdim=True), self._call(origin, lse.dtype)
        for group, row in pieces((*q.shape[:2], k.shape[1]), q.device):
            at = group, row
            weights = scaled_bmm(q[at], k[group].mT, self.scale).sub_(lse[at][..., None] * math.log(2)).exp_()
            words = call.words(weights.shape, q.device, group.start, row.start)
            ds = torch.empty_like(weights)
            weights = call.sign(weights, words, ds)
            gv[group].baddbmm_(torch.clamp_min(weights, 0, out=ds).mT, do[at], alpha=call.kept_scale())
            scaled_bmm(do[at], v[group].mT, call.kept_scale(), out=ds)
            torch.ops.aten.threshold_backward.grad_input(ds, weights, 0, grad_input=ds)
            ds.sub_(delta[at]).mul_(weights.abs_())
            scaled_bmm(ds, k[group], self.scale, out=gq[at])
            gk[group].baddbmm_(ds.mT, q[at], alpha=self.scale)
        for total, out in ((gq, dq), (gk, dk), (gv, dv)):
            out.copy_(unbatched(total, like=out))

    def _call(self, origin: tuple[int, int, int], dtype: torch.dtype) -> Call:
        return Call(self.scale, Dropout(self.dropout_p, self.seed, dtype, origin) if self.dropout_p else None)


def _at(k: Tensor, origin: tuple[int, int, int], *tensors: Tensor, lse: Tensor) -> Iterator[Tensor]:
    """Tensors (N, L, H, D) and lse (L · H, N) at the positions of k (M, l, H, D), which begin at ``origin``."""
    (_, positions, heads, _), first = k.shape, origin[0]
    yield from (t[:, first // heads : first // heads + positions] for t in tensors)
    yield lse[first : first + positions * heads]


def attention(
    q: Tensor, kv: Tensor, scale: float, dropout_p: float, seed: Tensor | None, batch: Batch
) -> Tensor:  # fmt: skip
    """Attention of this rank's queries (N, L, H, D) to all ranks' keys → q's shape; kv (N, L, 2C) is this rank's."""
    with no_autocast(q):
        return _AcrossRanks.apply(q, kv, seed, scale, dropout_p, batch)
