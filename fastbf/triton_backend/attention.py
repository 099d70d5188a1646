"""Attention along the batch on kernels, from separate q, k and v."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastbf import tape
from fastbf.dropout import drop_threshold
from fastbf.kernels import attention
from fastbf.triton_backend.building import prepared
from fastbf.triton_backend.functions import by_kernels, empty_like
from fastbf.triton_backend.launches import noting

__all__ = ["batch_attention"]


class _Attention(Function):
    """Saves q, k, v, the seed and, if attention streams, the result and lse, positions · H · N fp32 numbers.

    Nothing of size N × M is saved. The seed gives dropout's decisions again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, options: tuple[float, int]) -> Tensor:
        what, inputs = ("batch_attention", options), (q, k, v, seed)
        made = tape.play(what, inputs)
        if made is None:
            with noting(what, inputs) as made:
                made += _forward(q, k, v, seed, options)
        o, lse = made
        ctx.options = options
        ctx.save_for_backward(q, k, v, None if lse is None else o, lse, seed)
        return o

    @staticmethod
    @by_kernels("batch_attention")
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        options, needs, saved = ctx.options, ctx.needs_input_grad[:3], ctx.saved_tensors
        what, inputs = ("batch_attention backward", options, needs), (do, *saved)
        made = tape.play(what, inputs)
        if made is None:
            with noting(what, inputs) as made:
                made += _backward(do, saved, options, needs)
        return *made, None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, options: tuple[float, int]
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The result and lse. options: the scale and the threshold of dropout."""
    o, lse = empty_like(q), None
    if attention.streams(q.shape[0], k.shape[0]):
        lse = torch.empty(q[0, ..., 0].numel(), q.shape[0], dtype=torch.float32, device=q.device)
    scale, threshold = options
    attention.forward(q, k, v, attention.Options(scale, seed, threshold), o=o, lse=lse)
    return o, lse


def _backward(
    do: Tensor, tensors: tuple[Any, ...], options: tuple[float, int], needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of q, k and v, None where not needed. tensors: as forward saves them."""
    *saved, seed = tensors
    scale, threshold = options
    grads = attention.Gradients(*(empty_like(x) for x in saved[:3]))
    attention.backward(do, attention.Inputs(*saved), attention.Options(scale, seed, threshold), grads, list(needs))
    return tuple([grad if need else None for grad, need in zip(grads, needs, strict=True)])


def batch_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout_p: float, seed: Tensor | None) -> Tensor:
    """drop(softmax(scale · q kᵀ)) v. q (N, …, H, D), k and v (M, …, H, D) of one dtype → q's shape."""
    given = q, k, v, seed, (scale, drop_threshold(dropout_p))
    apply, ahead = prepared(_Attention, given)
    with ahead:
        return apply(*given)
