"""torch.autograd.Functions over the kernels. Importing this imports triton.

Nothing of size N × M is saved, and no dropout decision: those are drawn again from the seed. Not differentiable twice:
a second derivative raises RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.autograd import Function

from fastbf import ops
from fastbf.autograd import Gradients, once_differentiable
from fastbf.backend import unbuilt
from fastbf.distributed.process_groups import Batch
from fastbf.dropout import threshold
from fastbf.kernels.launch import BuildError
from fastbf.kernels.rows import Rows
from fastbf.precision import loss_dtype
from fastbf.reference import LayerWeights
from fastbf.torch_state import autocast_dtype, differentiated, donated, norm_dtype
from fastbf.triton_backend import classifier
from fastbf.triton_backend.classifier import Head
from fastbf.triton_backend.encoder_backward import Wanted, summed
from fastbf.triton_backend.encoder_call import NO_BATCH, Layer, Saved
from fastbf.triton_backend.encoder_weights import Factors, cast_factors


def _by_kernels(op: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """For the backward of a Function that serves ``op``: it runs once, and a kernel that cannot be built is named."""

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @wraps(backward)
        def run(ctx: object, *grads: Tensor) -> Gradients:
            try:
                return backward(ctx, *grads)
            except BuildError as error:
                reason = unbuilt(op, grads[0].device, error)
                raise RuntimeError(
                    f"{reason} From now on backend='auto' takes PyTorch for {op}: run the step again."
                ) from error

        twice = f"the Triton kernels of {op} cannot be differentiated twice: use backend='torch', on one rank, for that"
        return once_differentiable(twice)(run)

    return decorate


class _Attention(Function):
    """Attention from separate q, k and v.

    Saves them, the seed and, where attention streams, the result and the log-sum-exp, positions · H · N fp32 numbers.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, scale: float, drop: int) -> Tensor:
        o, *lse = ops.attention_forward(q, k, v, seed, scale, drop)
        ctx.save_for_backward(q, k, v, *((o, *lse) if lse else (None, None)), seed)
        ctx.scale, ctx.drop = scale, drop
        return o

    @staticmethod
    @_by_kernels("batch_attention")
    def backward(ctx, do: Tensor):
        needs = ctx.needs_input_grad[:3]
        grads = ops.attention_backward(do, *ctx.saved_tensors, ctx.scale, ctx.drop, list(needs))
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


class _AddNorm(Function):
    """LayerNorm(residual + drop(x)) of rows [R, C]. Saves residual + drop(x), the weight and the seed."""

    @staticmethod
    def forward(
        ctx, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, seed: Tensor | None,
        drop: int, norm: torch.dtype, rows: Rows,
    ) -> Tensor:  # fmt: skip
        y, total = ops.add_norm_forward(x, residual, weight, bias, eps, seed, drop, norm, *rows)
        ctx.save_for_backward(total, weight, seed)
        ctx.eps, ctx.drop, ctx.rows = eps, drop, rows
        ctx.dtypes = (x.dtype, residual.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    @_by_kernels("dropout_add_layer_norm")
    def backward(ctx, dy: Tensor):
        total, weight, seed = ctx.saved_tensors
        x_dtype, residual_dtype, *parameters = ctx.dtypes
        dx, ds, sums = ops.add_norm_backward(
            dy.contiguous(), total, weight, ctx.eps, seed, ctx.drop, x_dtype, residual_dtype, *ctx.rows
        )
        sums = (
            part if dtype is None else part.to(dtype) for part, dtype in zip(sums.chunk(2), parameters, strict=True)
        )
        grads = (dx, ds, *sums)
        needed = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False))
        return *needed, None, None, None, None, None


class _Activation(Function):
    """drop(act(h)) of rows [R, F]. Saves its result with ReLU; h and the seed with GELU."""

    @staticmethod
    def forward(ctx, h: Tensor, activation: str, seed: Tensor | None, drop: int, rows: Rows) -> Tensor:
        (u,) = ops.activation_forward(h, activation, seed, drop, *rows)
        ctx.save_for_backward(*((u, None) if activation == "relu" else (h, seed)))
        ctx.activation, ctx.drop, ctx.rows = activation, drop, rows
        return u

    @staticmethod
    @_by_kernels("activation_dropout")
    def backward(ctx, du: Tensor):
        saved, seed = ctx.saved_tensors
        (dh,) = ops.activation_backward(du.contiguous(), saved, ctx.activation, seed, ctx.drop, *ctx.rows)
        return dh, None, None, None, None


