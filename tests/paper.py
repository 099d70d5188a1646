"""The paper's own code, written out, as the thing every equality is shown with (arXiv 2203.01522, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbf.reference import LayerMasks


def encoder(width: int, num_heads: int = 4, dropout: float = 0.5, **options) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(width, num_heads, width, dropout, **options)


def step(layer: nn.Module, classifier: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    """Features (N, C) and labels (N,) → the loss over both streams."""
    mixed = layer(x.unsqueeze(1)).squeeze(1)
    return F.cross_entropy(classifier(torch.cat([x, mixed])), torch.cat([y, y]))


def set_masks(layer: nn.TransformerEncoderLayer, masks: LayerMasks, monkeypatch) -> None:
    """Makes the layer's four dropouts apply the given multipliers (for features of shape (N, 1, C))."""

    class Mask(nn.Module):
        def __init__(self, mask: Tensor) -> None:
            super().__init__()
            self.mask = mask[:, None]

        def forward(self, x: Tensor) -> Tensor:
            return x * self.mask

    layer.dropout1 = Mask(masks.attention_output)
    layer.dropout = Mask(masks.activation)
    layer.dropout2 = Mask(masks.feedforward_output)

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        return weights * masks.attention @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors))
