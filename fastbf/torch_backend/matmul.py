"""Matrix products of the torch backend.

On CPU, PyTorch sends fp32 products to MKL, whose kernels for AMD processors stop at AVX2. PyTorch ships oneDNN too,
which has kernels for AVX-512. On an AMD processor with AVX-512 large products go to oneDNN. MKL and oneDNN on two
threads of an AMD EPYC, torch 2.13.0, 2026-11-27: (128, 512) · (512, 1536) 1100 and 543 µs, (256, 2048) · (2048, 6144)
39,990 and 14,480 µs, with the first matrix transposed 45,540 and 30,580 µs. On another, 2026-11-25: 149 and 200, 151
and 216, 173 and 156 GFLOP/s.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from fastbf.autograd import Gradients, applying
from fastbf.environment import cpu_name
from fastbf.torch_state import has_onednn_linear, onednn_linear, traced

# oneDNN is quicker for products of this many multiplications or more. What the host needs included,
# a linear layer and its gradients take, by MKL and by oneDNN, µs: (32, 512) · (512, 512) 403 and 318, (512, 64) ·
# (64, 192) 259 and 273.
_LARGE = 8e6
# oneDNN has to copy a first matrix that is transposed, as in a weight's gradient. It is quicker where at least so many
# columns share the copy, µs: (192, 1040) · (1040, 64) 151 and 214, (576, 6304) · (6304, 192) 6955 and 5833, (1536, 128)
# · (128, 512) 1015 and 646.
_COLUMNS = 192


@cache
def _suits_onednn() -> bool:
    """Whether oneDNN is quicker than MKL on this processor."""
    return (
        "AMD" in cpu_name()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and bool(torch.backends.mkldnn.is_available())
        and has_onednn_linear()
    )


def _onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN serves x · weightᵀ if that is large: plain CPU fp32 matrices, in eager mode without autocast."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and _suits_onednn()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias by oneDNN. Slices are copied, and so is a bias with strides, which oneDNN ignores."""
    weight = weight if weight.is_contiguous() or weight.mT.is_contiguous() else weight.contiguous()
    return onednn_linear(x.contiguous(), weight, None if bias is None else bias.contiguous())


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) · b (K, N) → (M, N). Differentiable where autograd records."""
    large = not traced() and a.numel() * b.shape[1] >= _LARGE and (b.shape[1] >= _COLUMNS or a.is_contiguous())
    return _product(a, b.mT, None) if large and not torch.is_grad_enabled() and _onednn(a, b.mT) else torch.mm(a, b)


class _Linear(Function):
    """A linear layer by oneDNN. Saves x and the weight. The gradient's graph, if wanted, is that of ``torch.mm``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            mm(grad, weight) if needs_x else None,
            mm(grad.mT, x) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias, as ``F.linear``. x (M, C), weight (K, C), bias (K,) or None → (M, K)."""
    if traced() or x.numel() * weight.shape[0] < _LARGE or not _onednn(x, weight):
        return F.linear(x, weight, bias)
    return applying(_Linear, x)(x, weight, bias)