class _EncoderLayer(Function):
    """A whole encoder layer of rows [R, C]; R = N · L.

    Saves x, the seed and the weights, which exist anyway, and what ``encoder_call.Saved`` lists. In bytes a row,
    for F = C, post-norm, ReLU, next to what autograd keeps of ``nn.TransformerEncoderLayer`` (its attention's lse and
    the statistics of its norms, a few bytes a row and head, apart)::

                              fp32 x, 16-bit products (autocast)        everything in 2 bytes
        saved here            2C x, 6C qkv, 2C o, 4C s1, 2C z,          6C qkv, 2C o, 2C s1, 2C z, 2C u, 2C s2
                              2C u, 4C s2                     = 22C                              = 16C
        eager PyTorch         2C x, 6C q k v, 2C o, 1C mask, 4C s1,     6C q k v, 2C o, 1C mask, 2C s1,
                              2C z, 2C relu, 2C u, 1C mask, 4C s2,      2C z, 2C relu, 2C u, 1C mask, 2C s2,
                              1C mask                         = 27C     1C mask                  = 21C

    ``tests/triton_backend/test_saved.py`` counts ours; eager's follow from what its operators' derivatives read, with
    attention by a kernel that stores no N × M matrix, which PyTorch's own does for D > 256. Recomputed are all dropout decisions, the
    norms' statistics, and, with GELU, u (then h is saved in its place). Weights in the products' dtype, where
    parameters have another, are kept once, as eager keeps them.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, plain: Tensor | None, seed: Tensor | None, layer: Layer, *weights: Tensor | None
    ) -> Tensor:
        weights = LayerWeights(*weights)
        ctx.plain_dtype = None if plain is None else plain.dtype
        if layer.fork == "input":
            x, plain = layer.mixed(x).reshape(layer.rows.count, -1).contiguous(), x
        out, saved = ops.encoder_forward(x, plain, weights, seed, layer)
        products = weights[:8:2] if saved.cast is None else (None,) * 4
        ctx.save_for_backward(x, seed, *products, weights.norm1_weight, weights.norm2_weight, *saved)
        ctx.layer, ctx.width = layer, weights.linear1_weight.shape[0]
        ctx.dtypes = [None if w is None else w.dtype for w in weights]
        return out

    @staticmethod
    @_by_kernels("encoder_layer")
    def backward(ctx, d_out: Tensor):
        layer, needs = ctx.layer, ctx.needs_input_grad
        x, seed, *tensors = ctx.saved_tensors
        factors, saved = Factors(*tensors[:6]), Saved(*tensors[6:])
        if saved.cast is not None:
            factors = cast_factors(saved.cast, ctx.width, factors.norm1, factors.norm2)
        d_out = d_out.contiguous()
        wanted = Wanted(needs[0], *needs[4:])
        dtype = _product_dtype(ctx.dtypes[0], layer.compute)
        found = {"plain": layer.plain(d_out).to(ctx.plain_dtype) if needs[1] else None}
        if any(wanted):
            grads = ops.encoder_gradients(d_out, x, saved._replace(cast=None), factors, seed, layer, wanted, dtype)
            found |= grads._asdict()
            if wanted.sums:
                found |= _split(_cast_once(grads.sums, ctx.dtypes), layer.norm_first, x.shape[1], ctx.width)
        parameters = (
            found[name].to(dtype) if need else None
            for name, need, dtype in zip(LayerWeights._fields, needs[4:], ctx.dtypes, strict=True)
        )
        return found.get("x"), found["plain"], None, None, *parameters


class _Classifier(Function):
    """The shared classifier's loss. Saves x and the weight in the products' dtype, the products [M, K] in it unless
    they are too large, the target, and six fp32 numbers a row. Also gives each stream's loss and accuracy, (2,
    streams), without gradient.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, matrix: Tensor, bias: Tensor | None, logit_bias: Tensor | None, target: Tensor,
        weight: Tensor | None, head: Head,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        made = ops.classifier_forward(x, matrix, bias, target, weight, logit_bias, head)
        factors = x if made.x is None else made.x, matrix if made.matrix is None else made.matrix
        ctx.save_for_backward(*factors, made.z, made.of_rows, made.total, bias, target, weight, logit_bias)
        ctx.head, ctx.dtypes = head, [None if t is None else t.dtype for t in (x, matrix, bias, logit_bias)]
        ctx.mark_non_differentiable(made.stats)
        ctx.set_materialize_grads(False)  # zeros for them would be a launch
        return made.loss, made.stats

    @staticmethod
    @_by_kernels("linear_cross_entropy")
    def backward(ctx, grad: Tensor, _):
        wanted = classifier.Wanted(*ctx.needs_input_grad[:4])
        x_dtype, matrix_dtype, bias_dtype, logit_bias_dtype = ctx.dtypes
        scale = ctx.head.scale
        product_dtypes = x_dtype, _product_dtype(matrix_dtype, ctx.head.compute)
        grads = ops.classifier_gradients(
            grad.contiguous(), *ctx.saved_tensors, ctx.head, wanted, product_dtypes, donated(grad)
        )
        d_matrix = grads.matrix.to(matrix_dtype) if wanted.matrix else None
        d_bias = (grads.sums if scale == 1 else grads.sums * scale).to(bias_dtype) if wanted.bias else None
        d_logit_bias = grads.sums.to(logit_bias_dtype) if wanted.logit_bias else None
        return grads.x, d_matrix, d_bias, d_logit_bias, None, None, None


