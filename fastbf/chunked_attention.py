"""The torch backend's attention with dropout: the formula of reference.py in chunks of query rows.

An autograd Function that keeps nothing of size N × M for backward and draws its dropout decisions again instead of
storing them. Asked for a graph of the gradient (double backward), it differentiates the reference.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import Function

from fastbf import gemm, reference
from fastbf.chunks import chunk_elements, compute_dtype
from fastbf.context import no_autocast
from fastbf.dropout import Dropout, Site, attention_mask

# On CPU, scores of a head from which its products are large enough to be quickest by themselves.
_LONE_GROUP = 1 << 16


def _tiles(groups: int, rows: int, columns: int, elements: int, lone: int) -> Iterator[tuple[slice, slice]]:
    """Cuts (groups, rows, columns) into pieces of up to ``elements``: several whole groups, or rows of one.

    Groups of ``lone`` elements and more are taken one by one. Drawing decisions for a row takes the memory of at least
    16 scores.
    """
    columns = max(columns, 16)
    group_step = 1 if rows * columns >= lone else max(1, elements // (rows * columns))
    row_step = rows if group_step > 1 else min(rows, max(1, elements // columns))
    for g in range(0, groups, group_step):
        for r in range(0, rows, row_step):
            yield slice(g, min(g + group_step, groups)), slice(r, min(r + row_step, rows))


def batched(x: Tensor) -> Tensor:
    """(N, …, H, D) → (G, N, D) with G = positions · H, a view where the strides allow one."""
    x = reference.heads_first(x)
    return x.reshape(-1, *x.shape[-2:])


class _Attention(Function):
    """Saves q, k, v and the seed; nothing of size N × M."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, seed: Tensor, scale: float, p: float, first_row: int
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(q, k, v, seed)
        ctx.scale, ctx.p, ctx.first_row = scale, p, first_row
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        o = batched(out)
        for tile in AttentionTiles(q, k, v, seed, scale, p, (0, first_row, 0)):
            o[tile.group, tile.row] = gemm.bmm(tile.weights().mul_(tile.mask()), tile.v)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            # Aliases: where one input was computed from another, only the direct dependence is wanted here.
            q, k, v = (t.view_as(t) for t in (q, k, v))
            mask = attention_mask(Dropout(ctx.p, seed, compute_dtype(q.dtype)), q, k.shape[0], ctx.first_row)
            out = reference.attention(q, k, v, scale=ctx.scale, mask=mask).to(q.dtype)
            wanted = [t for t, need in zip((q, k, v), needs, strict=True) if need]
            grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
            return *(next(grads) if need else None for need in needs), None, None, None, None

        tiles = AttentionTiles(q, k, v, seed, ctx.scale, ctx.p, (0, ctx.first_row, 0))
        with no_autocast(grad):
            return *_gradients(grad, q, k, v, tiles, ctx.scale, needs), None, None, None, None


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, tiles: AttentionTiles, scale: float, needs: tuple[bool, ...]
) -> Iterator[Tensor | None]:
    """dq, dk and dv, None where not needed."""
    dtype = compute_dtype(q.dtype)
    totals = [torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (q, k, v)]
    g, gq, gk, gv = (batched(t) for t in (grad, *totals))
    for tile in tiles:
        g_tile = g[tile.group, tile.row].to(dtype)
        weights, mask = tile.weights(), tile.mask()
        if needs[0] or needs[1]:
            d_weights = gemm.bmm(g_tile, tile.v.mT).mul_(mask)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, dtype)
            if needs[0]:
                gq[tile.group, tile.row] = gemm.bmm(d_scores, tile.k).mul_(scale)
            if needs[1]:
                gk[tile.group].add_(gemm.bmm(d_scores.mT, tile.q), alpha=scale)
        if needs[2]:
            gv[tile.group].add_(gemm.bmm(mask.mul_(weights).mT, g_tile))
    return (d.to(q.dtype) if need else None for d, need in zip(totals, needs, strict=True))


class AttentionTiles:
    """Walks the score matrix of one attention call piece by piece."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, scale: float, p: float, origin: tuple[int, int, int]
    ) -> None:  # fmt: skip
        """``origin`` is where groups, rows and keys begin in the call that dropout knows."""
        self.all_q, self.all_k, self.all_v = batched(q), batched(k), batched(v)
        self.scale, self.dtype = scale, compute_dtype(q.dtype)
        self.dropout = None if p == 0 else Dropout(p, seed, self.dtype)
        self.origin = origin

    def __iter__(self) -> Iterator[AttentionTiles]:
        groups, rows, _ = self.all_q.shape
        columns = self.all_k.shape[1]
        elements = chunk_elements(self.all_q.device, self.dtype)
        lone = _LONE_GROUP if self.all_q.device.type == "cpu" else elements
        for group, row in _tiles(groups, rows, columns, elements, lone):
            self.group, self.row = group, row
            self.q = self.all_q[group, row].to(self.dtype)
            if row.start == 0:
                self.k, self.v = (t[group].to(self.dtype).contiguous() for t in (self.all_k, self.all_v))
            yield self

    def scores(self) -> Tensor:
        """scale · q kᵀ of this piece: (groups, rows, M)."""
        return gemm.bmm(self.q * self.scale, self.k.mT)

    def weights(self) -> Tensor:
        """softmax(scale · q kᵀ) of this piece: (groups, rows, M)."""
        return torch.softmax(self.scores(), dim=-1)

    def mask(self) -> Tensor:
        device, (first_group, first_row, first_key) = self.q.device, self.origin
        group = torch.arange(self.group.start, self.group.stop, device=device)[:, None] + first_group
        row = torch.arange(self.row.start, self.row.stop, device=device) + first_row
        return self.dropout.multiplier(Site.ATTENTION, group, row, self.k.shape[1], first_key)

    def dropped(self, weights: Tensor) -> Tensor:
        """Weights, or their gradient, after dropout, in place."""
        return weights if self.dropout is None else weights.mul_(self.mask())


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, p: float, seed: Tensor, first_row: int = 0
) -> Tensor:  # fmt: skip
    """drop(softmax(scale · q kᵀ)) v in chunks. q (N, …, H, D), k and v (M, …, H, D), one dtype → q's shape.

    ``first_row`` is where the queries begin in the batch that dropout knows.
    """
    with no_autocast(q):
        return _Attention.apply(q, k, v, seed, scale, p, first_row)
