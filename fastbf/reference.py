"""Every op as its formula in PyTorch's operators: what tests hold both backends against.

The formulas are the mathematics of BatchFormer (Hou et al., CVPR 2022, section 3; docs/design.md). They take any dtype
and device and are differentiable any number of times. The first dimension is the batch axis, of length N. There are C
channels, H heads of D = C / H channels, and L positions (BatchFormerV2 only).

A *mask* is the multiplier that dropout applies: 0 where an element is dropped, 1/(1 - p) where it is kept, or None
without dropout. Masks are arguments and are not drawn here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbf.precision import widened


class LayerWeights(NamedTuple):
    """The tensors of an encoder layer, in the order and with the shapes of ``nn.TransformerEncoderLayer``."""

    in_proj_weight: Tensor  # (3C, C)
    in_proj_bias: Tensor | None  # (3C,)
    out_proj_weight: Tensor  # (C, C)
    out_proj_bias: Tensor | None  # (C,)
    linear1_weight: Tensor  # (F, C)
    linear1_bias: Tensor | None  # (F,)
    linear2_weight: Tensor  # (C, F)
    linear2_bias: Tensor | None  # (C,)
    norm1_weight: Tensor  # (C,)
    norm1_bias: Tensor | None  # (C,)
    norm2_weight: Tensor  # (C,)
    norm2_bias: Tensor | None  # (C,)


class LayerOptions(NamedTuple):
    """The arguments of an encoder layer besides its tensors."""

    num_heads: int
    activation: str  #: "relu" or "gelu"
    norm_first: bool
    eps: float
    dropout_p: float


class LossOptions(NamedTuple):
    """The arguments of a linear classifier's loss besides its tensors."""

    scale: float
    reduction: str  #: "mean", "sum" or "none"
    ignore_index: int
    label_smoothing: float
    forked: bool  #: the input is a fork, whose halves share the target
    stats: bool  #: each stream's loss and accuracies are wanted


class LayerMasks(NamedTuple):
    """The masks of one layer call."""

    attention: Tensor | None = None  # (*positions, H, N, M)
    attention_output: Tensor | None = None  # (N, …, C)
    activation: Tensor | None = None  # (N, …, F)
    feedforward_output: Tensor | None = None  # (N, …, C)


def _drop(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else (x * mask).to(x.dtype)


def heads_first(x: Tensor) -> Tensor:
    """(N, …, H, D) → (…, H, N, D), a view: attention runs along the last but one dimension."""
    return x.movedim(0, -2)


def attention_weights(q: Tensor, k: Tensor, *, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) over the batch. q (N, …, H, D), k (M, …, H, D) → (…, H, N, M)."""
    return torch.softmax(heads_first(q * scale) @ heads_first(k).mT, dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """drop(softmax(scale · q kᵀ)) v. q (N, …, H, D), k and v (M, …, H, D), mask (…, H, N, M) → (N, …, H, D)."""
    return (_drop(attention_weights(q, k, scale=scale), mask) @ heads_first(v)).movedim(-2, 0)


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float, mask: Tensor | None = None
) -> Tensor:
    """LayerNorm(residual + drop(x)) over the last dimension."""
    return F.layer_norm(residual + _drop(x, mask), (x.shape[-1],), weight, bias, eps)


def activation_dropout(x: Tensor, activation: str, *, mask: Tensor | None = None) -> Tensor:
    """drop(act(x)); ``activation`` is "relu" or "gelu" (exact, by erf)."""
    return _drop(F.relu(x) if activation == "relu" else F.gelu(x), mask)


def split_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v that stand side by side in (N, …, 3C), as three (N, …, H, D) views."""
    return qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)


def fork(plain: Tensor, mixed: Tensor, dim: int = 0) -> Tensor:
    """Both streams in one tensor, the plain half first."""
    return torch.cat([plain, mixed], dim=dim)


def encoder_layer(
    x: Tensor,
    weights: LayerWeights,
    *,
    num_heads: int,
    activation: str,
    norm_first: bool,
    eps: float,
    masks: LayerMasks = LayerMasks(),  # noqa: B008 (immutable)
) -> Tensor:
    """A whole encoder layer along the first dimension (docs/design.md, the mathematics). x (N, …, C) → (N, …, C)."""
    w, channels = weights, (x.shape[-1],)
    norm1, norm2 = (w.norm1_weight, w.norm1_bias, eps), (w.norm2_weight, w.norm2_bias, eps)
    n = F.layer_norm(x, channels, *norm1) if norm_first else x
    q, k, v = split_qkv(F.linear(n, w.in_proj_weight, w.in_proj_bias), num_heads)
    o = attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=masks.attention)
    s1 = x + _drop(F.linear(o.flatten(-2), w.out_proj_weight, w.out_proj_bias), masks.attention_output)
    z = F.layer_norm(s1, channels, *(norm2 if norm_first else norm1))
    u = activation_dropout(F.linear(z, w.linear1_weight, w.linear1_bias), activation, mask=masks.activation)
    b = _drop(F.linear(u, w.linear2_weight, w.linear2_bias), masks.feedforward_output)
    return s1 + b if norm_first else F.layer_norm(z + b, channels, *norm2)


class CrossEntropyTerms(NamedTuple):
    """Per-row pieces of a cross-entropy; the loss is ``loss.sum() / norm.sum()`` under reduction "mean"."""

    loss: Tensor  # (M,) weighted loss of every row, 0 where ignored
    norm: Tensor  # (M,) summands of what "mean" divides by: class weights, 1 for probabilities, 0 where ignored


def cross_entropy_terms(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> CrossEntropyTerms:
    """Cross-entropy of every row, as ``torch.nn.functional.cross_entropy`` defines it.

    logits (M, K); target (M,) class indices, or (M, K) probabilities; weight (K,).
    """
    loss = F.cross_entropy(
        logits, target, weight, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    return CrossEntropyTerms(loss, row_norm(target, weight, ignore_index, loss.dtype))


def row_norm(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What every row adds to the denominator of the mean: its class weight, 0 where ignored; 1 for probabilities."""
    if target.is_floating_point():
        return torch.ones(target.shape[0], dtype=dtype, device=target.device)
    valid = target != ignore_index
    if weight is None:
        return valid.to(dtype)
    return weight.to(dtype)[torch.where(valid, target, 0)] * valid


def linear_cross_entropy_terms(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    logit_bias: Tensor | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[CrossEntropyTerms, Tensor]:
    """Cross-entropy of logits = scale · (input · Wᵀ + b) + logit_bias; the terms and the logits (M, K)."""
    logits = class_logits(widened(F.linear(input, linear_weight, linear_bias)), scale, logit_bias)
    terms = cross_entropy_terms(
        logits,
        target,
        weight=None if weight is None else weight.to(logits.dtype),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    return terms, logits


def class_logits(product: Tensor, scale: float, logit_bias: Tensor | None) -> Tensor:
    """scale · product + logit_bias; the product itself where nothing is to be done."""
    z = product if scale == 1.0 else product * scale
    return z if logit_bias is None else z + logit_bias


def correct(logits: Tensor, unadjusted: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Whether each row's largest logit is the target's (most probable) class; False where the row is ignored.

    logits and unadjusted (M, K), the same tensor if there is no logit_bias → (2, M) bool, a row for each of the two.
    """
    label = target.argmax(dim=-1) if target.is_floating_point() else target
    each = [x.argmax(dim=-1) == label for x in ([logits] if logits is unadjusted else [logits, unadjusted])]
    right = torch.stack(each if len(each) == 2 else each * 2)
    return right if target.is_floating_point() else right & (target != ignore_index)
