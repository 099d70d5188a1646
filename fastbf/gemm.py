"""Matrix products of the torch backend.

On CPU, fp32 products of PyTorch go to MKL, whose path for other vendors' processors leaves half of them idle
(measured on a 2-core AMD EPYC with AVX-512: MKL 130–200 GFLOP/s, oneDNN 200–420, over the shapes of an encoder
layer; torch 2.13.0, 2026-11-23). PyTorch ships oneDNN too, so plain CPU fp32 products go there. Everything else is
PyTorch's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from fastbf.context import traced


def _onednn(*tensors: Tensor) -> bool:
    """Whether oneDNN serves a product of these matrices: plain CPU fp32 tensors in eager mode without autocast."""
    return (
        all(
            type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() > 0
            for t in tensors
        )
        and not traced()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # It takes no notice of a bias's strides.
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """oneDNN takes both orders of a whole matrix, but leaves its fast path for a slice of a wider one."""
    return matrix if matrix.is_contiguous() or matrix.mT.is_contiguous() else matrix.contiguous()


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) · b (K, N) → (M, N). Differentiable where autograd records."""
    if not torch.is_grad_enabled() and _onednn(a, b):
        return _onednn_linear(a, b.mT, None)
    return torch.mm(a, b)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a (G, M, K) · b (G, K, N) → (G, M, N); a single matrix goes the way of :func:`mm`."""
    return mm(a[0], b[0])[None] if a.shape[0] == 1 else torch.bmm(a, b)


class _Linear(Function):
    """Saves x and the weight. The gradient's graph, when asked for, is that of ``torch.mm``."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            mm(grad, weight) if needs_x else None,
            mm(grad.mT, x) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias, as ``F.linear``. x (…, C), weight (K, C), bias (K,) or None → (…, K)."""
    if not _onednn(x, weight, *(() if bias is None else (bias,))):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
