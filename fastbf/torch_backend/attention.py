"""The torch backend's attention along the batch, with dropout.

Backward needs one number a score: the probability, negative if dropout drops it. This takes 4 bytes (8 in fp64), where
PyTorch keeps the probability, the decision and the product of both. ``clamp_min`` gives the probability after dropout,
``abs`` that before, and a threshold at 0 masks a gradient. The number of scores chooses one of three ways:

- *whole*: PyTorch's operators under autograd compute few scores. They keep more but cost the host less.
- *in pieces*: more scores are computed in pieces that fit the cache.
- *drawn again*: backward computes probabilities again that would take too much memory. The seed gives the same
  decisions again.

docs/backends.md has the measurements that set the limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastbf import reference
from fastbf.dropout import Dropout, attention_mask, draw_seed
from fastbf.precision import compute_dtype
from fastbf.torch_state import autocast_dtype, is_batched, no_autocast

#: Scores in a piece. On a GPU a piece bounds memory, and is large enough for a launch to fill the machine.
CPU_PIECE, GPU_PIECE = 1 << 19, 1 << 26
#: Probabilities of up to this many bytes are kept for backward.
KEPT_BYTES = 128 << 20
#: Up to this many scores PyTorch's operators under autograd are quickest.
WHOLE = 1 << 18


def batched(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, …, H, D) → (G, N, D) with G = positions · H, a view where strides and dtype allow one."""
    x = reference.heads_first(x)
    return x.reshape(-1, *x.shape[-2:]).to(dtype)


def unbatched(x: Tensor, like: Tensor) -> Tensor:
    """(G, N, D) → (N, …, H, D), contiguous, the shape and the dtype of ``like``."""
    return x.view(*like.shape[1:-1], *x.shape[1:]).movedim(-2, 0).to(like.dtype).contiguous()


