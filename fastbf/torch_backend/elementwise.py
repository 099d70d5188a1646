"""The torch backend's ops between matrix products, as PyTorch's own differentiable operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastbf.dropout import Dropout, Site, elementwise_mask


def drop(x: Tensor, dropout: Dropout | None, site: Site) -> Tensor:
    """x (N, …, C) after dropout."""
    return x if dropout is None else (x * elementwise_mask(dropout, site, x)).to(x.dtype)


def activate(x: Tensor, activation: str, dropout: Dropout | None) -> Tensor:
    """drop(act(x)). ReLU follows dropout, so that backward and the next product read the same tensor."""
    relu = activation == "relu"
    x = drop(x if relu else F.gelu(x), dropout, Site.ACTIVATION)
    return F.relu(x) if relu else x


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
    dropout = Dropout(dropout_p, seed, x.dtype) if dropout_p else None
    return F.layer_norm(residual + drop(x, dropout, Site.ATTENTION_OUTPUT), (x.shape[-1],), weight, bias, eps)


def activation_dropout(x: Tensor, activation: str, *, dropout_p: float, seed: Tensor | None) -> Tensor:
    """drop(act(x))."""
    return activate(x, activation, Dropout(dropout_p, seed, x.dtype) if dropout_p else None)
