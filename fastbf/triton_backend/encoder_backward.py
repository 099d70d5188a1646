"""Backward of an encoder layer, from its end to its start.

It stops where no earlier stage needs a gradient. Gradients of fp32 weights leave their product in fp32. The elementwise
kernels write their partial sums over rows into one buffer, which is added up once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastbf.dropout import Site
from fastbf.kernels import activation, add_norm, attention
from fastbf.kernels.add_norm import Norm
from fastbf.kernels.rows import partial_sums
from fastbf.reference import split_qkv
from fastbf.triton_backend import attention_across_ranks
from fastbf.triton_backend.encoder_call import Factors, Layer, Saved
from fastbf.triton_backend.functions import empty_like, limits_of
from fastbf.triton_backend.matmul import weight_gradient


class Wanted(NamedTuple):
    """Which gradients are wanted; the parameters by the names and in the order of ``LayerWeights``."""

    x: bool
    in_proj_weight: bool
    in_proj_bias: bool
    out_proj_weight: bool
    out_proj_bias: bool
    linear1_weight: bool
    linear1_bias: bool
    linear2_weight: bool
    linear2_bias: bool
    norm1_weight: bool
    norm1_bias: bool
    norm2_weight: bool
    norm2_bias: bool

    def sums(self) -> bool:
        """Whether any gradient is wanted that elementwise kernels sum over rows."""
        return any(self[9:]) or self.linear2_bias or self.linear1_bias or self.out_proj_bias

    def reach(self, norm_first: bool) -> int:
        """The last stage that backward needs: 0 the end, 1 feed-forward, 2 the sum before, 3 attention, 4 the start."""
        middle, start = (self[11:], self[9:11]) if norm_first else (self[9:11], ())
        stages = (
            (self.x, *start),
            (self.in_proj_weight, self.in_proj_bias, self.out_proj_weight),
            (self.out_proj_bias, *middle),
            (self.linear1_weight, self.linear1_bias, self.linear2_weight),
        )
        return next((4 - i for i, stage in enumerate(stages) if any(stage)), 0)


class LayerGradients(NamedTuple):
    """The gradients; None for those that are not wanted."""

    x: Tensor | None = None  #: of x's dtype; with ``fork`` "input" the gradient of the fork, else of x
    in_proj_weight: Tensor | None = None
    in_proj_bias: Tensor | None = None
    out_proj_weight: Tensor | None = None
    linear1_weight: Tensor | None = None
    linear2_weight: Tensor | None = None
    sums: Tensor | None = None  #: fp32 (W,), all other gradients, in the order of :func:`summed`


def summed(norm_first: bool) -> tuple[str, ...]:
    """The parameters whose gradients the elementwise kernels sum, in the order of backward."""
    norm1, norm2 = ("norm1_weight", "norm1_bias"), ("norm2_weight", "norm2_bias")
    if norm_first:
        return ("linear2_bias", "linear1_bias", "out_proj_bias", *norm2, *norm1)
    return ("linear2_bias", *norm2, "linear1_bias", "out_proj_bias", *norm1)


def sums_width(channels: int, width: int) -> int:
    """Numbers in ``LayerGradients.sums`` for C channels and a feed-forward of F."""
    return 6 * channels + width


class _Partials:
    """The buffer of partial sums, of which each stage takes its columns; None if no sum is wanted."""

    def __init__(self, x: Tensor, width: int, wanted: bool, complete: bool) -> None:
        self.filled, self.buffer = 0, None
        if wanted:
            parts = partial_sums(x.shape[0], limits_of(x.device))
            allocate = torch.empty if complete else torch.zeros
            self.buffer = allocate((parts, sums_width(x.shape[1], width)), dtype=torch.float32, device=x.device)

    def take(self, size: int) -> Tensor | None:
        """The next ``size`` columns."""
        start, self.filled = self.filled, self.filled + size
        return None if self.buffer is None else self.buffer[:, start : self.filled]

    def total(self) -> Tensor | None:
        return None if self.buffer is None else self.buffer.sum(0)


def backward(
    d_out: Tensor, x: Tensor, saved: Saved, f: Factors, layer: Layer, wanted: Wanted, dtype: torch.dtype
) -> LayerGradients:
    """The gradients of one call.

    Args:
        d_out: gradient of the result, in its shape, contiguous.
        x: [R, C], as in forward.
        saved: what forward saved.
        f: the weights that backward multiplies with.
        layer: the call.
        wanted: which gradients; at least one.
        dtype: of the gradients of weights and of in_proj_bias: fp32, or that of the products.
    """
    rows, channels, width = layer.rows(), x.shape[1], f.linear1.shape[0]
    norm_first, eps, reach = layer.norm_first, layer.eps, wanted.reach(layer.norm_first)
    partials = _Partials(x, width, wanted.sums(), complete=reach >= (4 if norm_first else 2))
    into_fork = layer.fork == "input"
    d_plain = d_out if layer.fork in ("x", "input") and wanted.x else None  # a part of x's gradient

    def empty(dtype: torch.dtype = layer.compute) -> Tensor:
        return torch.empty(x.shape, dtype=dtype, device=x.device)

    def empty_dx() -> Tensor | None:
        shape = (2 * x.shape[0], channels) if into_fork else x.shape
        return torch.empty(shape, dtype=x.dtype, device=x.device) if wanted.x else None

    # drop + residual (+ norm): the end
    d_branch, ds2 = empty(), None
    drop = layer.drop(Site.FEEDFORWARD_OUTPUT)
    if norm_first:
        add_norm.backward(d_out, rows, dx=d_branch, partials=partials.take(channels), drop=drop)
    else:
        assert saved.s2 is not None
        ds2 = empty(saved.s2.dtype) if reach >= 2 else None
        norm2 = Norm(f.norm2, None, eps, saved.s2)
        sums = partials.take(3 * channels)
        add_norm.backward(d_out, rows, norm=norm2, ds=ds2, dx=d_branch, partials=sums, drop=drop)
    if reach < 1:
        return LayerGradients(sums=partials.total())

    # feed-forward
    dh, drop, sums = torch.mm(d_branch, f.linear2), layer.drop(Site.ACTIVATION), partials.take(width)
    again = None if layer.activation == "relu" else empty_like(saved.hidden)  # u, which ReLU has kept
    activation.backward(dh, saved.hidden, rows, layer.activation, dh=dh, u=again, partials=sums, drop=drop)
    u = saved.hidden if again is None else again
    grads = LayerGradients(
        linear1_weight=weight_gradient(dh, saved.z, dtype) if wanted.linear1_weight else None,
        linear2_weight=weight_gradient(d_branch, u, dtype) if wanted.linear2_weight else None,
    )
    if reach < 2:
        return grads._replace(sums=partials.total())

    # norm and drop + residual between the two branches
    dz = torch.mm(dh, f.linear1)
    drop, sums = layer.drop(Site.ATTENTION_OUTPUT), partials.take(3 * channels)
    norm = Norm(f.norm2 if norm_first else f.norm1, None, eps, saved.s1)
    if norm_first:
        ds1 = empty(saved.s1.dtype) if reach == 4 else None
        add_norm.backward(dz, rows, skip=d_out, norm=norm, ds=ds1, dx=d_branch, partials=sums, drop=drop)
    else:
        ds1 = empty_dx()
        assert ds2 is not None
        add_norm.backward(
            ds2, rows, dy2=dz, d_plain=d_plain, norm=norm, ds=ds1, dx=d_branch, partials=sums, drop=drop
        )  # fmt: skip
    if reach < 3:
        return grads._replace(sums=partials.total())
    del dh, dz, u, again, ds2  # frees memory for attention's backward

    # attention; across ranks the gradients of keys and values are sent during the next product
    d_qkv = pending = None
    if reach > 3 or wanted.in_proj_weight or wanted.in_proj_bias:
        d_qkv, do = torch.empty(x.shape[0], 3 * channels, dtype=layer.compute, device=x.device), d_branch @ f.out_proj
        if layer.batch is None:
            _attention(do, layer, saved, d_qkv)
        else:
            pending = attention_across_ranks.backward(do, layer, saved, d_qkv)
        del do
    if wanted.out_proj_weight:
        grads = grads._replace(out_proj_weight=weight_gradient(d_branch, saved.o, dtype))
    attention_across_ranks.finish(pending, layer, d_qkv)
    if d_qkv is None:
        return grads._replace(sums=partials.total())
    if wanted.in_proj_weight:
        normed = x if saved.normed is None else saved.normed
        grads = grads._replace(in_proj_weight=weight_gradient(d_qkv, normed, dtype))
    if wanted.in_proj_bias:
        grads = grads._replace(in_proj_bias=d_qkv.sum(0, dtype=dtype))
    if reach < 4:
        return grads._replace(sums=partials.total())

    # the start
    if norm_first:
        dx = empty_dx()
        norm, sums = Norm(f.norm1, None, eps, x), partials.take(2 * channels)
        add_norm.backward(
            torch.mm(d_qkv, f.in_proj), rows, skip=ds1, d_plain=d_plain, norm=norm, ds=dx, partials=sums
        )  # fmt: skip
    else:
        dx = ds1
        assert dx is not None
        _add_product(layer.halves(dx)[1] if into_fork else dx, d_qkv, f.in_proj)
    return grads._replace(x=dx, sums=partials.total())


def _attention(do: Tensor, layer: Layer, saved: Saved, d_qkv: Tensor) -> None:
    """Writes the gradient of qkv [R, 3C], given that of o [R, C]."""
    q, k, v = split_qkv(layer.by_sample(saved.qkv), layer.num_heads)
    inputs = attention.Inputs(q, k, v, layer.heads(saved.o), saved.lse)
    grads = attention.Gradients(*split_qkv(layer.by_sample(d_qkv), layer.num_heads))
    attention.backward(layer.heads(do), inputs, layer.options(do.shape[1]), grads)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a · b; total is a matrix, or (N, L, C) in memory order. There may be gaps between rows."""
    if total.dtype == a.dtype and total.is_contiguous():
        matrix = total.view(a.shape[0], -1)
        torch.addmm(matrix, a, b, out=matrix)  # counters of FLOPs know no addmm_
    else:
        total.add_(torch.mm(a, b).view(total.shape))
