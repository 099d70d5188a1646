"""An encoder layer on kernels, as one autograd Function."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastbf.distributed.process_groups import Batch, agree
from fastbf.dropout import drop_threshold
from fastbf.kernels.rows import Rows
from fastbf.reference import LayerOptions, LayerWeights
from fastbf.torch_state import autocast_dtype, no_autocast, norm_dtype
from fastbf.triton_backend import tape
from fastbf.triton_backend.building import build, prepared
from fastbf.triton_backend.encoder_backward import Wanted, backward, summed
from fastbf.triton_backend.encoder_call import Layer, Saved
from fastbf.triton_backend.encoder_forward import forward
from fastbf.triton_backend.encoder_weights import Factors, cast_factors
from fastbf.triton_backend.functions import (
    as_rows,
    by_kernels,
    dense,
    from_rows,
    in_memory_order,
    product_dtype,
)

__all__ = ["encoder_layer"]


class _EncoderLayer(Function):
    """A whole encoder layer of rows [R, C]; R = N · L.

    Saves x, the seed, the weights and what ``encoder_call.Saved`` lists. The table has the bytes a row for F = C,
    post-norm and ReLU, and those that autograd keeps of ``nn.TransformerEncoderLayer``, without attention's lse and the
    statistics of norms, which are a few bytes a row and head::

                              fp32 x, 16-bit products (autocast)        everything in 2 bytes
        saved here            2C x, 6C qkv, 2C o, 4C s1, 2C z,          6C qkv, 2C o, 2C s1, 2C z, 2C u, 2C s2
                              2C u, 4C s2                     = 22C                              = 16C
        eager PyTorch         2C x, 6C q k v, 2C o, 1C mask, 4C s1,     6C q k v, 2C o, 1C mask, 2C s1,
                              2C z, 2C relu, 2C u, 1C mask, 4C s2,      2C z, 2C relu, 2C u, 1C mask, 2C s2,
                              1C mask                         = 27C     1C mask                  = 21C

    ``tests/triton_backend/test_saved.py`` counts what is saved here. The rest follows from what derivatives of eager
    operators read, if attention stores no N × M matrix; PyTorch's stores one for D > 256. Backward recomputes dropout's
    decisions, the norms' statistics and, with GELU, u, in whose place h is saved. Weights that are cast to the
    products' dtype are kept once, as in eager PyTorch.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plain: Tensor | None, seed: Tensor | None, layer: Layer, *tensors: Tensor | None
    ) -> Tensor:
        weights = LayerWeights(*tensors)  # type: ignore[arg-type]
        ctx.layer, ctx.dtypes = layer, tuple([None if t is None else t.dtype for t in (plain, *tensors)])
        if layer.fork == "input":
            x, plain = layer.halves(x)[1].reshape(layer.rows().total(), -1).contiguous(), x

        what = ("encoder_layer", layer) if layer.batch is None else None
        inputs = x, plain, seed, *tensors
        made = tape.play(what, inputs)
        if made is None:
            with tape.noting(what, inputs) as made:
                made += forward(x, plain, weights, layer._replace(seed=seed))
        out, *rest = made
        saved = Saved(*rest)
        products = weights[:8:2] if saved.cast is None else (None,) * 4
        ctx.save_for_backward(x, seed, *products, weights.norm1_weight, weights.norm2_weight, *saved)
        return out

    @staticmethod
    @by_kernels("encoder_layer")
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        layer, needs, dtypes = ctx.layer, ctx.needs_input_grad, ctx.dtypes
        what = ("encoder_layer backward", layer, needs, dtypes) if layer.batch is None else None
        d_out, saved = d_out.contiguous(), ctx.saved_tensors
        inputs = d_out, *saved
        made = tape.play(what, inputs)
        if made is None:
            with tape.noting(what, inputs) as made:
                made += _gradients(d_out, saved, layer, needs, dtypes)
        d_x, d_plain, *parameters = made
        return d_x, d_plain, None, None, *parameters


