"""The torch backend's attention along the batch, with dropout.

Backward needs one number a score: the probability, negative if dropout drops it. This takes 4 bytes (8 in fp64), where
PyTorch keeps the probability, the decision and the product of both. ``clamp_min`` gives the probability after dropout,
``abs`` that before, and 0 is the gradient of what is dropped.

Many scores are computed in pieces that fit the cache. Probabilities that would take too much memory are not kept:
backward computes them again, and the seed gives the same decisions again. docs/backends.md has the measurements that
set both limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastbf import reference
from fastbf.autograd import applying
from fastbf.dropout import Dropout, attention_mask, draw_seed
from fastbf.precision import compute_dtype
from fastbf.torch_state import is_batched, no_autocast

#: Scores in a piece. On a GPU a piece bounds memory, and is large enough for a launch to fill the machine.
CPU_PIECE, GPU_PIECE = 1 << 19, 1 << 26
#: Probabilities of up to this many bytes are kept for backward.
KEPT_BYTES = 128 << 20


def batched(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, …, H, D) → (G, N, D) with G = positions · H, a view where strides and dtype allow one."""
    x = reference.heads_first(x)
    return x.reshape(-1, *x.shape[-2:]).to(dtype)


def unbatched(x: Tensor, like: Tensor) -> Tensor:
    """(G, N, D) → (N, …, H, D), contiguous, the shape and the dtype of ``like``."""
    return x.view(*like.shape[1:-1], *x.shape[1:]).movedim(-2, 0).to(like.dtype).contiguous()


def stacked(rows: Tensor, n: int, parts: int, num_heads: int) -> Tensor:
    """(N · L, parts · C) → (parts, G, N, D), a view if L is 1."""
    head_dim = rows.shape[1] // (parts * num_heads)
    return rows.view(n, -1, parts, num_heads, head_dim).permute(2, 1, 3, 0, 4).reshape(parts, -1, n, head_dim)


def side_by_side(x: Tensor, num_heads: int) -> Tensor:
    """The inverse of :func:`stacked`."""
    parts, _, n, head_dim = x.shape
    x = x.view(parts, -1, num_heads, n, head_dim).permute(3, 1, 0, 2, 4)
    return x.reshape(-1, parts * num_heads * head_dim)