def scaled_bmm(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale · a · b, of (G, M, K) and (G, K, N)."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale, out=out)


class Call(NamedTuple):
    """Scale and dropout of an attention call."""

    scale: float
    dropout: Dropout | None

    def kept_scale(self) -> float:
        return 1.0 if self.dropout is None else self.dropout.scale

    def words(self, shape: Sequence[int], device: torch.device, group: slice, row: slice) -> Tensor | None:
        """The words of a piece of the scores; None without dropout."""
        return None if self.dropout is None else self.dropout.scores(shape, device, group.start, row.start)

    def sign(self, weights: Tensor, words: Tensor | None, room: Tensor) -> Tensor:
        """Makes dropped weights negative, in place; ``room`` is a scratch tensor of their shape."""
        if self.dropout is None or words is None:
            return weights
        return weights.copysign_(room.copy_(words).sub_(self.dropout.limit))

    def weights(self, q: Tensor, k: Tensor, group: slice, row: slice, out: Tensor, room: Tensor) -> Tensor:
        """The signed softmax(scale · q kᵀ) of a piece, written to ``out``; ``room`` is a scratch tensor."""
        words = self.words(out.shape, q.device, group, row)
        scores = scaled_bmm(q, k.mT, self.scale, out=room)
        return self.sign(torch.softmax(scores, dim=-1, out=out), words, room)


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
    """drop(softmax(scale · q kᵀ)) v, and the signed weights if ``keep``.

    q (G, N, D), k and v (G, M, D), contiguous.
    """
    shape, o, scratch = (*q.shape[:2], k.shape[1]), q.new_empty(q.shape), _scratch(2, q, k.shape[1])
    kept = q.new_empty(shape) if keep else None
    for group, row in pieces(shape, q.device):
        q_piece, o_piece = q[group, row], o[group, row]
        room, spare = scratch[:, : q_piece.shape[0], : q_piece.shape[1]]
        weights = call.weights(q_piece, k[group], group, row, spare if kept is None else kept[group, row], room)
        scaled_bmm(torch.clamp_min(weights, 0, out=room), v[group], call.kept_scale(), out=o_piece)
    return o, kept


def backward(
    call: Call, do: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, grads: Sequence[Tensor]
) -> None:  # fmt: skip
    """Writes the gradients of q, k and v; ``do`` is the result's, and :func:`forward` returned ``kept``."""
    (dq, dk, dv), scratch = grads, _scratch(3, q, k.shape[1])
    for group, row in pieces((*q.shape[:2], k.shape[1]), q.device):
        q_piece, do_piece, k_group, dk_group, dv_group = q[group, row], do[group, row], k[group], dk[group], dv[group]
        ds, room, spare = scratch[:, : q_piece.shape[0], : q_piece.shape[1]]
        weights = call.weights(q_piece, k_group, group, row, spare, room) if kept is None else kept[group, row]
        add = float(row.start > 0)  # 1 adds to the sums over earlier rows of the group
        scaled_bmm(do_piece, v[group].mT, call.kept_scale(), out=ds)
        dropped = torch.clamp_min(weights, 0, out=room)
        torch.baddbmm(dv_group, dropped.mT, do_piece, beta=add, alpha=call.kept_scale(), out=dv_group)
        ds.mul_(dropped)
        # Softmax's gradient, p · dp - p · Σ p · dp. Of dropped weights dp is 0.
        ds.addcmul_(torch.abs(weights, out=room), ds.sum(-1, keepdim=True), value=-1)
        scaled_bmm(ds, k_group, call.scale, out=dq[group, row])
        torch.baddbmm(dk_group, ds.mT, q_piece, beta=add, alpha=call.scale, out=dk_group)


class _Attention(Function):
    """Attention with dropout of q (G, N, D) to k and v (G, M, D), or of one tensor (3, G, N, D) that stacks them.

    Saves these and, if ``keep``, the signed weights. Without ``keep`` the dropout must have a seed.
    """

    @staticmethod
    def forward(ctx: Any, scale: float, dropout: Dropout, keep: bool, *qkv: Tensor) -> Tensor:
        q, k, v = (t.to(dropout.dtype) for t in (qkv[0].unbind() if len(qkv) == 1 else qkv))
        ctx.call = Call(scale, dropout)
        with no_autocast(q):
            o, kept = forward(ctx.call, q, k, v, keep)
        ctx.save_for_backward(*qkv, kept)
        return o.to(qkv[0].dtype)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        *qkv, kept = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(do):
            with torch.enable_grad():
                return None, None, None, *_differentiable(ctx, do, qkv, kept)
        with no_autocast(do):
            dtype = ctx.call.dropout.dtype
            qkv = [t.to(dtype) for t in qkv]
            grads = [t.new_empty(t.shape) for t in qkv]
            q, k, v, *each = (*qkv[0].unbind(), *grads[0].unbind()) if len(qkv) == 1 else (*qkv, *grads)
            backward(ctx.call, do.to(dtype).contiguous(), q, k, v, kept, each)
        return None, None, None, *grads


def _differentiable(ctx: Any, do: Tensor, qkv: Sequence[Tensor], kept: Tensor | None) -> Iterator[Tensor | None]:
    """The gradients with a graph of their own, by autograd from the formula."""
    # Views, because one input may be computed from another and only the direct dependence counts.
    qkv = [t.view_as(t) for t in qkv]
    q, k, v = qkv[0].unbind() if len(qkv) == 1 else qkv
    scale, dropout = ctx.call
    if kept is None:
        mask = dropout.as_multiplier(dropout.scores((*q.shape[:2], k.shape[1]), q.device))
    else:
        mask = (kept > 0).to(dropout.dtype).mul_(dropout.scale)
    with no_autocast(do):
        o = (torch.softmax(q * scale @ k.mT, dim=-1) * mask).to(v.dtype) @ v
    needs = ctx.needs_input_grad[3:]
    grads = iter(torch.autograd.grad(o, [t for t, n in zip(qkv, needs, strict=True) if n], do, create_graph=True))
    return (next(grads) if need else None for need in needs)


def _dropped(scale: float, dropout: Dropout, *qkv: Tensor, keep: bool = True) -> Tensor:
    """Attention with dropout of what :class:`_Attention` takes. The number of scores chooses the way."""
    q, k, v = qkv[0].unbind() if len(qkv) == 1 else qkv
    shape, dtype = (*q.shape[:2], k.shape[1]), dropout.dtype
    if math.prod(shape) <= WHOLE and q.dtype == dtype and autocast_dtype(q) is None:
        weights = torch.softmax(torch.bmm(q * scale, k.mT), dim=-1)
        return torch.bmm(weights * dropout.as_multiplier(dropout.scores(shape, q.device)), v)
    keep = keep and math.prod(shape) * dtype.itemsize <= KEPT_BYTES
    if not keep and dropout.keys is None:
        dropout = Dropout(dropout.dropout_p, draw_seed(q.device), dtype)
    return _Attention.apply(scale, dropout, keep and torch.is_grad_enabled(), *qkv)


def self_attention(qkv: Tensor, num_heads: int, dropout: Dropout | None) -> Tensor:
    """Attention from queries, keys and values side by side. (N, …, 3C) → (N, …, C)."""
    if dropout is None or qkv.numel() == 0 or dropout.traced:
        q, k, v = reference.split_qkv(qkv, num_heads)
        return _undropped_or_traced(q, k, v, q.shape[-1] ** -0.5, dropout).flatten(-2)
    n, width = qkv.shape[0], qkv.shape[-1]
    head_dim = width // (3 * num_heads)
    stacked = qkv.view(n, -1, 3, num_heads, head_dim).permute(2, 1, 3, 0, 4).reshape(3, -1, n, head_dim)
    o = _dropped(head_dim**-0.5, dropout, stacked)
    return o.view(-1, num_heads, n, head_dim).permute(2, 0, 1, 3).reshape(*qkv.shape[:-1], width // 3)


def batch_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float, seed: Tensor | None, first_row: int = 0,
    keep: bool = True,
) -> Tensor:  # fmt: skip
    """drop(softmax(scale · q kᵀ)) v. q (N, …, H, D), k and v (M, …, H, D), one dtype → q's shape.

    ``first_row`` is the first query's index in the whole batch. ``keep`` allows probabilities to be kept for backward.
    """
    dropout = Dropout(dropout_p, seed, compute_dtype(q.dtype), (0, first_row, 0)) if dropout_p else None
    if dropout is None or q.numel() == 0 or k.numel() == 0 or dropout.traced:
        return _undropped_or_traced(q, k, v, scale, dropout)
    return unbatched(
        _dropped(scale, dropout, *(batched(t, t.dtype).contiguous() for t in (q, k, v)), keep=keep), like=q
    )


def _undropped_or_traced(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: Dropout | None) -> Tensor:
    """As :func:`batch_attention`. SDPA serves calls without dropout, the formula others, which a compiler fuses."""
    if q.numel() == 0 or k.numel() == 0:
        return reference.attention(q, k, v, scale=scale)
    if dropout is None:
        qb, kb, vb = (reference.heads_first(t).reshape(-1, t.shape[-2], t.shape[0], t.shape[-1]) for t in (q, k, v))
        o = F.scaled_dot_product_attention(qb, kb, vb, scale=scale)
        return o.view(*q.shape[1:-1], q.shape[0], -1).movedim(-2, 0)
    return reference.attention(q, k, v, scale=scale, mask=attention_mask(dropout, q, k.shape[0]).to(q.dtype))
