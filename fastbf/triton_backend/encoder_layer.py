"""An encoder layer on kernels, as one autograd Function."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastbf import tape
from fastbf.distributed.process_groups import Batch, agree
from fastbf.dropout import draw_seed, drop_threshold
from fastbf.kernels.rows import Rows
from fastbf.reference import LayerOptions, LayerWeights
from fastbf.repeats import Tape, What
from fastbf.torch_state import autocast_dtype, no_autocast, norm_dtype
from fastbf.triton_backend.building import build, prepared
from fastbf.triton_backend.encoder_backward import Wanted, backward, summed
from fastbf.triton_backend.encoder_call import Factors, Layer, Saved
from fastbf.triton_backend.encoder_forward import forward
from fastbf.triton_backend.functions import (
    by_kernels,
    dense,
    dtypes_of,
    from_rows,
    order_of,
    product_dtype,
)
from fastbf.triton_backend.launches import noting

__all__ = ["again", "encoder_layer"]


class _EncoderLayer(Function):
    """A whole encoder layer of features in their own shape, of R = N · L rows.

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
        ctx: Any, x: Tensor, plain: Tensor | None, seed: Tensor | None, layer: Layer, what: What | None,
        found: Tape | None, *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        inputs = x, plain, *tensors
        made = tape.play(what, inputs, seed, found)
        if made is None:
            with noting(what, inputs, seed, layer, again) as made:
                weights = LayerWeights._make(tensors)
                result, kept, factors, saved = forward(x, plain, weights, layer._replace(seed=seed))
                made += [result, kept, seed, *factors, *saved]
        out, *others = made
        ctx.save_for_backward(*others)
        ctx.layer, ctx.dtypes = layer, dtypes_of(inputs) if found is None else found.dtypes
        return out

    @staticmethod
    @by_kernels("encoder_layer")
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        layer, needs, dtypes = ctx.layer, ctx.needs_input_grad, ctx.dtypes
        what = ("encoder_layer backward", layer, needs, dtypes) if layer.batch is None else None
        inputs = d_out, *ctx.saved_tensors
        made = tape.play(what, inputs)
        if made is None:
            with noting(what, inputs) as made:
                made += _gradients(inputs, layer, needs, dtypes)
        return tuple(made)


def _gradients(
    tensors: tuple[Any, ...], layer: Layer, needs: tuple[bool, ...], dtypes: tuple[torch.dtype | None, ...]
) -> list[Tensor | None]:
    """The gradients of forward's arguments, None where they are not needed.

    Args:
        tensors: the result's gradient, in its shape, and what forward saves.
        needs: of forward's arguments.
        dtypes: of x, plain and the weights.
    """
    d_out, x, seed, *rest = tensors
    factors, saved = Factors(*rest[:6]), Saved(*rest[6:])
    needs = *needs[:2], *needs[6:]
    _, of_plain, *of_weights = dtypes
    assert of_weights[0] is not None
    wanted = Wanted(needs[0], *needs[2:])
    x, rows = layer.matrix(x) if x.shape == layer.shape else x, layer.given_rows()
    d_out = d_out.contiguous().view(-1, layer.shape[-1])
    d_plain = None
    if needs[1]:
        d_plain = from_rows(layer.halves(d_out)[0].reshape(-1, d_out.shape[1]).to(of_plain), rows, layer.shape)
    found: dict[str, Any] = {}
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
        for name, need, dtype in zip(LayerWeights._fields, needs[2:], of_weights, strict=True)
    )
    d_x = found.get("x")
    return [None if d_x is None else from_rows(d_x, rows, layer.shape), d_plain, None, None, None, None, *parameters]


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
    forked: bool = False, batch: Batch | None = None, what: What | None = None,
) -> Tensor:  # fmt: skip
    """A whole encoder layer. x (N, …, C) → its shape, or a fork (2N, …, C), the plain half first.

    With ``plain``, of x's shape, the result is a fork of it and the layer's output. If ``forked``, x is a fork
    (2N, …, C), and its mixed half goes through the layer. The result has x's order in memory. With a ``batch`` x holds
    this rank's samples of it. A tape of the call is for calls of ``what``, and :func:`again` makes them by it.
    """
    other = None if plain is x else plain
    fork = "input" if forked else "plain" if other is not None else "" if plain is None else "x"
    compute = autocast_dtype(x) or x.dtype
    norm = x.dtype if compute == x.dtype else torch.promote_types(x.dtype, compute)
    make = _layer.__wrapped__ if torch.compiler.is_compiling() else _layer
    layer = make(x.shape, order_of(x), options, fork, compute, norm_dtype(x, norm))
    tensors = (*weights[:8], *dense(*weights[8:]))  # products take any strides
    if batch is not None and batch.new:
        silent = x, other, seed, layer._replace(batch=batch.silent()), None, None, *tensors
        agree(batch, partial(build, _EncoderLayer, torch.is_grad_enabled(), silent))
    if batch is not None:
        layer, what = layer._replace(batch=batch), None
    elif what is None:
        what = "encoder_layer", layer, seed is None
    given = x, other, seed, layer, what, None, *tensors
    apply, ahead = prepared(_EncoderLayer, given, built=batch is not None)
    with ahead:
        return _in_shape(apply(*given), layer)


def again(found: Tape, x: Tensor, other: Tensor | None, weights: tuple[Tensor | None, ...]) -> Tensor:
    """A call that a tape fits; ``other`` is ``plain``, unless that is x; the weights are in ``LayerWeights``' order."""
    seed = draw_seed(x.device) if found.draws else None
    given = x, other, seed, found.of, None, found, *weights
    apply, ahead = prepared(_EncoderLayer, given)
    with ahead:
        return _in_shape(apply(*given), found.of)


def _in_shape(out: Tensor, layer: Layer) -> Tensor:
    """The Function's result in the features' dimensions.

    In memory order (L, N, C) this is a view, whose node in the graph brings the gradient into that order, and frees
    what it copies.
    """
    return from_rows(out, layer.given_rows(), layer.shape) if layer.position_major else out


@lru_cache(maxsize=1024)
def _layer(
    shape: torch.Size, rows: Rows, options: LayerOptions, fork: str, compute: torch.dtype, norm: torch.dtype
) -> Layer:  # fmt: skip
    return Layer(
        shape=shape, samples=rows.samples // 2 if fork == "input" else rows.samples, positions=rows.positions,
        position_major=rows.position_major, num_heads=options.num_heads, activation=options.activation,
        norm_first=options.norm_first, eps=options.eps, threshold=drop_threshold(options.dropout_p), fork=fork,
        compute=compute, norm=norm,
    )  # fmt: skip
