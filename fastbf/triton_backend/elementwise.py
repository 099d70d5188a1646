"""Dropout + add + LayerNorm, and activation + dropout, on kernels, as ops of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastbf.dropout import Site, drop_threshold
from fastbf.kernels import activation as activation_kernels
from fastbf.kernels import add_norm
from fastbf.kernels.add_norm import Norm
from fastbf.kernels.launch import Drop
from fastbf.kernels.rows import Rows, partial_sums
from fastbf.torch_state import norm_dtype
from fastbf.triton_backend.building import building_ahead
from fastbf.triton_backend.functions import (
    as_rows,
    by_kernels,
    dense,
    distinct,
    empty_like,
    from_rows,
    in_memory_order,
    limits_of,
)

__all__ = ["activation_dropout", "dropout_add_layer_norm"]


class _AddNorm(Function):
    """LayerNorm(residual + drop(x)) of rows [R, C]. Saves residual + drop(x), the weight and the seed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, threshold: int,
        eps: float, dtype: torch.dtype, rows: Rows,
    ) -> Tensor:  # fmt: skip
        y, sums = empty_like(x, dtype), empty_like(x, torch.promote_types(x.dtype, residual.dtype))
        drop = Drop(seed, int(Site.ATTENTION_OUTPUT), threshold)
        add_norm.forward(residual, rows, y=y, x=x, norm=Norm(weight, bias, eps), residual_out=sums, drop=drop)
        ctx.save_for_backward(sums, weight, seed)
        ctx.eps, ctx.threshold, ctx.rows = eps, threshold, rows
        ctx.dtypes = (x.dtype, residual.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    @by_kernels("dropout_add_layer_norm")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        sums, weight, seed = ctx.saved_tensors
        x_dtype, residual_dtype, *parameters = ctx.dtypes
        dx, ds, channels = empty_like(dy, x_dtype), empty_like(dy, residual_dtype), dy.shape[1]
        parts = partial_sums(dy.shape[0], limits_of(dy.device))
        partials = torch.empty(parts, 3 * channels, dtype=torch.float32, device=dy.device)
        add_norm.backward(
            dy.contiguous(), ctx.rows, norm=Norm(weight, None, ctx.eps, sums), ds=ds, dx=dx, partials=partials,
            drop=Drop(seed, int(Site.ATTENTION_OUTPUT), ctx.threshold),
        )  # fmt: skip
        of_norm = partials[:, channels:].sum(0).chunk(2)  # the weight's and the bias's
        grads = (dx, ds, *(g if dtype is None else g.to(dtype) for g, dtype in zip(of_norm, parameters, strict=True)))
        needed = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False))
        return *needed, None, None, None, None, None


class _Activation(Function):
    """drop(act(h)) of rows [R, F]. Saves its result with ReLU; h and the seed with GELU."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, activation: str, seed: Tensor | None, threshold: int, rows: Rows) -> Tensor:
        u = empty_like(h)
        activation_kernels.forward(h, rows, activation, u=u, drop=Drop(seed, int(Site.ACTIVATION), threshold))
        ctx.save_for_backward(*((u, None) if activation == "relu" else (h, seed)))
        ctx.activation, ctx.threshold, ctx.rows = activation, threshold, rows
        return u

    @staticmethod
    @by_kernels("activation_dropout")
    def backward(ctx: Any, du: Tensor) -> tuple[Tensor | None, ...]:
        saved, seed = ctx.saved_tensors
        dh, drop = empty_like(du), Drop(seed, int(Site.ACTIVATION), ctx.threshold)
        activation_kernels.backward(du.contiguous(), saved, ctx.rows, ctx.activation, dh=dh, drop=drop)
        return dh, None, None, None, None


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
    matrix, rows = in_memory_order(x)
    dtype = norm_dtype(x, torch.promote_types(x.dtype, residual.dtype))
    tensors = distinct(matrix, as_rows(residual, rows), *dense(weight, bias))
    given = *tensors, seed, drop_threshold(dropout_p), eps, dtype, rows
    with building_ahead(_AddNorm, *given):
        return from_rows(_AddNorm.apply(*given), rows, x.shape)


def activation_dropout(x: Tensor, activation: str, *, dropout_p: float, seed: Tensor | None) -> Tensor:
    """drop(act(x)). x (N, …, F) → its shape."""
    matrix, rows = in_memory_order(x)
    given = matrix, activation, seed, drop_threshold(dropout_p), rows
    with building_ahead(_Activation, *given):
        return from_rows(_Activation.apply(*given), rows, x.shape)
