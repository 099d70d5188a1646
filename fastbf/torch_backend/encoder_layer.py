"""The torch backend's encoder layer: the steps of ``reference.py`` by this backend's attention, products and dropout.

Autograd records PyTorch's operators. This costs the host less than an autograd Function that calls them.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastbf.distributed import collectives, gathering
from fastbf.distributed.exchange import split_kv
from fastbf.distributed.process_groups import Batch
from fastbf.dropout import Dropout, Site
from fastbf.precision import compute_dtype
from fastbf.reference import LayerOptions, LayerWeights, fork
from fastbf.torch_backend import attention, attention_across_ranks
from fastbf.torch_backend.elementwise import activate, drop
from fastbf.torch_backend.matmul import linear
from fastbf.torch_state import autocast_dtype


def encoder_layer(
    x: Tensor, weights: LayerWeights, options: LayerOptions, *, seed: Tensor | None, plain: Tensor | None = None,
    forked: bool = False, batch: Batch | None = None,
) -> Tensor:  # fmt: skip
    """An encoder layer or a fork; arguments as in :func:`fastbf.functional.encoder_layer`."""
    if forked:
        plain, x = x.chunk(2)
    num_heads, activation, norm_first, eps, dropout_p = options
    w, channels, dropout = weights, x.shape[-1:], None
    norm1, norm2 = (w.norm1_weight, w.norm1_bias, eps), (w.norm2_weight, w.norm2_bias, eps)
    if dropout_p:
        first = (0, 0 if batch is None else batch.first(), 0)
        dropout = Dropout(dropout_p, seed, compute_dtype(autocast_dtype(x) or x.dtype), first)

    n = F.layer_norm(x, channels, *norm1) if norm_first else x
    if batch is None:
        o = attention.self_attention(linear(n, w.in_proj_weight, w.in_proj_bias), num_heads, dropout)
    else:
        o = _across_ranks(n, w, options, seed, batch)
    if dropout is not None and seed is None:
        dropout.draw_ahead(x.shape, (*x.shape[:-1], w.linear1_weight.shape[0]), x.shape, device=x.device)
    s1 = x + drop(linear(o, w.out_proj_weight, w.out_proj_bias), dropout, Site.ATTENTION_OUTPUT)
    z = F.layer_norm(s1, channels, *(norm2 if norm_first else norm1))
    u = activate(linear(z, w.linear1_weight, w.linear1_bias), activation, dropout)
    b = linear(u, w.linear2_weight, w.linear2_bias)
    y = (s1 if norm_first else z) + drop(b, dropout, Site.FEEDFORWARD_OUTPUT)
    y = y if norm_first else F.layer_norm(y, channels, *norm2)
    return y if plain is None else fork(plain, y)


def _across_ranks(
    x: Tensor, weights: LayerWeights, options: LayerOptions, seed: Tensor | None, batch: Batch
) -> Tensor:  # fmt: skip
    """The product of q, k and v, and attention of this rank's x (N, …, C) to all ranks' samples → (N, …, C).

    Keys and values are computed first, and are sent while the queries are computed.
    """
    channels, num_heads, bias = x.shape[-1], options.num_heads, weights.in_proj_bias
    w_q, w_kv = weights.in_proj_weight.split([channels, 2 * channels])
    b_q, b_kv = (None, None) if bias is None else bias.split([channels, 2 * channels])
    scale = (channels // num_heads) ** -0.5
    kv = linear(x, w_kv, b_kv).reshape(x.shape[0], -1, 2 * channels)
    at_once = collectives.gathers(batch, kv[0].numel() * kv.element_size())
    coming = gathering.begin(kv, batch) if at_once else None
    q = linear(x, w_q, b_q).view(*kv.shape[:2], num_heads, -1)
    if at_once:
        k, v = split_kv(gathering.gather_batch(kv, batch, coming), num_heads)
        p = options.dropout_p
        o = attention.batch_attention(q, k, v, scale=scale, dropout_p=p, seed=seed, first_row=batch.first(), keep=False)
    else:
        o = attention_across_ranks.attention(q, kv.contiguous(), scale, options.dropout_p, seed, batch)
    return o.reshape(x.shape)