def _gradients(
    d_out: Tensor, tensors: tuple[Any, ...], layer: Layer, needs: tuple[bool, ...],
    dtypes: tuple[torch.dtype | None, ...],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of x, plain and the weights, None where they are not needed.

    Args:
        tensors: as forward saves them.
        needs: of forward's arguments.
        dtypes: of plain and of the weights.
    """
    x, seed, *rest = tensors
    factors, saved = Factors(*rest[:6]), Saved(*rest[6:])
    of_plain, *of_weights = dtypes
    assert of_weights[0] is not None
    if saved.cast is not None:
        width = saved.hidden.shape[1]
        factors = cast_factors(saved.cast, width, factors.norm1, factors.norm2)
    wanted = Wanted(needs[0], *needs[4:])
    plain = layer.halves(d_out)[0].reshape(-1, d_out.shape[1]).to(of_plain) if needs[1] else None
    found: dict[str, Any] = {"plain": plain}
    if any(wanted):
        with no_autocast(x):
            dtype = product_dtype(of_weights[0], layer.compute)
            grads = backward(d_out, x, saved, factors, layer._replace(seed=seed), wanted, dtype)
        found |= grads._asdict()
        if grads.sums is not None:
            sums = _cast_once(grads.sums, of_weights)
            found |= _split(sums, layer.norm_first, x.shape[1], factors.linear1.shape[0])
    parameters = (
        found[name].to(dtype) if need else None
        for name, need, dtype in zip(LayerWeights._fields, needs[4:], of_weights, strict=True)
    )
    return [found.get("x"), found["plain"], *parameters]


def _cast_once(sums: Tensor, dtypes: list[torch.dtype | None]) -> Tensor:
    """The sums in the parameters' dtype, if all parameters have the same."""
    (dtype, *others) = {dtype for dtype in dtypes if dtype is not None}
    return sums if others else sums.to(dtype)


def _split(sums: Tensor, norm_first: bool, channels: int, width: int) -> dict[str, Tensor]:
    """The parameters' gradients that stand side by side in ``sums``."""
    names = summed(norm_first)
    sizes = [width if name == "linear1_bias" else channels for name in names]
    return dict(zip(names, sums.split(sizes), strict=True))


def encoder_layer(
    x: Tensor, weights: LayerWeights, options: LayerOptions, *, seed: Tensor | None, plain: Tensor | None = None,
    forked: bool = False, batch: Batch | None = None,
) -> Tensor:  # fmt: skip
    """A whole encoder layer. x (N, …, C) → its shape, or a fork (2N, …, C), the plain half first.

    With ``plain``, of x's shape, the result is a fork of it and the layer's output. If ``forked``, x is a fork
    (2N, …, C), and its mixed half goes through the layer. The result has x's order in memory. With a ``batch`` x holds
    this rank's samples of it.
    """
    matrix, rows = in_memory_order(x)
    other = None if plain is None or plain is x else as_rows(plain, rows)
    fork = "input" if forked else "plain" if other is not None else "" if plain is None else "x"
    compute = autocast_dtype(x) or x.dtype
    norm = x.dtype if compute == x.dtype else torch.promote_types(x.dtype, compute)
    make = _layer.__wrapped__ if torch.compiler.is_compiling() else _layer
    layer = make(rows, options, fork, compute, norm_dtype(x, norm))
    tensors = (*weights[:8], *dense(*weights[8:]))  # products take any strides
    if batch is not None and batch.new:
        silent = matrix, other, seed, layer._replace(batch=batch.silent()), *tensors
        agree(batch, partial(build, _EncoderLayer, torch.is_grad_enabled(), silent))
    given = matrix, other, seed, layer if batch is None else layer._replace(batch=batch), *tensors
    apply, ahead = prepared(_EncoderLayer, given, built=batch is not None)
    with ahead:
        return from_rows(apply(*given), rows, x.shape)


@lru_cache(maxsize=1024)
def _layer(rows: Rows, options: LayerOptions, fork: str, compute: torch.dtype, norm: torch.dtype) -> Layer:
    return Layer(
        samples=rows.samples // 2 if fork == "input" else rows.samples, positions=rows.positions,
        position_major=rows.position_major, num_heads=options.num_heads, activation=options.activation,
        norm_first=options.norm_first, eps=options.eps, threshold=drop_threshold(options.dropout_p), fork=fork,
        compute=compute, norm=norm,
    )  # fmt: skip
