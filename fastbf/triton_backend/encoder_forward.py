"""An encoder layer as matrix products and kernels, forward and backward, on plain tensors.

Everything is a matrix of rows of channels, R = N · L of them in memory order (``kernels/rows.py``): matrix products and
elementwise kernels do not care which sample a row belongs to, and attention reads and writes by strides. So no tensor
is transposed, whatever the layout.

Source: DESIGN sections 1 and 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastbf.dropout import Site
from fastbf.kernels import activation, add_norm
from fastbf.reference import LayerWeights
from fastbf.torch_state import no_autocast
from fastbf.triton_backend import attention_across_ranks as encoder_attention
from fastbf.triton_backend.encoder_call import Layer, Saved, allocate
from fastbf.triton_backend.encoder_weights import cast
from fastbf.triton_backend.matmul import linear_into


def forward(
    x: Tensor, plain: Tensor | None, weights: LayerWeights, seed: Tensor | None, layer: Layer
) -> tuple[Tensor, Saved]:
    """The layer's result and what backward needs.

    Args:
        x: [R, C], contiguous.
        plain: what ``layer.fork`` says: of x's size for "plain", a fork [2R, C] for "input", contiguous; else None.
        weights: of the layer.
        seed: int64, one element, on x's device; None only if nothing is dropped.
        layer: the call.

    Returns:
        [R, C], or the fork: in memory (2N, L, C), or (L, 2N, C) if ``layer.position_major``, as [2R, C].
    """
    out, saved = allocate(x, plain, weights, layer)
    with no_autocast(x):
        _forward(x, x if layer.fork == "x" else plain, weights, seed, layer, out, saved)
    return out, saved


def _forward(
    x: Tensor, plain: Tensor | None, w: LayerWeights, seed: Tensor | None, layer: Layer, out: Tensor, saved: Saved
) -> None:
    rows = layer.rows
    norms = (w.norm1_weight, w.norm1_bias, layer.eps), (w.norm2_weight, w.norm2_bias, layer.eps)
    narrowed = {} if layer.norm_first or saved.normed is None else {saved.normed: x}
    if saved.cast is not None:
        w = cast(w, saved.cast, narrowed)
    elif narrowed:
        saved.normed.copy_(x)

    if layer.norm_first:
        add_norm.forward(x, rows, y=saved.normed, norm=norms[0])
    normed = x if saved.normed is None else saved.normed
    encoder_attention.forward(normed, w.in_proj_weight, w.in_proj_bias, seed, layer, saved)
    branch = torch.empty_like(saved.o)
    linear_into(saved.o, w.out_proj_weight, w.out_proj_bias, branch)

    drops = layer.drops(Site.ATTENTION_OUTPUT, seed)
    if layer.norm_first:
        residual = saved.s1
        add_norm.forward(x, rows, x=branch, total=saved.s1, y=saved.z, norm=norms[1], **drops)
    else:
        copied = layer.norm != layer.compute
        residual = torch.empty(x.shape, dtype=layer.norm, device=x.device) if copied else saved.z
        copy = saved.z if copied else None
        add_norm.forward(x, rows, x=branch, total=saved.s1, y=residual, copy=copy, norm=norms[0], **drops)

    linear_into(saved.z, w.linear1_weight, w.linear1_bias, saved.hidden)
    u = saved.hidden if layer.activation == "relu" else torch.empty_like(saved.hidden)
    activation.forward(saved.hidden, rows, layer.activation, u=u, **layer.drops(Site.ACTIVATION, seed))
    linear_into(u, w.linear2_weight, w.linear2_bias, branch)

    norm = None if layer.norm_first else norms[1]
    drops = layer.drops(Site.FEEDFORWARD_OUTPUT, seed)
    fork = {"plain": plain, "plain_forked": layer.fork == "input"}
    add_norm.forward(residual, rows, x=branch, total=saved.s2, y=out, norm=norm, **fork, **drops)