def _product_dtype(dtype: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """In which dtype the gradient of a weight of ``dtype`` leaves its product; it is rounded to others after that."""
    return torch.float32 if dtype == torch.float32 else compute


def _cast_once(sums: Tensor, dtypes: list[torch.dtype | None]) -> Tensor:
    """The sums in the parameters' dtype, if that is one for all of them."""
    (dtype, *others) = {dtype for dtype in dtypes if dtype is not None}
    return sums if others else sums.to(dtype)


def _split(sums: Tensor, norm_first: bool, channels: int, width: int) -> dict[str, Tensor]:
    """The parameters' gradients that stand side by side in ``sums``."""
    names = summed(norm_first)
    sizes = [width if name == "linear1_bias" else channels for name in names]
    return dict(zip(names, sums.split(sizes), strict=True))


def _distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, each but once: ``torch.compile`` takes no Function that is given the same tensor twice."""
    if not torch.compiler.is_compiling():
        return tensors
    again = [t is not None and any(t is other for other in tensors[:i]) for i, t in enumerate(tensors)]
    return tuple(t.view_as(t) if repeated else t for t, repeated in zip(tensors, again, strict=True))


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _order(x: Tensor) -> tuple[Tensor, Rows]:
    """x (N, …, C) in its order in memory, (N, L, C) or (L, N, C), contiguous, and which of them it is."""
    samples, channels = x.shape[0], x.shape[-1]
    x = x.reshape(samples, -1, channels)
    position_major = not x.is_contiguous() and x.stride(0) < x.stride(1)
    return (x.transpose(0, 1) if position_major else x).contiguous(), Rows(samples, x.shape[1], position_major)


def _as(x: Tensor, rows: Rows) -> Tensor:
    """x (N, …, C) as rows [R, C] in a given order, contiguous."""
    x = x.reshape(rows.samples, rows.positions, x.shape[-1])
    return (x.transpose(0, 1) if rows.position_major else x).reshape(rows.count, x.shape[-1]).contiguous()


def _back(matrix: Tensor, rows: Rows, shape: torch.Size) -> Tensor:
    """Rows in their order → (N, …, C), or twice as many samples, a view where … is one dimension."""
    if not rows.position_major:
        return matrix.view(-1, *shape[1:])
    return matrix.view(rows.positions, -1, shape[-1]).transpose(0, 1).reshape(-1, *shape[1:])


def batch_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, p: float, seed: Tensor | None) -> Tensor:
    """drop(softmax(scale · q kᵀ)) v. q (N, …, H, D), k and v (M, …, H, D) of one dtype → q's shape."""
    return _Attention.apply(*_distinct(q, k, v), seed, scale, threshold(p))


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, *, p: float, eps: float, seed: Tensor | None
) -> Tensor:
    """LayerNorm(residual + drop(x)). x and residual (N, …, C), weight and bias (C,) → (N, …, C)."""
    matrix, rows = _order(x)
    dtype = norm_dtype(x, torch.promote_types(x.dtype, residual.dtype))
    tensors = (matrix.view(rows.count, -1), _as(residual, rows), *_dense(weight, bias))
    x_rows, residual, weight, bias = _distinct(*tensors)
    y = _AddNorm.apply(x_rows, residual, weight, bias, eps, seed, threshold(p), dtype, rows)
    return _back(y, rows, x.shape)


