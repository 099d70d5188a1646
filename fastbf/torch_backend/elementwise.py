"""The torch backend's ops between matrix products, as PyTorch's own differentiable operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastbf.dropout import Dropout, Site, elementwise_mask
from fastbf.torch_state import traced


def drop(x: Tensor, mask: Tensor | None) -> Tensor:
    """x after dropout, in x's memory and dtype; ``mask`` is the multiplier, None without dropout."""
    if mask is None:
        return x
    return (x * mask).to(x.dtype) if traced() else x.mul_(mask)


def activate(x: Tensor, activation: str, mask: Tensor | None) -> Tensor:
    """drop(act(x)), in x's memory. ReLU follows dropout, so that backward and the next product read one tensor."""
    if activation == "relu":
        x = drop(x, mask)
        return F.relu(x) if traced() else x.relu_()
    return drop(F.gelu(x), mask)


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
    """LayerNorm(residual + drop(x))."""
    if dropout_p:
        mask = elementwise_mask(Dropout(dropout_p, seed, x.dtype), Site.ATTENTION_OUTPUT, x)
        x = (x * mask).to(x.dtype)
    return F.layer_norm(residual + x, (x.shape[-1],), weight, bias, eps)


def activation_dropout(x: Tensor, activation: str, *, dropout_p: float, seed: Tensor | None) -> Tensor:
    """drop(act(x))."""
    u = F.relu(x) if activation == "relu" else F.gelu(x)
    if not dropout_p:
        return u
    return (u * elementwise_mask(Dropout(dropout_p, seed, x.dtype), Site.ACTIVATION, x)).to(x.dtype)
