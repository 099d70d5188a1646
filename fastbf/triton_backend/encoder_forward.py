"""Forward of an encoder layer: matrix products, and one kernel between each two of them.

Source: docs/design.md, the mathematics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbf.dropout import Site
from fastbf.kernels import activation, add_norm, attention
from fastbf.kernels.add_norm import NO_NORM, Norm
from fastbf.reference import LayerWeights, split_qkv
from fastbf.torch_state import no_autocast
from fastbf.triton_backend import attention_across_ranks
from fastbf.triton_backend.encoder_call import Factors, Layer, Saved, allocate
from fastbf.triton_backend.functions import as_rows, empty_like, narrowed
from fastbf.triton_backend.matmul import linear, linear_into


def forward(
    x: Tensor, plain: Tensor | None, weights: LayerWeights, layer: Layer
) -> tuple[Tensor, Tensor, Factors, Saved]:  # fmt: skip
    """The layer's result; and to save, x, or the matrix [R, C] that was copied of it, the weights and the rest.

    Args:
        x: the features as they were given, of ``layer.shape``.
        plain: as they; None unless ``layer.fork`` is "plain".
        weights: of the layer.
        layer: the call.

    Returns:
        First the result in ``layer.result_shape()``.
    """
    given, x = x, layer.matrix(x)
    # Autograd looks after changes in place of what was given, and not of a view that is made here.
    kept = given if layer.views(given) else x
    rows, channels, saved = layer.rows(), x.shape[1], allocate(x, weights, layer)
    dtype = saved.s1.dtype if layer.norm_first else layer.norm
    if layer.fork:
        plain = x if layer.fork == "x" else as_rows(given if plain is None else plain, layer.given_rows())
        dtype = torch.promote_types(plain.dtype, dtype)
    out = torch.empty(layer.result_shape(), dtype=dtype, device=x.device)

    with no_autocast(x):
        norm1 = Norm(weights.norm1_weight, weights.norm1_bias, layer.eps)
        norm2 = Norm(weights.norm2_weight, weights.norm2_bias, layer.eps)
        first, *of_products = narrowed((saved.normed if layer.norm_first else x, *weights[:8]), layer.compute)
        w = LayerWeights._make((*of_products, *weights[8:]))
        factors = Factors(*w[:8:2], w.norm1_weight, w.norm2_weight)
        if layer.norm_first:
            add_norm.forward(x, rows, y=first, norm=norm1)
        elif first is not x:
            saved = saved._replace(normed=first)
        if layer.batch is None:
            linear_into(first, w.in_proj_weight, w.in_proj_bias, saved.qkv)
            q, k, v = split_qkv(layer.by_sample(saved.qkv), layer.num_heads)
            attention.forward(q, k, v, layer.options(channels), o=layer.heads(saved.o), lse=saved.lse)
        else:
            attention_across_ranks.forward(first, w.in_proj_weight, w.in_proj_bias, layer, saved)
        branch = linear(saved.o, w.out_proj_weight, w.out_proj_bias)

        residual, copy, drop = saved.z, None, layer.drop(Site.ATTENTION_OUTPUT)
        if layer.norm_first:
            add_norm.forward(x, rows, x=branch, residual_out=saved.s1, y=saved.z, norm=norm2, drop=drop)
            residual = saved.s1
        else:
            if layer.norm != layer.compute:
                residual, copy = torch.empty(x.shape, dtype=layer.norm, device=x.device), saved.z
            add_norm.forward(x, rows, x=branch, residual_out=saved.s1, y=residual, copy=copy, norm=norm1, drop=drop)
        del branch  # before the memory of the next one is taken

        linear_into(saved.z, w.linear1_weight, w.linear1_bias, saved.hidden)
        u = saved.hidden if layer.activation == "relu" else empty_like(saved.hidden)
        activation.forward(saved.hidden, rows, layer.activation, u=u, drop=layer.drop(Site.ACTIVATION))
        branch = linear(u, w.linear2_weight, w.linear2_bias)

        last, drop = NO_NORM if layer.norm_first else norm2, layer.drop(Site.FEEDFORWARD_OUTPUT)
        y = out.view(-1, channels)
        add_norm.forward(residual, rows, x=branch, residual_out=saved.s2, y=y, norm=last, plain=plain, drop=drop)
    return out, kept, factors, saved
