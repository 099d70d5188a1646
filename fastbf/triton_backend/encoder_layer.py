"""An encoder layer on kernels, as one autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastbf.distributed.process_groups import Batch
from fastbf.dropout import drop_threshold
from fastbf.kernels.launch import BuildError
from fastbf.reference import LayerOptions, LayerWeights
from fastbf.torch_state import autocast_dtype, no_autocast, norm_dtype
from fastbf.triton_backend.encoder_backward import Wanted, backward, summed
from fastbf.triton_backend.encoder_call import Layer, Saved
from fastbf.triton_backend.encoder_forward import forward
from fastbf.triton_backend.encoder_weights import Factors, cast_factors
from fastbf.triton_backend.functions import (
    as_rows,
    by_kernels,
    dense,
    distinct,
    from_rows,
    in_memory_order,
    product_dtype,
)

__all__ = ["BuildError", "encoder_layer"]


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
        ctx.plain_dtype = None if plain is None else plain.dtype
        if layer.fork == "input":
            x, plain = layer.halves(x)[1].reshape(layer.rows().total(), -1).contiguous(), x
        out, saved = forward(x, plain, weights, layer._replace(seed=seed))
        products = weights[:8:2] if saved.cast is None else (None,) * 4
        ctx.save_for_backward(x, seed, *products, weights.norm1_weight, weights.norm2_weight, *saved)
        ctx.layer, ctx.width = layer, weights.linear1_weight.shape[0]
        ctx.dtypes = [None if w is None else w.dtype for w in weights]
        return out

    @staticmethod
    @by_kernels("encoder_layer")
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        layer, needs = ctx.layer, ctx.needs_input_grad
        x, seed, *tensors = ctx.saved_tensors
        factors, saved = Factors(*tensors[:6]), Saved(*tensors[6:])
        if saved.cast is not None:
            factors = cast_factors(saved.cast, ctx.width, factors.norm1, factors.norm2)
        d_out, wanted = d_out.contiguous(), Wanted(needs[0], *needs[4:])
        found: dict[str, Any] = {"plain": layer.halves(d_out)[0].to(ctx.plain_dtype) if needs[1] else None}
        if any(wanted):
            with no_autocast(x):
                dtype = product_dtype(ctx.dtypes[0], layer.compute)
                grads = backward(d_out, x, saved, factors, layer._replace(seed=seed), wanted, dtype)
            found |= grads._asdict()
            if grads.sums is not None:
                found |= _split(_cast_once(grads.sums, ctx.dtypes), layer.norm_first, x.shape[1], ctx.width)
        parameters = (
            found[name].to(dtype) if need else None
            for name, need, dtype in zip(LayerWeights._fields, needs[4:], ctx.dtypes, strict=True)
        )
        return found.get("x"), found["plain"], None, None, *parameters


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
    other = None if plain is None or plain is x else as_rows(plain, rows).view(matrix.shape)
    compute = autocast_dtype(x) or x.dtype
    layer = Layer(
        samples=rows.samples // 2 if forked else rows.samples, positions=rows.positions,
        position_major=rows.position_major, num_heads=options.num_heads, activation=options.activation,
        norm_first=options.norm_first, eps=options.eps, threshold=drop_threshold(options.dropout_p),
        fork="input" if forked else "plain" if other is not None else "" if plain is None else "x",
        compute=compute, norm=norm_dtype(x, torch.promote_types(x.dtype, compute)), batch=batch,
    )  # fmt: skip
    tensors = (*weights[:8], *dense(*weights[8:]))  # products take any strides
    x_rows, other, *given = distinct(matrix.reshape(rows.total(), -1), other, *tensors)
    return from_rows(_EncoderLayer.apply(x_rows, other, seed, layer, *given), rows, x.shape)
