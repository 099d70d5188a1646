"""The torch backend's encoder layer: one autograd Function, whose steps have the names of ``reference.encoder_layer``.

Autograd records no operator, and a tape makes those of a call that repeats. Where operators must be seen one by one, by
a compiler and in transforms, and where other ranks send keys, the reference serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastbf import reference, tape
from fastbf.autograd import Gradients, applying
from fastbf.distributed import collectives, gathering
from fastbf.distributed.exchange import split_kv
from fastbf.distributed.process_groups import Batch
from fastbf.dropout import Dropout, Site, draw_seed
from fastbf.precision import compute_dtype
from fastbf.reference import LayerMasks, LayerOptions, LayerWeights
from fastbf.repeats import Tape, What
from fastbf.torch_backend import attention, attention_across_ranks
from fastbf.torch_backend.matmul import linear, linear_gradients
from fastbf.torch_state import autocast_dtype, is_batched, no_autocast, release_saved, traced

_norm = torch.native_layer_norm
_norm_gradients = torch.ops.aten.native_layer_norm_backward.default
_relu_gradient = torch.ops.aten.threshold_backward.default
_gelu_gradient = torch.ops.aten.gelu_backward.default


class _Call(NamedTuple):
    """A call without its tensors."""

    shape: torch.Size  #: of x
    options: LayerOptions
    fork: str  #: "": the result is no fork; "x" or "plain": it is one of x or of ``plain``; "input": x is one already
    autocast: torch.dtype | None
    keep: bool  #: for backward, which follows

    def dropout(self, x: Tensor, seed: Tensor | None, first_row: int = 0) -> Dropout | None:
        """The decisions; ``first_row`` is the first sample's index in the whole batch."""
        p, dtype = self.options.dropout_p, compute_dtype(self.autocast or x.dtype)
        return Dropout(p, seed, dtype, (0, first_row, 0)) if p else None

    def operands(self, weights: LayerWeights) -> LayerWeights:
        """The weights as products take them."""
        if self.autocast is None:
            return weights
        cast = [None if t is None else t.to(self.autocast) for t in weights[:8]]
        return LayerWeights._make([*cast, *weights[8:]])

    def streams(self, x: Tensor, plain: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """The plain half of the result, None if it has none, and what goes through the layer."""
        if self.fork == "input":
            first, second = x.chunk(2)
            return first, second
        return (x if self.fork == "x" else plain), x


class _Saved(NamedTuple):
    """What backward needs besides x and the weights, in R = N · L rows; a norm's statistics are mean and 1/σ."""

    seed: Tensor | None  # of attention, if its weights are not kept
    n: Tensor | None  # (R, C), and x's statistics, if norms come first
    x_mean: Tensor | None
    x_rstd: Tensor | None
    qkv: Tensor  # (3, L · H, N, D)
    kept: Tensor | None  # of attention
    o: Tensor  # (R, C)
    s1: Tensor  # (R, C)
    s1_mean: Tensor
    s1_rstd: Tensor
    z: Tensor  # (R, C)
    hidden: Tensor | None  # (R, F), what gelu is applied to
    u: Tensor  # (R, F)
    s2: Tensor | None  # (R, C), and its statistics, if norms come last
    s2_mean: Tensor | None
    s2_rstd: Tensor | None
    mask1: Tensor | None  # (R, C), of the attention's output
    mask2: Tensor | None  # (R, F), of the activation
    mask3: Tensor | None  # (R, C), of the feed-forward's output


class _EncoderLayer(Function):
    """Saves x, the weights and :class:`_Saved`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plain: Tensor | None, seed: Tensor | None, call: _Call, what: What | None,
        found: Tape | None, *weights: Tensor | None,
    ) -> Tensor:  # fmt: skip
        inputs = x, plain, *weights
        made = tape.play(what, inputs, seed, found)
        if made is None:
            with tape.noting(what, inputs, seed, call, again) as made, no_autocast(x):
                y, saved = _forward(call, *call.streams(x, plain), seed, LayerWeights._make(weights))
                made += [y, *saved]
        y, *saved = made
        ctx.save_for_backward(x, *weights, *saved)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        call, needs, tensors = ctx.call, ctx.needs_input_grad, [dy, *ctx.saved_tensors]
        if torch.is_grad_enabled() or is_batched(dy):
            with torch.enable_grad():
                return _differentiable(call, tensors, needs)
        release_saved(ctx)
        what = "torch: encoder_layer backward", call, needs
        made = tape.play(what, tensors)
        if made is None:
            with tape.noting(what, tensors) as made, no_autocast(dy):
                made += _backward(call, tensors, needs)
        return tuple(made)


def encoder_layer(
    x: Tensor, weights: LayerWeights, options: LayerOptions, *, seed: Tensor | None, plain: Tensor | None = None,
    forked: bool = False, batch: Batch | None = None, what: What | None = None,
) -> Tensor:  # fmt: skip
    """An encoder layer or a fork; arguments as in :func:`fastbf.functional.encoder_layer`.

    A tape of the call is for calls of ``what``, and :func:`again` makes them by it.
    """
    other = None if plain is x else plain
    fork = "input" if forked else "plain" if other is not None else "" if plain is None else "x"
    call = _Call(x.shape, options, fork, autocast_dtype(x), torch.is_grad_enabled())
    if batch is not None or x.numel() == 0 or traced():
        return _by_formula(call, *call.streams(x, plain), seed, weights, batch)
    what = what or ("torch: encoder_layer", call, seed is None)
    return applying(_EncoderLayer, x)(x, other, seed, call, what, None, *weights)


def again(found: Tape, x: Tensor, other: Tensor | None, weights: tuple[Tensor | None, ...]) -> Tensor:
    """A call that a tape fits; ``other`` is ``plain``, unless that is x; the weights are in ``LayerWeights``' order."""
    seed = draw_seed(x.device) if found.draws else None
    return applying(_EncoderLayer, x)(x, other, seed, found.of, None, found, *weights)


def _forward(
    call: _Call, plain: Tensor | None, x: Tensor, seed: Tensor | None, weights: LayerWeights
) -> tuple[Tensor, _Saved]:  # fmt: skip
    """The result, and what backward needs."""
    num_heads, activation, norm_first, eps, _ = call.options
    w, channels, dtype, dropout = call.operands(weights), x.shape[-1:], call.autocast or x.dtype, call.dropout(x, seed)
    norm1, norm2, rows = (w.norm1_weight, w.norm1_bias, eps), (w.norm2_weight, w.norm2_bias, eps), _rows(x)

    width = w.linear1_weight.shape[0]
    if dropout is not None:
        dropout.reserve(len(rows) * (num_heads * x.shape[0] + 2 * x.shape[-1] + width), x.device)
    n, *of_x = _norm(rows, channels, *norm1) if norm_first else (rows, None, None)
    qkv = attention.stacked(linear(n.to(dtype), w.in_proj_weight, w.in_proj_bias), x.shape[0], 3, num_heads)
    q, k, v = qkv.to(compute_dtype(dtype)).unbind()
    drawn, fits = attention.settled(dropout, q, k)
    o, kept = attention.forward(attention.Call(q.shape[-1] ** -0.5, drawn), q, k, v, fits and call.keep)
    o = attention.side_by_side(o[None], num_heads).to(dtype)
    mask1, mask2, mask3 = (m if m is None else _rows(m) for m in _masks(dropout, x, width))
    s1 = _add(rows, linear(o, w.out_proj_weight, w.out_proj_bias), mask1)
    z, *of_s1 = _norm(s1, channels, *(norm2 if norm_first else norm1))
    hidden = linear(z.to(dtype), w.linear1_weight, w.linear1_bias)
    # ReLU follows dropout, in the product's memory.
    u = _dropped(hidden, mask2).relu_() if activation == "relu" else _dropped(F.gelu(hidden), mask2)
    s2 = _add(s1 if norm_first else z, linear(u, w.linear2_weight, w.linear2_bias), mask3)
    y, *of_s2 = (s2, None, None) if norm_first else _norm(s2, channels, *norm2)
    saved = _Saved._make(
        (
            None if drawn is None else drawn.seed, n if norm_first else None, *of_x, qkv, kept, o, s1, *of_s1, z,
            None if activation == "relu" else hidden, u, None if norm_first else s2, *of_s2, mask1, mask2, mask3,
        )
    )  # fmt: skip
    y = y.view(x.shape)
    return y if plain is None else reference.fork(plain, y), saved


def _backward(call: _Call, tensors: list[Any], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of forward's arguments, of which ``needs`` says which are wanted.

    ``tensors`` are the result's gradient and what forward saved. The list is emptied, and frees memory so.
    """
    dy, x, *weights = tensors[:14]
    saved = dict(zip(_Saved._fields, tensors[14:], strict=True))
    tensors.clear()
    take = saved.pop
    num_heads, activation, norm_first, *_ = call.options
    dtype, dropout = call.autocast or x.dtype, call.dropout(x, take("seed"))
    d_plain, dy = dy.chunk(2) if call.fork else (dy, dy)
    mixed = call.streams(x, None)[1]
    rows = _rows(mixed)
    needs_x, needs_plain, *_ = needs
    in_proj, out_proj, linear1, linear2, norm1, norm2 = (needs[i : i + 2] for i in range(6, 18, 2))
    of_norm1: Any = (None, None)
    of_in_proj: Any = (None, None)

    def normed(d: Any, s: Tensor, mean: Tensor, rstd: Tensor, first: bool) -> Any:
        """The gradients of a norm's input s, weight and bias."""
        weight, bias = weights[8:10] if first else weights[10:]
        wanted = [True, *(norm1 if first else norm2)]
        return _norm_gradients(d.to(s.dtype), s, x.shape[-1:], mean, rstd, weight, bias, wanted)

    def mapped(g: Tensor, x: Tensor, i: int, needs: tuple[bool, ...]) -> Any:
        """The gradients of the input x, weight and bias of the linear map whose weight is the i-th, in their dtype."""
        g_x, *others = linear_gradients(g, x, weights[i].to(dtype) if call.autocast else weights[i], needs)
        kinds = zip(others, weights[i : i + 2], strict=True)
        return g_x, *[t if t is None or like is None else t.to(like.dtype) for t, like in kinds]

    d: Any = _rows(dy)  # the gradient of s2, then of s1, then of x
    if not norm_first:
        d, *of_norm2 = normed(d, take("s2"), take("s2_mean"), take("s2_rstd"), False)
    g: Any = _masked(d, take("mask3"), dtype)  # what goes on in the branch
    g, *of_linear2 = mapped(g, saved["u"], 6, (True, *linear2))
    g = _dropped(g, take("mask2"))
    g = _relu_gradient(g, take("u"), 0) if activation == "relu" else _gelu_gradient(g, take("hidden"))
    g, *of_linear1 = mapped(g, take("z").to(dtype), 4, (True, *linear1))
    if norm_first:
        g, *of_norm2 = normed(g, take("s1"), take("s1_mean"), take("s1_rstd"), False)
        d = g.add_(d)
    else:
        d, *of_norm1 = normed(d.add_(g), take("s1"), take("s1_mean"), take("s1_rstd"), True)
    before = needs_x or any(in_proj) or (norm_first and any(norm1))  # whether anything before needs a gradient
    g = _masked(d, take("mask1"), dtype)
    g, *of_out_proj = mapped(g, take("o"), 2, (before, *out_proj))
    if before:
        g = _attention_gradient(g, take("qkv"), take("kept"), dropout, num_heads)
        n = take("n") if norm_first else rows
        g, *of_in_proj = mapped(g, n.to(dtype), 0, (needs_x or norm_first, *in_proj))
        if norm_first:
            g, *of_norm1 = normed(g, rows, take("x_mean"), take("x_rstd"), True)
    dx = None
    if needs_x:
        dx = d.add_(g).view(mixed.shape)
        if call.fork == "x":
            dx = dx.add_(d_plain)
        elif call.fork == "input":
            dx = reference.fork(d_plain, dx)
    return [
        dx, d_plain if needs_plain else None, None, None, None, None, *of_in_proj, *of_out_proj, *of_linear1,
        *of_linear2, *of_norm1, *of_norm2,
    ]  # fmt: skip


def _attention_gradient(
    g: Tensor, qkv: Tensor, kept: Tensor | None, dropout: Dropout | None, num_heads: int
) -> Tensor:  # fmt: skip
    """The gradient of queries, keys and values side by side (R, 3C), given that of their attention g (R, C)."""
    given = qkv.to(compute_dtype(qkv.dtype))
    (do,), grads = attention.stacked(g, qkv.shape[2], 1, num_heads).to(given.dtype), given.new_empty(qkv.shape)
    attention.backward(attention.Call(qkv.shape[-1] ** -0.5, dropout), do, given.unbind(), kept, grads.unbind())
    return attention.side_by_side(grads, num_heads).to(qkv.dtype)


def _rows(x: Tensor) -> Tensor:
    """(N, …, C) → (R, C)."""
    return x.reshape(-1, x.shape[-1])


def _masks(dropout: Dropout | None, x: Tensor, width: int) -> list[Any]:
    """The multipliers of x (N, …, C), a hidden tensor of ``width`` channels and x again."""
    if dropout is None:
        return [None] * 3
    sites = (
        (Site.ATTENTION_OUTPUT, x.shape),
        (Site.ACTIVATION, (*x.shape[:-1], width)),
        (Site.FEEDFORWARD_OUTPUT, x.shape),
    )
    return dropout.multipliers(sites, x.device)


def _add(residual: Tensor, branch: Tensor, mask: Tensor | None) -> Tensor:
    """residual + drop(branch), in the dtype that this has without dropout."""
    if mask is None:
        return residual + branch
    return torch.addcmul(residual, branch, mask).to(torch.promote_types(residual.dtype, branch.dtype))


def _dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    """drop(x), in x's memory."""
    return x if mask is None else x.mul_(mask)


def _masked(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """drop(x) in a dtype."""
    return (x if mask is None else x * mask).to(dtype)


def _differentiable(call: _Call, tensors: Sequence[Any], needs: Sequence[bool]) -> Gradients:
    """As :func:`_backward`, with a graph of the gradients' own, by autograd from the formula."""
    dy, saved = tensors[0], _Saved._make(tensors[14:])
    # Views, because one input may be computed from another and only the direct dependence counts.
    inputs: list[Any] = [t if t is None else t.view_as(t) for t in tensors[1:14]]
    x, *weights = inputs
    d_plain, dy = dy.chunk(2) if call.fork else (dy, dy)
    mixed = call.streams(x, None)[1]
    attends = attention.Call(0.0, call.dropout(x, saved.seed))
    n, groups = mixed.shape[0], saved.qkv.shape[1]
    masks: list[Any] = [attends.mask((groups, n, n), saved.kept, x.device), saved.mask1, saved.mask2, saved.mask3]
    shapes = [(*x.shape[1:-1], call.options.num_heads, n, n), *[(*mixed.shape[:-1], -1)] * 3]
    masks = [m if m is None else m.view(shape) for m, shape in zip(masks, shapes, strict=True)]
    with torch.autocast(x.device.type, call.autocast, enabled=call.autocast is not None):
        y = reference.encoder_layer(
            mixed, LayerWeights._make(weights), num_heads=call.options.num_heads, activation=call.options.activation,
            norm_first=call.options.norm_first, eps=call.options.eps, masks=LayerMasks(*masks),
        )  # fmt: skip
    wanted = [t for t, need in zip(inputs, (needs[0], *needs[6:]), strict=True) if need]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True) if wanted else ())
    dx, *others = (next(grads) if need else None for need in (needs[0], *needs[6:]))
    if dx is not None and call.fork == "x":
        dx = dx + d_plain
    elif dx is not None and call.fork == "input":  # which is that of x[N:], 0 before
        dx = dx + reference.fork(d_plain, torch.zeros_like(d_plain))
    return dx, d_plain if needs[1] else None, None, None, None, None, *others


def _by_formula(
    call: _Call, plain: Tensor | None, x: Tensor, seed: Tensor | None, weights: LayerWeights, batch: Batch | None
) -> Tensor:  # fmt: skip
    """The layer in differentiable operators. ``batch`` is that of several ranks."""
    num_heads, activation, norm_first, eps, _ = call.options
    dropout = call.dropout(x, seed, 0 if batch is None else batch.first())
    n = reference.attention_input(x, weights, norm_first=norm_first, eps=eps)
    if batch is None:
        q, k, v = reference.split_qkv(F.linear(n, weights.in_proj_weight, weights.in_proj_bias), num_heads)
        o = attention.by_torch(q, k, v, q.shape[-1] ** -0.5, dropout).flatten(-2)
    else:
        o = _across_ranks(n, weights, call.options, seed, batch)
    masks = LayerMasks(None, *_masks(dropout, x, weights.linear1_weight.shape[0]))
    y = reference.after_attention(x, o, weights, activation=activation, norm_first=norm_first, eps=eps, masks=masks)
    return y if plain is None else reference.fork(plain, y)


def _across_ranks(
    x: Tensor, weights: LayerWeights, options: LayerOptions, seed: Tensor | None, batch: Batch
) -> Tensor:  # fmt: skip
    """The product of q, k and v, and attention of this rank's x (N, …, C) to all ranks' samples → (N, …, C).

    Keys and values are computed first, and are sent while the queries are computed.
    """
    channels, num_heads, bias = x.shape[-1], options.num_heads, weights.in_proj_bias
    w_q, w_kv = weights.in_proj_weight.split([channels, 2 * channels])
    b_q, b_kv = (None, None) if bias is None else bias.split([channels, 2 * channels])
    scale = (channels // num_heads) ** -0.5
    kv = F.linear(x, w_kv, b_kv).reshape(x.shape[0], -1, 2 * channels)
    at_once = collectives.gathers(batch, kv[0].numel() * kv.element_size())
    coming = gathering.begin(kv, batch) if at_once else None
    q = F.linear(x, w_q, b_q).view(*kv.shape[:2], num_heads, -1)
    if at_once:
        k, v = split_kv(gathering.gather_batch(kv, batch, coming), num_heads)
        p = options.dropout_p
        o = attention.batch_attention(q, k, v, scale=scale, dropout_p=p, seed=seed, first_row=batch.first(), keep=False)
    else:
        o = attention_across_ranks.attention(q, kv.contiguous(), scale, options.dropout_p, seed, batch)
    return o.reshape(x.shape)
