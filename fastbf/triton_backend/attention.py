"""Attention along the batch on kernels, from separate q, k and v."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastbf.dropout import drop_threshold
from fastbf.kernels import attention
from fastbf.triton_backend.building import building_ahead
from fastbf.triton_backend.functions import by_kernels, distinct, empty_like

__all__ = ["batch_attention"]


class _Attention(Function):
    """Saves q, k, v, the seed and, if attention streams, the result and lse, positions · H · N fp32 numbers.

    Nothing of size N × M is saved. The seed gives dropout's decisions again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: tuple[float, int], seed: Tensor | None) -> Tensor:
        o, lse = empty_like(q), None
        if attention.streams(q.shape[0], k.shape[0]):
            lse = torch.empty(q[0, ..., 0].numel(), q.shape[0], dtype=torch.float32, device=q.device)
        scale, threshold = ctx.options = options
        attention.forward(q, k, v, attention.Options(scale, seed, threshold), o=o, lse=lse)
        ctx.save_for_backward(q, k, v, None if lse is None else o, lse, seed)
        return o

    @staticmethod
    @by_kernels("batch_attention")
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        *saved, seed = ctx.saved_tensors
        (scale, threshold), needs = ctx.options, ctx.needs_input_grad[:3]
        grads = attention.Gradients(*(empty_like(x) for x in saved[:3]))
        attention.backward(do, attention.Inputs(*saved), attention.Options(scale, seed, threshold), grads, list(needs))
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None


def batch_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float, seed: Tensor | None) -> Tensor:
    """drop(softmax(scale · q kᵀ)) v. q (N, …, H, D), k and v (M, …, H, D) of one dtype → q's shape."""
    given = *distinct(q, k, v), (scale, drop_threshold(dropout_p)), seed
    with building_ahead(_Attention, *given):
        return _Attention.apply(*given)
