"""Matrix products of the torch backend.

On CPU, fp32 products of PyTorch go to MKL, whose kernels for AMD's processors stop at AVX2. PyTorch ships oneDNN too,
which has some for AVX-512: on such a processor plain CPU fp32 products go there (measured on two cores of one, over the
shapes of an encoder layer: MKL 130–200 GFLOP/s, oneDNN 200–420; on two cores of an AMD EPYC without AVX-512, MKL
80–165, oneDNN 70–135; torch 2.13.0, 2026-11-23). Everything else is PyTorch's own.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from fastbf.context import traced
from fastbf.environment import cpu_name


@cache
def _suits_onednn() -> bool:
    """Whether this processor is one on which oneDNN is the quicker library."""
    return "AMD" in cpu_name() and torch.backends.cpu.get_cpu_capability() == "AVX512"


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
        and _suits_onednn()
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


def add_mm(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a · b, in total's dtype, which may be wider than that of a and b. Nothing is recorded by autograd."""
    if total.dtype != a.dtype or _onednn(a, b):
        return total.add_(mm(a, b))
    return total.addmm_(a, b)


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