def scaled_bmm(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale · a · b, of (G, M, K) and (G, K, N)."""
    return torch.baddbmm(a.new_empty(()) if out is None else out, a, b, beta=0, alpha=scale, out=out)


class Call(NamedTuple):
    """Scale and dropout of an attention call."""

    scale: float
    dropout: Dropout | None

    def kept_scale(self) -> float:
        return 1.0 if self.dropout is None else self.dropout.scale

    def words(self, shape: Sequence[int], device: torch.device, group: int, row: int) -> Tensor | None:
        """The words of a piece of the scores that begins at a group and a row; None without dropout."""
        return None if self.dropout is None else self.dropout.scores(shape, device, group, row)

    def sign(self, weights: Tensor, words: Tensor | None, room: Tensor) -> Tensor:
        """Makes dropped weights negative, in place; ``room`` is a scratch tensor of their shape."""
        if self.dropout is None or words is None:
            return weights
        return weights.copysign_(room.copy_(words).sub_(self.dropout.limit))

    def weights(self, q: Tensor, k: Tensor, at: tuple[int, int], out: Tensor, room: Tensor) -> Tensor:
        """Writes the signed softmax(scale · q kᵀ) of a piece at a group and a row; ``room`` is a scratch tensor."""
        words = self.words(out.shape, q.device, *at)
        scores = scaled_bmm(q, k.mT, self.scale, out=room)
        return self.sign(torch.softmax(scores, dim=-1, out=out), words, room)

    def mask(self, shape: Sequence[int], kept: Tensor | None, device: torch.device) -> Tensor | None:
        """The multiplier (G, N, M) of a call of which forward kept this."""
        if self.dropout is None:
            return None
        if kept is None:
            return self.dropout.as_multiplier(self.dropout.scores(shape, device))
        return (kept > 0).to(kept.dtype).mul_(self.dropout.scale)


def settled(dropout: Dropout | None, q: Tensor, k: Tensor, keep: bool = True) -> tuple[Dropout | None, bool]:
    """Whether the weights of q (G, N, D) and k (G, M, D) may be kept for backward. If not, the dropout has a seed."""
    keep = keep and q.shape[0] * q.shape[1] * k.shape[1] * compute_dtype(q.dtype).itemsize <= KEPT_BYTES
    if not keep and dropout is not None and dropout.seed is None:
        dropout = Dropout(dropout.dropout_p, draw_seed(q.device), dropout.dtype)
    return dropout, keep


def cut(shape: Sequence[int], device: torch.device) -> tuple[int, int]:
    """Groups and rows in a piece of scores (G, N, M): several whole groups, or rows of one."""
    (groups, rows, columns), size = shape, CPU_PIECE if device.type == "cpu" else GPU_PIECE
    return min(groups, max(1, size // (rows * columns))), min(rows, max(1, 2 * size // columns))


def pieces(shape: Sequence[int], device: torch.device) -> Iterator[tuple[slice, slice]]:
    """The groups and rows of each piece."""
    group_step, row_step = cut(shape, device)
    for g in range(0, shape[0], group_step):
        for r in range(0, shape[1], row_step):
            yield slice(g, min(g + group_step, shape[0])), slice(r, min(r + row_step, shape[1]))


def _scratch(count: int, x: Tensor, columns: int) -> Tensor:
    """``count`` scratch tensors for all pieces. To allocate them for each would cost as much as to compute it."""
    return x.new_empty(count, *cut((*x.shape[:2], columns), x.device), columns)


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
    """drop(softmax(scale · q kᵀ)) v, and the signed weights if ``keep``. q (G, N, D), k and v (G, M, D)."""
    shape, o = (*q.shape[:2], k.shape[1]), q.new_empty(q.shape)
    kept = q.new_empty(shape) if keep else None
    if kept is not None and cut(shape, q.device) == shape[:2]:  # one piece
        _forward(call, q, k, v, (0, 0), kept, q.new_empty(shape), o)
        return o, kept
    scratch = _scratch(1 if keep else 2, q, k.shape[1])
    for group, row in pieces(shape, q.device):
        q_piece, at = q[group, row], (group.start, row.start)
        room, *spare = scratch[:, : q_piece.shape[0], : q_piece.shape[1]]
        weights = spare[0] if kept is None else kept[group, row]
        _forward(call, q_piece, k[group], v[group], at, weights, room, o[group, row])
    return o, kept


def _forward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, at: tuple[int, int], weights: Tensor, room: Tensor, o: Tensor
) -> None:  # fmt: skip
    """Writes weights and o of a piece of the queries; k and v are those of its groups."""
    call.weights(q, k, at, weights, room)
    scaled_bmm(torch.clamp_min(weights, 0, out=room), v, call.kept_scale(), out=o)


def backward(
    call: Call, do: Tensor, qkv: Sequence[Tensor], kept: Tensor | None, grads: Sequence[Tensor | None]
) -> None:  # fmt: skip
    """Writes the gradients of q, k and v, None for one that is not wanted.

    ``do`` is the result's, and :func:`forward` returned ``kept``.
    """
    q, k, v = qkv
    shape = *q.shape[:2], k.shape[1]
    if kept is not None and cut(shape, q.device) == shape[:2]:  # one piece
        _backward(call, do, qkv, kept, (q.new_empty(shape), q.new_empty(shape)), grads, 0.0)
        return
    scratch = _scratch(3 if kept is None else 2, q, k.shape[1])
    for group, row in pieces(shape, q.device):
        q_piece, k_group, v_group = q[group, row], k[group], v[group]
        rooms = scratch[:, : q_piece.shape[0], : q_piece.shape[1]]
        if kept is None:
            weights = call.weights(q_piece, k_group, (group.start, row.start), rooms[2], rooms[0])
        else:
            weights = kept[group, row]
        places = (group, row), (group,), (group,)
        of_piece = [None if t is None else t[at] for t, at in zip(grads, places, strict=True)]
        add = float(row.start > 0)  # 1 adds to the sums over earlier rows of the group
        _backward(call, do[group, row], (q_piece, k_group, v_group), weights, (rooms[0], rooms[1]), of_piece, add)


def _backward(
    call: Call, do: Tensor, qkv: Sequence[Tensor], weights: Tensor, rooms: Sequence[Tensor],
    grads: Sequence[Tensor | None], add: float,
) -> None:  # fmt: skip
    """Writes the gradients of a piece's queries, and adds ``add`` times what is there to those of keys and values."""
    (q, k, v), (dq, dk, dv), (ds, room) = qkv, grads, rooms
    dropped = torch.clamp_min(weights, 0, out=room)
    if dv is not None:
        torch.baddbmm(dv, dropped.mT, do, beta=add, alpha=call.kept_scale(), out=dv)
    if dq is None and dk is None:
        return
    scaled_bmm(do, v.mT, call.kept_scale(), out=ds).mul_(dropped)
    # Softmax's gradient, p · dp - p · Σ p · dp. Of dropped weights dp is 0.
    ds.addcmul_(torch.abs(weights, out=room), ds.sum(-1, keepdim=True), value=-1)
    if dq is not None:
        scaled_bmm(ds, k, call.scale, out=dq)
    if dk is not None:
        torch.baddbmm(dk, ds.mT, q, beta=add, alpha=call.scale, out=dk)


class _Attention(Function):
    """Attention of q (G, N, D) to k and v (G, M, D), with dropout. Saves these and, if ``keep``, the signed weights."""

    @staticmethod
    def forward(ctx: Any, call: Call, keep: bool, *qkv: Tensor) -> Tensor:
        with no_autocast(qkv[0]):
            q, k, v = (t.to(compute_dtype(t.dtype)) for t in qkv)
            o, kept = forward(call, q, k, v, keep)
        ctx.save_for_backward(*qkv, kept)
        ctx.call = call
        return o.to(qkv[0].dtype)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        *qkv, kept = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(do):
            with torch.enable_grad():
                return None, None, *_differentiable(ctx, do, qkv, kept)
        with no_autocast(do):
            inputs = [t.to(compute_dtype(t.dtype)) for t in qkv]
            grads = [t.new_empty(t.shape) if n else None for t, n in zip(inputs, ctx.needs_input_grad[2:], strict=True)]
            backward(ctx.call, do.to(inputs[0].dtype).contiguous(), inputs, kept, grads)
        return None, None, *grads


def _differentiable(ctx: Any, do: Tensor, qkv: Sequence[Tensor], kept: Tensor | None) -> Iterator[Tensor | None]:
    """The gradients with a graph of their own, by autograd from the formula."""
    # Views, because one input may be computed from another and only the direct dependence counts.
    q, k, v = qkv = [t.view_as(t) for t in qkv]
    mask = ctx.call.mask((*q.shape[:2], k.shape[1]), kept, q.device)
    with no_autocast(do):
        o = (torch.softmax(q * ctx.call.scale @ k.mT, dim=-1) * mask).to(v.dtype) @ v
    needs = ctx.needs_input_grad[2:]
    grads = iter(torch.autograd.grad(o, [t for t, n in zip(qkv, needs, strict=True) if n], do, create_graph=True))
    return (next(grads) if need else None for need in needs)


def batch_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float, seed: Tensor | None, first_row: int = 0,
    keep: bool = True,
) -> Tensor:  # fmt: skip
    """drop(softmax(scale · q kᵀ)) v. q (N, …, H, D), k and v (M, …, H, D), one dtype → q's shape.

    ``first_row`` is the first query's index in the whole batch. ``keep`` allows probabilities to be kept for backward.
    """
    dropout = Dropout(dropout_p, seed, compute_dtype(q.dtype), (0, first_row, 0)) if dropout_p else None
    if dropout is None or q.numel() == 0 or k.numel() == 0 or dropout.traced:
        return by_torch(q, k, v, scale, dropout)
    flat = [batched(t, t.dtype).contiguous() for t in (q, k, v)]
    dropout, keep = settled(dropout, flat[0], flat[1], keep)
    return unbatched(
        applying(_Attention, flat[0])(Call(scale, dropout), keep and torch.is_grad_enabled(), *flat), like=q
    )


def by_torch(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: Dropout | None) -> Tensor:
    """As :func:`batch_attention`. SDPA serves calls without dropout, the formula others, which a compiler fuses."""
    if q.numel() == 0 or k.numel() == 0:
        return reference.attention(q, k, v, scale=scale)
    if dropout is None:
        qb, kb, vb = (reference.heads_first(t).reshape(-1, t.shape[-2], t.shape[0], t.shape[-1]) for t in (q, k, v))
        o = F.scaled_dot_product_attention(qb, kb, vb, scale=scale)
        return o.view(*q.shape[1:-1], q.shape[0], -1).movedim(-2, 0)
    return reference.attention(q, k, v, scale=scale, mask=attention_mask(dropout, q, k.shape[0]))
