"""The torch backend's attention along the batch, with dropout.

Backward needs one number a score: the probability, negative if dropout drops it. This takes 4 bytes (8 in fp64), where
PyTorch keeps the probability, the decision and the product of both. ``clamp_min`` gives the probability after dropout,
``abs`` that before, and 0 is the gradient of what is dropped.

Many scores are computed in pieces that fit the cache. Probabilities that would take too much memory are not kept:
backward computes them again. Decisions are kept as bits then, or drawn again from a seed that the caller gave.
docs/backends.md has the measurements that set both limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastbf import reference
from fastbf.autograd import applying
from fastbf.dropout import Dropout, attention_mask
from fastbf.precision import compute_dtype
from fastbf.torch_backend import bits
from fastbf.torch_state import differentiated, is_batched, no_autocast, traced

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


class Words(NamedTuple):
    """Decisions of a piece of the scores: values that exceed the limit are kept."""

    values: Tensor
    limit: float


class Call(NamedTuple):
    """Scale and dropout of an attention call."""

    scale: float
    dropout: Dropout | None

    def kept_scale(self) -> float:
        return 1.0 if self.dropout is None else self.dropout.scale

    def words(self, shape: Sequence[int], device: torch.device, group: int, row: int) -> Words | None:
        """The decisions of a piece that begins at a group and a row; None without dropout."""
        if self.dropout is None:
            return None
        return Words(self.dropout.scores(shape, device, group, row), self.dropout.limit)

    def sign(self, weights: Tensor, words: Words | None, room: Tensor) -> Tensor:
        """Makes dropped weights negative, in place; ``room`` is a scratch tensor of their shape."""
        if words is None:
            return weights
        room.copy_(words.values)
        # A whole number has the sign of what exceeds -1/2 or not.
        return weights.copysign_(room if words.limit == -0.5 else room.sub_(words.limit))

    def weights(self, q: Tensor, k: Tensor, words: Words | None, out: Tensor, room: Tensor) -> Tensor:
        """Writes the signed softmax(scale · q kᵀ) of a piece; ``room`` is a scratch tensor."""
        scores = scaled_bmm(q, k.mT, self.scale, out=room)
        return self.sign(torch.softmax(scores, dim=-1, out=out), words, room)

    def again(self, shape: Sequence[int], device: torch.device, kept: Tensor | None) -> Iterator[Words | None]:
        """The decisions of each piece of all scores, of which :func:`forward` kept these bits or nothing."""
        for group, row in pieces(shape, device):
            piece = (group.stop - group.start, row.stop - row.start, shape[2])
            if kept is None:
                yield self.words(piece, device, group.start, row.start)
                continue
            of_piece, kept = kept.tensor_split([bits.size(math.prod(piece))])
            yield Words(bits.unpack(of_piece, piece), 0.5)

    def mask(self, shape: Sequence[int], kept: Tensor | None, device: torch.device) -> Tensor | None:
        """The multiplier (G, N, M) of a call of which forward kept this."""
        if self.dropout is None:
            return None
        if kept is not None and kept.is_floating_point():
            return (kept > 0).to(kept.dtype).mul_(self.dropout.scale)
        mask = torch.empty(shape, dtype=self.dropout.dtype, device=device)
        for at, words in zip(pieces(shape, device), self.again(shape, device, kept), strict=True):
            assert words is not None
            mask[at] = (words.values > words.limit).to(mask.dtype).mul_(self.dropout.scale)
        return mask


class Keep(Enum):
    """What forward keeps for backward: nothing, decisions as bits, or signed weights."""

    NOTHING = 0
    DECISIONS = 1
    WEIGHTS = 2


def keeps(dropout: Dropout | None, allowed: bool, *qkv: Tensor) -> Keep:
    """What to keep of these, or of one tensor that stacks them; ``allowed`` is whether weights may be kept."""
    q, k, _ = _each(qkv)
    if not differentiated(*qkv):
        return Keep.NOTHING
    if allowed and q.shape[0] * q.shape[1] * k.shape[1] * compute_dtype(q.dtype).itemsize <= KEPT_BYTES:
        return Keep.WEIGHTS
    return Keep.DECISIONS if dropout is not None and dropout.seed is None else Keep.NOTHING


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


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, keep: Keep) -> tuple[Tensor, Tensor | None]:
    """drop(softmax(scale · q kᵀ)) v, and what is kept. q (G, N, D), k and v (G, M, D)."""
    shape, o, decisions = (*q.shape[:2], k.shape[1]), q.new_empty(q.shape), []
    kept = q.new_empty(shape) if keep is Keep.WEIGHTS else None
    scratch = _scratch(2 if kept is None else 1, q, k.shape[1])
    for group, row in pieces(shape, q.device):
        q_piece, o_piece = q[group, row], o[group, row]
        room, *spare = scratch[:, : q_piece.shape[0], : q_piece.shape[1]]
        weights = spare[0] if kept is None else kept[group, row]
        call.weights(q_piece, k[group], call.words(room.shape, q.device, group.start, row.start), weights, room)
        scaled_bmm(torch.clamp_min(weights, 0, out=room), v[group], call.kept_scale(), out=o_piece)
        if keep is Keep.DECISIONS:
            decisions.append(bits.pack(weights > 0))
    return o, torch.cat(decisions) if decisions else kept


def backward(
    call: Call, do: Tensor, qkv: Sequence[Tensor], kept: Tensor | None, grads: Sequence[Tensor | None]
) -> None:  # fmt: skip
    """Writes the gradients of q, k and v, None for one that is not wanted.

    ``do`` is the result's, and :func:`forward` returned ``kept``.
    """
    (q, k, v), (dq, dk, dv), shape = qkv, grads, (*qkv[0].shape[:2], qkv[1].shape[1])
    signed = kept if kept is not None and kept.is_floating_point() else None
    scratch = _scratch(3 if signed is None else 2, q, k.shape[1])
    again = repeat(None) if signed is not None else call.again(shape, q.device, kept)
    for (group, row), words in zip(pieces(shape, q.device), again, strict=False):
        at, q_piece, do_piece, k_group = (group, row), q[group, row], do[group, row], k[group]
        ds, room, *spare = scratch[:, : q_piece.shape[0], : q_piece.shape[1]]
        weights = call.weights(q_piece, k_group, words, spare[0], room) if signed is None else signed[at]
        add = float(row.start > 0)  # 1 adds to the sums over earlier rows of the group
        dropped = torch.clamp_min(weights, 0, out=room)
        if dv is not None:
            torch.baddbmm(dv[group], dropped.mT, do_piece, beta=add, alpha=call.kept_scale(), out=dv[group])
        if dq is None and dk is None:
            continue
        scaled_bmm(do_piece, v[group].mT, call.kept_scale(), out=ds).mul_(dropped)
        # Softmax's gradient, p · dp - p · Σ p · dp. Of dropped weights dp is 0.
        ds.addcmul_(torch.abs(weights, out=room), ds.sum(-1, keepdim=True), value=-1)
        if dq is not None:
            scaled_bmm(ds, k_group, call.scale, out=dq[at])
        if dk is not None:
            torch.baddbmm(dk[group], ds.mT, q_piece, beta=add, alpha=call.scale, out=dk[group])


class _Attention(Function):
    """Attention of q (G, N, D) to k and v (G, M, D), or of one tensor (3, G, N, D) that stacks them.

    Saves these and what is to be kept.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, keep: Keep, *qkv: Tensor) -> Tensor:
        with no_autocast(qkv[0]):
            q, k, v = _each([t.to(compute_dtype(t.dtype)) for t in qkv])
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
            backward(ctx.call, do.to(inputs[0].dtype), _each(inputs), kept, _each(grads))
        return None, None, *grads


