"""The torch backend's ops between matrix products, as PyTorch's own differentiable operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbf.dropout import Dropout, Site


def _kept(x: Tensor, dropout: Dropout | None, site: Site) -> tuple[Tensor, float]:
    """x (N, …, C) with zeros where dropped, and the factor that kept elements are still to be multiplied by."""
    if dropout is None or x.numel() == 0:
        return x, 1.0
    if dropout.plain:
        return F.dropout(x, dropout.dropout_p), 1.0
    return dropout.keep(x, dropout.elements(site, x.shape, x.device)), dropout.scale


def add_dropped(residual: Tensor, x: Tensor, dropout: Dropout | None, site: Site) -> Tensor:
    """residual + drop(x)."""
    kept, scale = _kept(x, dropout, site)
    return torch.add(residual, kept, alpha=scale)


def activate(x: Tensor, activation: str, dropout: Dropout | None) -> Tensor:
    """drop(act(x)). ReLU follows dropout, so that backward and the next product read the same tensor."""
    relu = activation == "relu"
    kept, scale = _kept(x if relu else F.gelu(x), dropout, Site.ACTIVATION)
    kept = kept if scale == 1.0 else kept.mul_(scale)
    return F.relu(kept) if relu else kept


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
    return F.layer_norm(add_dropped(residual, x, dropout, Site.ATTENTION_OUTPUT), (x.shape[-1],), weight, bias, eps)


def activation_dropout(x: Tensor, activation: str, *, dropout_p: float, seed: Tensor | None) -> Tensor:
    """drop(act(x))."""
    return activate(x, activation, Dropout(dropout_p, seed, x.dtype) if dropout_p else None)
