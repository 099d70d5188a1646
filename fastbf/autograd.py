"""torch.autograd.Functions over the kernels. Importing this imports triton.

Each saves its inputs, the seed and, on the streaming schedule, its output and the log-sum-exp (positions · H · N fp32
numbers): nothing of size N × M. Not differentiable twice: a second derivative raises RuntimeError.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastbf.dropout import threshold
from fastbf.kernels import attention as kernels
from fastbf.reference import split_qkv


class _Attention(Function):
    """Attention from separate q, k and v."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, scale: float, drop: int) -> Tensor:
        o, lse = kernels.forward(q, k, v, seed, scale=scale, threshold=drop)
        ctx.save_for_backward(q, k, v, None if lse is None else o, lse, seed)
        ctx.scale, ctx.drop = scale, drop
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor):
        q, k, v, o, lse, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        kernels.backward(
            do, q, k, v, o, lse, seed, *grads, scale=ctx.scale, threshold=ctx.drop, needs=needs
        )  # fmt: skip
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


class _SelfAttention(Function):
    """Attention from the buffer (N, …, 3C) that one GEMM left q, k and v in; their gradients fill one like it."""

    @staticmethod
    def forward(ctx, qkv: Tensor, seed: Tensor | None, num_heads: int, scale: float, drop: int) -> Tensor:
        o, lse = kernels.forward(*split_qkv(qkv, num_heads), seed, scale=scale, threshold=drop)
        ctx.save_for_backward(qkv, None if lse is None else o, lse, seed)
        ctx.num_heads, ctx.scale, ctx.drop = num_heads, scale, drop
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor):
        qkv, o, lse, seed = ctx.saved_tensors
        grad = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        kernels.backward(
            do, *split_qkv(qkv, ctx.num_heads), o, lse, seed, *split_qkv(grad, ctx.num_heads),
            scale=ctx.scale, threshold=ctx.drop,
        )  # fmt: skip
        return grad, None, None, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, p: float, seed: Tensor | None) -> Tensor:
    """drop(softmax(scale · q kᵀ)) v. q (N, …, H, D), k and v (M, …, H, D) of one dtype → q's shape."""
    return _Attention.apply(q, k, v, seed, scale, threshold(p))


def self_attention(qkv: Tensor, num_heads: int, *, scale: float, p: float, seed: Tensor | None) -> Tensor:
    """The same for q, k and v side by side: qkv (N, …, 3C) → (N, …, H, D)."""
    return _SelfAttention.apply(qkv, seed, num_heads, scale, threshold(p))
