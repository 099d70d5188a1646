"""Dropout + add + LayerNorm, and activation + dropout, on kernels, as ops of their own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastbf import tape
from fastbf.dropout import Site, drop_threshold
from fastbf.kernels import activation as activation_kernels
from fastbf.kernels import add_norm
from fastbf.kernels.add_norm import Norm
from fastbf.kernels.launch import Drop
from fastbf.kernels.rows import Rows, partial_sums
from fastbf.torch_state import norm_dtype
from fastbf.triton_backend.building import prepared
from fastbf.triton_backend.functions import (
    as_rows,
    by_kernels,
    dense,
    empty_like,
    from_rows,
    limits_of,
    order_of,
)
from fastbf.triton_backend.launches import noting

__all__ = ["activation_dropout", "dropout_add_layer_norm"]


class Sum(NamedTuple):
    """A call of dropout + add + LayerNorm without its tensors."""

    threshold: int  #: ``fastbf.dropout.drop_threshold``
    eps: float
    dtype: torch.dtype  #: of the result
    rows: Rows

    def drop(self, seed: Tensor | None) -> Drop:
        """The dropout of the kernels."""
        return Drop(seed, int(Site.ATTENTION_OUTPUT), self.threshold)


class _AddNorm(Function):
    """LayerNorm(residual + drop(x)) of rows [R, C]. Saves residual + drop(x), the weight and the seed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, call: Sum
    ) -> Tensor:  # fmt: skip
        what, inputs = ("dropout_add_layer_norm", call), (x, residual, weight, bias, seed)
        made = tape.play(what, inputs)
        if made is None:
            with noting(what, inputs) as made:
                made += _normed(*inputs, call)
        y, sums = made
        ctx.save_for_backward(sums, weight, seed)
        ctx.call, ctx.dtypes = call, (x.dtype, residual.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    @by_kernels("dropout_add_layer_norm")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call, dtypes, needs, saved = ctx.call, ctx.dtypes, ctx.needs_input_grad[:4], ctx.saved_tensors
        what, dy = ("dropout_add_layer_norm backward", call, needs, dtypes), dy.contiguous()
        made = tape.play(what, (dy, *saved))
        if made is None:
            with noting(what, (dy, *saved)) as made:
                made += _normed_backward(dy, saved, call, needs, dtypes)
        return *made, None, None


def _normed(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, call: Sum
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result, and residual + drop(x)."""
    y, sums = empty_like(x, call.dtype), empty_like(x, torch.promote_types(x.dtype, residual.dtype))
    norm = Norm(weight, bias, call.eps)
    add_norm.forward(residual, call.rows, y=y, x=x, norm=norm, residual_out=sums, drop=call.drop(seed))
    return y, sums


def _normed_backward(
    dy: Tensor, saved: tuple[Any, ...], call: Sum, needs: tuple[bool, ...], dtypes: tuple[torch.dtype | None, ...]
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of x, the residual, the weight and the bias, whose needs and dtypes are given."""
    sums, weight, seed = saved
    x_dtype, residual_dtype, *parameters = dtypes
    dx, ds, channels = empty_like(dy, x_dtype), empty_like(dy, residual_dtype), dy.shape[1]
    parts = partial_sums(dy.shape[0], limits_of(dy.device))
    partials = torch.empty(parts, 3 * channels, dtype=torch.float32, device=dy.device)
    norm = Norm(weight, None, call.eps, sums)
    add_norm.backward(dy, call.rows, norm=norm, ds=ds, dx=dx, partials=partials, drop=call.drop(seed))
    of_norm = partials[:, channels:].sum(0).chunk(2)  # the weight's and the bias's
    grads = (dx, ds, *(g if dtype is None else g.to(dtype) for g, dtype in zip(of_norm, parameters, strict=True)))
    return tuple([grad if need else None for grad, need in zip(grads, needs, strict=True)])


class Act(NamedTuple):
    """A call of activation + dropout without its tensors."""

    activation: str
    threshold: int  #: ``fastbf.dropout.drop_threshold``
    rows: Rows

    def drop(self, seed: Tensor | None) -> Drop:
        """The dropout of the kernels."""
        return Drop(seed, int(Site.ACTIVATION), self.threshold)


class _Activation(Function):
    """drop(act(h)) of rows [R, F]. Saves its result with ReLU; h and the seed with GELU."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, seed: Tensor | None, call: Act) -> Tensor:
        what, inputs = ("activation_dropout", call), (h, seed)
        made = tape.play(what, inputs)
        if made is None:
            with noting(what, inputs) as made:
                made += _activated(h, seed, call)
        (u,) = made
        ctx.save_for_backward(*((u, None) if call.activation == "relu" else (h, seed)))
        ctx.call = call
        return u

    @staticmethod
    @by_kernels("activation_dropout")
    def backward(ctx: Any, du: Tensor) -> tuple[Tensor | None, ...]:
        call, (saved, seed), du = ctx.call, ctx.saved_tensors, du.contiguous()
        what, inputs = ("activation_dropout backward", call), (du, saved, seed)
        made = tape.play(what, inputs)
        if made is None:
            with noting(what, inputs) as made:
                made += _activated_backward(*inputs, call)
        return *made, None, None


def _activated(h: Tensor, seed: Tensor | None, call: Act) -> tuple[Tensor]:
    u = empty_like(h)
    activation_kernels.forward(h, call.rows, call.activation, u=u, drop=call.drop(seed))
    return (u,)


def _activated_backward(du: Tensor, saved: Tensor, seed: Tensor | None, call: Act) -> tuple[Tensor]:
    dh = empty_like(du)
    activation_kernels.backward(du, saved, call.rows, call.activation, dh=dh, drop=call.drop(seed))
    return (dh,)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
) -> Tensor:
    """LayerNorm(residual + drop(x)). x and residual (N, …, C), weight and bias (C,) → (N, …, C)."""
    rows = order_of(x)
    matrix = as_rows(x, rows)
    dtype = norm_dtype(x, torch.promote_types(x.dtype, residual.dtype))
    tensors, call = (as_rows(residual, rows), *dense(weight, bias)), Sum(drop_threshold(dropout_p), eps, dtype, rows)
    given = matrix, *tensors, seed, call
    apply, ahead = prepared(_AddNorm, given)
    with ahead:
        return from_rows(apply(*given), rows, x.shape)


def activation_dropout(x: Tensor, activation: str, *, dropout_p: float, seed: Tensor | None) -> Tensor:
    """drop(act(x)). x (N, …, F) → its shape."""
    rows = order_of(x)
    matrix = as_rows(x, rows)
    given = matrix, seed, Act(activation, drop_threshold(dropout_p), rows)
    apply, ahead = prepared(_Activation, given)
    with ahead:
        return from_rows(apply(*given), rows, x.shape)
