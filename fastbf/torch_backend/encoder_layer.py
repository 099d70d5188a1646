"""The torch backend's encoder layer: the steps of ``reference.py`` by this backend's attention, products and dropout.

Autograd differentiates PyTorch's operators. A call that repeats runs from tapes (``joint.py``).
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from fastbf import joint
from fastbf.distributed import collectives, gathering
from fastbf.distributed.exchange import split_kv
from fastbf.distributed.process_groups import Batch
from fastbf.dropout import Dropout, Site
from fastbf.precision import compute_dtype
from fastbf.reference import LayerOptions, LayerWeights, fork
from fastbf.repeats import Tape, What
from fastbf.torch_backend import attention, attention_across_ranks
from fastbf.torch_backend.elementwise import activate, drop
from fastbf.torch_backend.matmul import linear
from fastbf.torch_state import autocast_dtype


def encoder_layer(
    x: Tensor, weights: LayerWeights, options: LayerOptions, *, seed: Tensor | None, plain: Tensor | None = None,
    forked: bool = False, batch: Batch | None = None, what: What | None = None,
) -> Tensor:  # fmt: skip
    """An encoder layer or a fork; arguments as in :func:`fastbf.functional.encoder_layer`.

    Tapes of the call are for calls of ``what``, without seed or batch, and :func:`again` makes them by these.
    """
    formula = partial(_formula, options, forked, plain is not None, seed, batch)
    return joint.call(formula, what, (x, None if plain is x else plain, *weights), again)[0]


def again(found: Tape, x: Tensor, other: Tensor | None, weights: tuple[Tensor | None, ...]) -> Tensor:
    """A call that a tape fits; ``other`` is ``plain``, unless that is x; the weights are in ``LayerWeights``' order."""
    return joint.play(found, (x, other, *weights))[0]


def _formula(
    options: LayerOptions, forked: bool, forks: bool, seed: Tensor | None, batch: Batch | None, x: Tensor,
    plain: Tensor | None, *weights: Tensor | None,
) -> tuple[Tensor]:  # fmt: skip
    """The result. ``forks`` asks for a fork of ``plain``, or of x if that is None."""
    if not (forked or forks):
        return (_layer(x, LayerWeights._make(weights), options, seed, batch),)
    if forked:
        first, x = x.chunk(2)
    else:
        x = x.view_as(x)  # whose gradients are added up here
        first = x if plain is None else plain
    return (fork(first, _layer(x, LayerWeights._make(weights), options, seed, batch)),)


def _layer(
    x: Tensor, weights: LayerWeights, options: LayerOptions, seed: Tensor | None, batch: Batch | None
) -> Tensor:  # fmt: skip
    """The layer's result (N, …, C); in between, tensors have R = N · L rows."""
    num_heads, activation, norm_first, eps, p = options
    w, channels, rows, width = weights, x.shape[-1:], x.reshape(-1, x.shape[-1]), weights.linear1_weight.shape[0]
    norm1, norm2 = (w.norm1_weight, w.norm1_bias, eps), (w.norm2_weight, w.norm2_bias, eps)
    dropout: Dropout | None = None
    masks: list[Tensor | None] = [None] * 3
    if p:
        first = 0 if batch is None else batch.first()
        dropout = Dropout(p, seed, compute_dtype(autocast_dtype(x) or x.dtype), (0, first, 0))
        dropout.reserve(len(rows) * (num_heads * x.shape[0] + 2 * x.shape[-1] + width), x.device)

    n = F.layer_norm(rows, channels, *norm1) if norm_first else rows
    if batch is None:
        o = attention.self_attention(linear(n, w.in_proj_weight, w.in_proj_bias), x.shape, num_heads, dropout)
    else:
        o = _across_ranks(n.view(x.shape), w, options, seed, batch).view(rows.shape)
    if dropout is not None:
        masks = _masks(dropout, x, width)
    s1 = rows + drop(linear(o, w.out_proj_weight, w.out_proj_bias), masks[0])
    z = F.layer_norm(s1, channels, *(norm2 if norm_first else norm1))
    u = activate(linear(z, w.linear1_weight, w.linear1_bias), activation, masks[1])
    s2 = (s1 if norm_first else z) + drop(linear(u, w.linear2_weight, w.linear2_bias), masks[2])
    y = s2 if norm_first else F.layer_norm(s2, channels, *norm2)
    return y.view(x.shape)


def _masks(dropout: Dropout, x: Tensor, width: int) -> list[Tensor | None]:
    """The multipliers, in rows, of x (N, …, C), a hidden tensor of ``width`` channels and x again."""
    sites = (
        (Site.ATTENTION_OUTPUT, x.shape),
        (Site.ACTIVATION, (*x.shape[:-1], width)),
        (Site.FEEDFORWARD_OUTPUT, x.shape),
    )
    return [mask.view(-1, mask.shape[-1]) for mask in dropout.multipliers(sites, x.device)]


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
    kv = F.linear(x, w_kv, b_kv).reshape(x.shape[0], -1, 2 * channels)
    at_once = collectives.gathers(batch, kv[0].numel() * kv.element_size())
    coming = gathering.begin(kv, batch) if at_once else None
    q = F.linear(x, w_q, b_q).view(*kv.shape[:2], num_heads, -1)
    if at_once:
        k, v = split_kv(gathering.gather_batch(kv, batch, coming), num_heads)
        p = options.dropout_p
        o = attention.batch_attention(q, k, v, scale=scale, dropout_p=p, seed=seed, first_row=batch.first(), keep=False)
    else:
        o = attention_across_ranks.attention(q, kv.contiguous(), scale, options.dropout_p, seed, batch)
    return o.reshape(x.shape)
