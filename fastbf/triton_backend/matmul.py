"""The matrix products between kernels, on plain tensors of one dtype; by cuBLAS on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_into(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x · weightᵀ + bias."""
    if torch.compiler.is_compiling():  # the compiler takes no ``out`` with gaps between rows, and plans memory
        out.copy_(F.linear(x, weight, bias))
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias, of a matrix x."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    linear_into(x, weight, bias, out)
    return out


def product_into(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a · b. On a GPU the product itself writes fp32 from 16-bit a and b; on a CPU both are widened first."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif out.dtype != torch.float32:
        out.copy_(torch.mm(a, b))
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dyᵀ x in ``dtype``, fp32 or that of dy and x. On a GPU the product itself writes it."""
    if dtype == dy.dtype:
        return torch.mm(dy.t(), x)
    if dy.is_cuda:
        return torch.mm(dy.t(), x, out_dtype=dtype)
    return torch.mm(dy.t().to(dtype), x.to(dtype))


def add_weight_gradient(total: Tensor, dy: Tensor, x: Tensor) -> None:
    """total += dyᵀ x, total in fp32. On a GPU the product itself adds."""
    if dy.is_cuda and dy.dtype != total.dtype:
        torch.addmm(total, dy.t(), x, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, dy.t().to(total.dtype), x.to(total.dtype), out=total)