def _each(qkv: Sequence[Any]) -> Sequence[Any]:
    """Queries, keys and values, given these or what stacks them."""
    return qkv[0].unbind() if len(qkv) == 1 else qkv


def _differentiable(ctx: Any, do: Tensor, qkv: Sequence[Tensor], kept: Tensor | None) -> Iterator[Tensor | None]:
    """The gradients with a graph of their own, by autograd from the formula."""
    # Views, because one input may be computed from another and only the direct dependence counts.
    qkv = [t.view_as(t) for t in qkv]
    q, k, v = _each(qkv)
    mask = ctx.call.mask((*q.shape[:2], k.shape[1]), kept, q.device)
    with no_autocast(do):
        weights = torch.softmax(q * ctx.call.scale @ k.mT, dim=-1)
        o = (weights if mask is None else weights * mask).to(v.dtype) @ v
    needs = ctx.needs_input_grad[2:]
    grads = iter(torch.autograd.grad(o, [t for t, n in zip(qkv, needs, strict=True) if n], do, create_graph=True))
    return (next(grads) if need else None for need in needs)


def _attention(scale: float, dropout: Dropout | None, allowed: bool, *qkv: Tensor) -> Tensor:
    """Attention of what :class:`_Attention` takes. ``allowed`` is whether weights may be kept."""
    return applying(_Attention, qkv[0])(Call(scale, dropout), keeps(dropout, allowed, *qkv), *qkv)


def self_attention(qkv: Tensor, shape: torch.Size, num_heads: int, dropout: Dropout | None) -> Tensor:
    """Attention from queries, keys and values side by side, (R, 3C) → (R, C), of a tensor of ``shape`` (N, …, C)."""
    head_dim = shape[-1] // num_heads
    if qkv.numel() == 0 or traced():
        q, k, v = reference.split_qkv(qkv.view(*shape[:-1], 3 * shape[-1]), num_heads)
        return by_torch(q, k, v, head_dim**-0.5, dropout).reshape(-1, shape[-1])
    o = _attention(head_dim**-0.5, dropout, True, stacked(qkv, shape[0], 3, num_heads))
    return side_by_side(o[None], num_heads)


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
    return unbatched(_attention(scale, dropout, keep, *(batched(t, t.dtype).contiguous() for t in (q, k, v))), like=q)


def by_torch(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: Dropout | None) -> Tensor:
    """As :func:`batch_attention`. SDPA serves calls without dropout, the formula others, which a compiler fuses."""
    if q.numel() == 0 or k.numel() == 0:
        return reference.attention(q, k, v, scale=scale)
    if dropout is None:
        qb, kb, vb = (reference.heads_first(t).reshape(-1, t.shape[-2], t.shape[0], t.shape[-1]) for t in (q, k, v))
        o = F.scaled_dot_product_attention(qb, kb, vb, scale=scale)
        return o.view(*q.shape[1:-1], q.shape[0], -1).movedim(-2, 0)
    return reference.attention(q, k, v, scale=scale, mask=attention_mask(dropout, q, k.shape[0]))
