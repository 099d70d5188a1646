"""The torch backend: each public op by what is quickest in PyTorch. ``fastbf/autograd.py`` has the same on kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbf import (
    attention_across_ranks,
    chunked_attention,
    chunked_classifier,
    collectives,
    distributed,
    gemm,
    reference,
)
from fastbf.chunks import chunk_elements, compute_dtype, loss_dtype
from fastbf.context import autocast, autocast_dtype, traced
from fastbf.dropout import Dropout, Site, attention_mask, elementwise_mask
from fastbf.exchange import split_kv
from fastbf.process_groups import Batch


def _mask(p: float, seed: Tensor | None, site: Site, x: Tensor, first_row: int = 0) -> Tensor | None:
    return None if p == 0 or x.numel() == 0 else elementwise_mask(Dropout(p, seed, x.dtype), site, x, first_row)


def batch_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, p: float, seed: Tensor | None, first_row: int = 0
) -> Tensor:  # fmt: skip
    """drop(softmax(scale · q kᵀ)) v by what is quickest: SDPA without dropout, else chunks.

    ``first_row`` is where the queries begin in the batch that dropout knows.
    """
    if q.numel() == 0 or k.numel() == 0:
        return reference.attention(q, k, v, scale=scale)
    if p == 0:
        batch = [reference.heads_first(t).reshape(-1, t.shape[-2], t.shape[0], t.shape[-1]) for t in (q, k, v)]
        o = F.scaled_dot_product_attention(*batch, scale=scale)
        return o.view(*q.shape[1:-1], q.shape[0], -1).movedim(-2, 0)
    if traced():
        mask = attention_mask(Dropout(p, seed, q.dtype), q, k.shape[0], first_row)
        return reference.attention(q, k, v, scale=scale, mask=mask)
    return chunked_attention.attention(q, k, v, scale=scale, p=p, seed=seed, first_row=first_row)


def _attention_across_ranks(
    x: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int, *, p: float, seed: Tensor | None, batch: Batch
) -> Tensor:  # fmt: skip
    """Attention of x (N, …, C) to all ranks' samples, from the first product on → (N, …, H, D).

    Keys and values come first, so that they travel while the queries are computed.
    """
    channels = x.shape[-1]
    w_q, w_kv = weight.split([channels, 2 * channels])
    b_q, b_kv = (None, None) if bias is None else bias.split([channels, 2 * channels])
    scale = (channels // num_heads) ** -0.5
    kv = gemm.linear(x, w_kv, b_kv).reshape(x.shape[0], -1, 2 * channels)
    at_once = collectives.gathers(batch, kv[0].numel() * kv.element_size())
    coming = distributed.begin(kv, batch) if at_once else None
    q = gemm.linear(x, w_q, b_q).view(*kv.shape[:2], num_heads, -1)
    if at_once:
        k, v = split_kv(distributed.gather_batch(kv, batch, coming), num_heads)
        o = batch_attention(q, k, v, scale=scale, p=p, seed=seed, first_row=batch.first)
    else:
        o = attention_across_ranks.attention(q, kv.contiguous(), scale=scale, p=p, seed=seed, batch=batch)
    return o.view(*x.shape[:-1], num_heads, -1)


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, *, p: float, eps: float, seed: Tensor | None
) -> Tensor:
    """LayerNorm(residual + drop(x))."""
    mask = _mask(p, seed, Site.ATTENTION_OUTPUT, x)
    return reference.dropout_add_layer_norm(x, residual, weight, bias, eps=eps, mask=mask)


def activation_dropout(x: Tensor, activation: str, *, p: float, seed: Tensor | None) -> Tensor:
    """drop(act(x))."""
    return reference.activation_dropout(x, activation, mask=_mask(p, seed, Site.ACTIVATION, x))


def encoder_layer(
    x: Tensor, weights: reference.LayerWeights, *, p: float, seed: Tensor | None, plain: Tensor | None, forked: bool,
    batch: Batch | None = None, **options: object,
) -> Tensor:  # fmt: skip
    """A whole encoder layer, or the fork that it ends, as :func:`fastbf.functional.encoder_layer` says."""
    if forked:
        plain, x = x.chunk(2)
    width = weights.linear1_weight.shape[0]
    hidden = x.new_empty((), dtype=autocast_dtype(x) or x.dtype).expand(*x.shape[:-1], width)
    output = hidden[..., :1].expand(x.shape)
    first = 0 if batch is None else batch.first
    masks = reference.LayerMasks(
        attention_output=_mask(p, seed, Site.ATTENTION_OUTPUT, output, first),
        activation=_mask(p, seed, Site.ACTIVATION, hidden, first),
        feedforward_output=_mask(p, seed, Site.FEEDFORWARD_OUTPUT, output, first),
    )

    def self_attention(x: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int, *, mask: None) -> Tensor:
        if batch is not None:
            return _attention_across_ranks(x, weight, bias, num_heads, p=p, seed=seed, batch=batch)
        q, k, v = reference.split_qkv(gemm.linear(x, weight, bias), num_heads)
        return batch_attention(q, k, v, scale=q.shape[-1] ** -0.5, p=p, seed=seed)

    mixed = reference.encoder_layer(
        x, weights, masks=masks, self_attention=self_attention, linear=gemm.linear, **options
    )
    return mixed if plain is None else torch.cat([plain, mixed])


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None, weight: Tensor | None,
    logit_bias: Tensor | None, scale: float, reduction: str, ignore_index: int, label_smoothing: float, forked: bool,
    stats: bool,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:  # fmt: skip
    """The loss, and with ``stats`` each stream's loss, accuracy and unadjusted accuracy."""
    rows, num_classes = input.shape[:-1], linear_weight.shape[0]
    probabilities = target.is_floating_point()
    target = target.reshape(-1, num_classes) if probabilities else target.flatten()
    x, linear_weight, linear_bias = autocast(input.flatten(0, -2), linear_weight, linear_bias)
    compute = compute_dtype(x.dtype)
    dtype = compute if autocast_dtype(input) else loss_dtype(x.dtype, target, logit_bias)
    kind = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    unusual = target.requires_grad or (weight is not None and weight.requires_grad) or x.shape[0] == 0
    small = x.shape[0] * num_classes <= chunk_elements(x.device, compute)
    right = None
    if unusual or small or traced():
        repeated = torch.cat([target, target]) if forked else target
        unadjusted = reference.linear_logits(
            x, linear_weight, linear_bias, scale=scale, logit_bias=None, linear=gemm.linear
        )
        logits = reference.class_logits(unadjusted, 1.0, logit_bias)
        factor = None if weight is None else weight.to(logits.dtype)
        if not stats:
            loss = F.cross_entropy(logits, repeated, factor, reduction=reduction, **kind)
            return (loss.view(rows) if reduction == "none" else loss).to(dtype), None
        loss, _ = reference.cross_entropy_terms(logits, repeated, weight=factor, **kind)
        right = reference.correct(logits, unadjusted, repeated, ignore_index)
    else:
        loss, right = chunked_classifier.linear_cross_entropy_rows(
            x, linear_weight, target, linear_bias=linear_bias, weight=weight, logit_bias=logit_bias, scale=scale,
            **kind, count_correct=stats,
        )  # fmt: skip
    norm = reference.row_norm(target, weight, ignore_index, loss.dtype)
    each = norm.sum()  # of a stream
    each = torch.where(each == 0, torch.nan, each)  # nothing counts, though smoothing may have left a loss
    total = each * (2 if forked else 1)
    reduced = {"none": lambda: loss.view(rows), "sum": loss.sum, "mean": lambda: loss.sum() / total}
    result = reduced[reduction]().to(dtype)
    if not stats:
        return result, None
    streams = loss.detach().view(2 if forked else 1, -1)
    counted = torch.ones_like(norm) if probabilities else (target != ignore_index).to(norm.dtype)
    accuracy, unadjusted_accuracy = right.view(2, *streams.shape).to(norm.dtype).sum(-1) / counted.sum()
    return result, (streams.sum(-1) / each.detach(), accuracy, unadjusted_accuracy)