def activation_dropout(x: Tensor, activation: str, *, p: float, seed: Tensor | None) -> Tensor:
    """drop(act(x)). x (N, …, F) → its shape."""
    matrix, rows = _order(x)
    return _back(_Activation.apply(matrix.view(rows.count, -1), activation, seed, threshold(p), rows), rows, x.shape)


def encoder_layer(
    x: Tensor, weights: LayerWeights, *, num_heads: int, activation: str, norm_first: bool, eps: float, p: float,
    seed: Tensor | None, plain: Tensor | None = None, forked: bool = False, batch: Batch | None = None,
) -> Tensor:  # fmt: skip
    """A whole encoder layer. x (N, …, C) → its shape, or a fork (2N, …, C), the plain half first.

    The result is a fork of ``plain``, of x's shape, if that is given; or, if x is ``forked``, that is a fork (2N, …, C)
    itself, of its plain half, the mixed half being what goes through the layer. It lies in memory as x does. With a
    ``batch`` x is a rank's part of it.
    """
    matrix, rows = _order(x)
    other = None if plain is None or plain is x else _as(plain, rows).view(matrix.shape)
    fork = "input" if forked else "plain" if other is not None else "" if plain is None else "x"
    compute = autocast_dtype(x) or x.dtype
    layer = Layer(
        rows.samples // 2 if forked else rows.samples, rows.positions, rows.position_major, num_heads, activation,
        norm_first, eps, threshold(p), fork, compute, norm_dtype(x, torch.promote_types(x.dtype, compute)),
        *(batch or NO_BATCH),
    )  # fmt: skip
    weights = (*weights[:8], *_dense(*weights[8:]))  # products take any strides
    rows_of_x, other, *weights = _distinct(matrix.reshape(rows.count, -1), other, *weights)
    out = _EncoderLayer.apply(rows_of_x, other, seed, layer, *weights)
    return _back(out, rows, x.shape)


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None, weight: Tensor | None,
    logit_bias: Tensor | None, scale: float, reduction: str, ignore_index: int, label_smoothing: float, forked: bool,
    stats: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """The loss, and each stream's loss, accuracy and unadjusted accuracy, anything without ``stats``."""
    autocasts = autocast_dtype(input)
    compute, num_classes = autocasts or input.dtype, linear_weight.shape[0]
    rows = input.flatten(0, -2)
    keep = differentiated(input, linear_weight, linear_bias, logit_bias) and classifier.keeps(
        rows.shape[0], num_classes, compute, input.device
    )
    target = target.reshape(-1, num_classes) if target.is_floating_point() else target.flatten()
    head = Head(
        2 if forked else 1, reduction, scale, ignore_index, label_smoothing, stats, keep, compute,
        torch.float32 if autocasts else loss_dtype(input.dtype, target, logit_bias),
    )  # fmt: skip
    x, target, linear_bias, weight, logit_bias = _dense(rows, target, linear_bias, weight, logit_bias)
    x, linear_weight, linear_bias, logit_bias = _distinct(x, linear_weight, linear_bias, logit_bias)
    loss, of_streams = _Classifier.apply(x, linear_weight, linear_bias, logit_bias, target, weight, head)
    return loss.view(input.shape[:-1] if reduction == "none" else ()), of_streams.unbind()
