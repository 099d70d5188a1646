"""What the autograd Functions run: the kernels, and the same as registered operators while ``torch.compile`` looks on.

In eager mode a Function calls the launchers directly, which costs the host least. A compiler cannot see through them;
while it traces, the Function calls operators of the namespace ``fastbf`` instead, one a direction, which allocate what
they return and of which the compiler knows shapes and dtypes. Importing this imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbf.distributed.process_groups import BATCH, confirm
from fastbf.dropout import Site
from fastbf.kernels import activation, add_norm, attention
from fastbf.kernels.limits import device_limits
from fastbf.kernels.rows import Rows, partial_sums
from fastbf.reference import LayerWeights
from fastbf.registered import COMMUNICATES, operator
from fastbf.triton_backend import classifier, encoder_backward
from fastbf.triton_backend import encoder_forward as encoder
from fastbf.triton_backend.classifier import Head, Results
from fastbf.triton_backend.encoder_backward import Gradients, Wanted
from fastbf.triton_backend.encoder_call import Layer, Saved, allocate, kept
from fastbf.triton_backend.encoder_weights import Factors


def _empty_like(x: Tensor) -> Tensor:
    """Contiguous, whatever x's strides."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _attention_results(q: Tensor, k: Tensor, v: Tensor, *_: object) -> list[Tensor]:
    o = [_empty_like(q)]
    if attention.streams(q.shape[0], k.shape[0]):
        groups = q[0, ..., 0].numel()
        o.append(torch.empty(groups, q.shape[0], dtype=torch.float32, device=q.device))
    return o


@operator("(Tensor q, Tensor k, Tensor v, Tensor? seed, float scale, int drop) -> Tensor[]", _attention_results)
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, scale: float, drop: int
) -> list[Tensor]:  # fmt: skip
    """[o], or [o, lse] where attention streams."""
    results = _attention_results(q, k, v)
    o, lse = results if len(results) == 2 else (*results, None)
    attention.forward(q, k, v, seed, scale=scale, threshold=drop, o=o, lse=lse)
    return results


def _attention_gradients(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> list[Tensor]:
    return [_empty_like(x) for x in (q, k, v)]


@operator(
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? o, Tensor? lse, Tensor? seed, float scale, int drop,"
    " bool[] needs) -> Tensor[]",
    _attention_gradients,
)
def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor | None, lse: Tensor | None, seed: Tensor | None,
    scale: float, drop: int, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """dq, dk and dv; what is not needed may hold anything."""
    grads = _attention_gradients(do, q, k, v)
    attention.backward(do, q, k, v, o, lse, seed, *grads, scale=scale, threshold=drop, needs=tuple(needs))
    return grads


_LAYER = (
    "SymInt samples, SymInt positions, bool position_major, int num_heads, str activation, bool norm_first, float eps,"
    f" int drop, str fork, ScalarType compute, ScalarType norm, {BATCH}"
)


def _encoder_results(x: Tensor, plain: Tensor | None, weights: Sequence[Tensor | None], seed: Tensor | None, *layer):
    out, saved = allocate(x, plain, LayerWeights(*weights), Layer(*layer))
    return [out, *(t for t in saved if t is not None)]


_FORWARD = f"(Tensor x, Tensor? plain, Tensor?[] weights, Tensor? seed, {_LAYER}) -> Tensor[]"


@operator(_FORWARD, _encoder_results)
def _encoder_forward(
    x: Tensor, plain: Tensor | None, weights: Sequence[Tensor | None], seed: Tensor | None, *layer: object
) -> list[Tensor]:
    out, saved = encoder.forward(x, plain, LayerWeights(*weights), seed, Layer(*layer))
    return [out, *(t for t in saved if t is not None)]


@operator(_FORWARD, _encoder_results, COMMUNICATES)
def _encoder_across_ranks_forward(
    x: Tensor, plain: Tensor | None, weights: Sequence[Tensor | None], seed: Tensor | None, *layer: object
) -> list[Tensor]:
    confirm(Layer(*layer).batch)
    return _encoder_forward(x, plain, weights, seed, *layer)


def encoder_forward(
    x: Tensor, plain: Tensor | None, weights: LayerWeights, seed: Tensor | None, layer: Layer
) -> tuple[Tensor, Saved]:
    """``fastbf.encoder.forward``."""
    run = _encoder_across_ranks_forward if layer.group else _encoder_forward
    out, *rest = run(x, plain, list(weights), seed, *layer)
    tensors = iter(rest)
    return out, Saved(*(next(tensors) if is_kept else None for is_kept in kept(x.dtype, weights, layer)))


def _encoder_gradients(
    d_out: Tensor, x: Tensor, saved: Sequence[Tensor | None], factors: Sequence[Tensor], seed: Tensor | None,
    wanted: Sequence[bool], dtype: torch.dtype, *layer: object,
) -> list[Tensor]:  # fmt: skip
    channels, width = x.shape[1], Saved(*saved).hidden.shape[1]
    shapes = ((3 * channels, channels), (3 * channels,), (channels, channels), (width, channels), (channels, width))
    wanted = Wanted(*wanted)
    names = ("in_proj_weight", "in_proj_bias", "out_proj_weight", "linear1_weight", "linear2_weight")
    size = (2 if Layer(*layer).fork == "input" else 1) * x.shape[0]
    grads = [torch.empty(size, channels, dtype=x.dtype, device=x.device)] if wanted.x else []
    grads += [
        torch.empty(shape, dtype=dtype, device=x.device)
        for name, shape in zip(names, shapes, strict=True)
        if getattr(wanted, name)
    ]
    if wanted.sums:
        sums = encoder_backward.sums_width(channels, width)
        grads.append(torch.empty(sums, dtype=torch.float32, device=x.device))
    return grads


_BACKWARD = (
    "(Tensor d_out, Tensor x, Tensor?[] saved, Tensor[] factors, Tensor? seed, bool[] wanted, ScalarType dtype,"
    f" {_LAYER}) -> Tensor[]"
)


@operator(_BACKWARD, _encoder_gradients)
def _encoder_backward(
    d_out: Tensor, x: Tensor, saved: Sequence[Tensor | None], factors: Sequence[Tensor], seed: Tensor | None,
    wanted: Sequence[bool], dtype: torch.dtype, *layer: object,
) -> list[Tensor]:  # fmt: skip
    grads = encoder_backward.backward(
        d_out, x, Saved(*saved), Factors(*factors), seed, Layer(*layer), Wanted(*wanted), dtype
    )
    return [grad for grad in grads if grad is not None]


@operator(_BACKWARD, _encoder_gradients, COMMUNICATES)
def _encoder_across_ranks_backward(*args: object) -> list[Tensor]:
    return _encoder_backward(*args)


def encoder_gradients(
    d_out: Tensor, x: Tensor, saved: Saved, factors: Factors, seed: Tensor | None, layer: Layer, wanted: Wanted,
    dtype: torch.dtype,
) -> Gradients:  # fmt: skip
    """``fastbf.triton_backend.encoder_backward.backward``."""
    run = _encoder_across_ranks_backward if layer.group else _encoder_backward
    grads = iter(run(d_out, x, list(saved), list(factors), seed, list(wanted), dtype, *layer))
    present = (*wanted[:4], wanted.linear1_weight, wanted.linear2_weight, wanted.sums)
    return Gradients(*(next(grads) if is_present else None for is_present in present))


_ROWS = "SymInt samples, SymInt positions, bool position_major, SymInt first"


def _add_norm_results(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, seed: Tensor | None, drop: int,
    norm: torch.dtype, *rows: object,
) -> list[Tensor]:  # fmt: skip
    total = torch.promote_types(x.dtype, residual.dtype)
    return [torch.empty(x.shape, dtype=dtype, device=x.device) for dtype in (norm, total)]


@operator(
    "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, Tensor? seed, int drop, ScalarType norm,"
    f" {_ROWS}) -> Tensor[]",
    _add_norm_results,
)
def add_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, seed: Tensor | None, drop: int,
    norm: torch.dtype, *rows: int | bool,
) -> list[Tensor]:  # fmt: skip
    """[y, s] of rows [R, C] in the order that ``Rows(*rows)`` tells; y in the dtype ``norm``."""
    y, total = results = _add_norm_results(x, residual, weight, bias, eps, seed, drop, norm)
    add_norm.forward(
        residual, Rows(*rows), y=y, x=x, norm=(weight, bias, eps), total=total,
        seed=seed, site=int(Site.ATTENTION_OUTPUT), threshold=drop,
    )  # fmt: skip
    return results


def _add_norm_gradients(
    dy: Tensor, total: Tensor, weight: Tensor, eps: float, seed: Tensor | None, drop: int, x_dtype: torch.dtype,
    residual_dtype: torch.dtype, *rows: object,
) -> list[Tensor]:  # fmt: skip
    sums = torch.empty(2 * dy.shape[1], dtype=torch.float32, device=dy.device)
    return [*(torch.empty(dy.shape, dtype=dtype, device=dy.device) for dtype in (x_dtype, residual_dtype)), sums]


@operator(
    "(Tensor dy, Tensor total, Tensor weight, float eps, Tensor? seed, int drop, ScalarType x_dtype,"
    f" ScalarType residual_dtype, {_ROWS}) -> Tensor[]",
    _add_norm_gradients,
)
def add_norm_backward(
    dy: Tensor, total: Tensor, weight: Tensor, eps: float, seed: Tensor | None, drop: int, x_dtype: torch.dtype,
    residual_dtype: torch.dtype, *rows: int | bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients of x, of the residual, and, in one fp32 tensor, of weight and bias."""
    channels = dy.shape[1]
    dx, ds, _ = _add_norm_gradients(dy, total, weight, eps, seed, drop, x_dtype, residual_dtype)
    partials = torch.empty(
        partial_sums(dy.shape[0], device_limits(dy.device)), 3 * channels, dtype=torch.float32, device=dy.device
    )
    add_norm.backward(
        dy, Rows(*rows), norm=(total, weight, eps), ds=ds, dx=dx, partials=partials,
        seed=seed, site=int(Site.ATTENTION_OUTPUT), threshold=drop,
    )  # fmt: skip
    return [dx, ds, partials[:, channels:].sum(0)]


def _activation_results(h: Tensor, *_: object) -> list[Tensor]:
    return [_empty_like(h)]


@operator(f"(Tensor h, str activation, Tensor? seed, int drop, {_ROWS}) -> Tensor[]", _activation_results)
def activation_forward(
    h: Tensor, name: str, seed: Tensor | None, drop: int, *rows: int | bool
) -> list[Tensor]:  # fmt: skip
    """[u] of rows [R, F] in the order that ``Rows(*rows)`` tells."""
    (u,) = results = _activation_results(h)
    activation.forward(h, Rows(*rows), name, u=u, seed=seed, site=int(Site.ACTIVATION), threshold=drop)
    return results


def _activation_gradients(du: Tensor, *_: object) -> list[Tensor]:
    return [_empty_like(du)]


@operator(
    f"(Tensor du, Tensor saved, str activation, Tensor? seed, int drop, {_ROWS}) -> Tensor[]", _activation_gradients
)
def activation_backward(
    du: Tensor, saved: Tensor, name: str, seed: Tensor | None, drop: int, *rows: int | bool
) -> list[Tensor]:  # fmt: skip
    """[dh]; ``saved`` is u with ReLU, h with GELU."""
    (dh,) = grads = _activation_gradients(du)
    activation.backward(du, saved, Rows(*rows), name, dh=dh, seed=seed, site=int(Site.ACTIVATION), threshold=drop)
    return grads


_HEAD = (
    "int streams, str reduction, float scale, int ignore_index, float smoothing, bool count, bool keep,"
    " ScalarType compute, ScalarType loss"
)


def _classifier_results(x: Tensor, matrix: Tensor, bias: Tensor | None, target: Tensor, *rest: object) -> list[Tensor]:
    _, _, *head = rest
    return [t for t in classifier.allocate(x, matrix, Head(*head)) if t is not None]


@operator(
    f"(Tensor x, Tensor matrix, Tensor? bias, Tensor target, Tensor? weight, Tensor? logit_bias, {_HEAD}) -> Tensor[]",
    _classifier_results,
)
def _classifier_forward(
    x: Tensor, matrix: Tensor, bias: Tensor | None, target: Tensor, weight: Tensor | None, logit_bias: Tensor | None,
    *head: object,
) -> list[Tensor]:  # fmt: skip
    results = classifier.forward(x, matrix, bias, target, weight, logit_bias, Head(*head))
    return [t for t in results if t is not None]


def classifier_forward(
    x: Tensor, matrix: Tensor, bias: Tensor | None, target: Tensor, weight: Tensor | None, logit_bias: Tensor | None,
    head: Head,
) -> Results:  # fmt: skip
    """``fastbf.triton_backend.classifier.forward``."""
    loss, stats, total, *rest = _classifier_forward(x, matrix, bias, target, weight, logit_bias, *head)
    of_rows, z, *narrowed = rest[::-1]
    narrow_x = narrowed.pop() if x.dtype != head.compute else None
    return Results(loss, stats, total, narrow_x, narrowed[0] if narrowed else None, z, of_rows)


def _classifier_gradients(
    grad: Tensor, x: Tensor, matrix: Tensor, z: Tensor, of_rows: Tensor, total: Tensor, bias: Tensor | None,
    target: Tensor, weight: Tensor | None, logit_bias: Tensor | None, wanted: Sequence[bool], x_dtype: torch.dtype,
    matrix_dtype: torch.dtype, *head: object,
) -> list[Tensor]:  # fmt: skip
    wanted = classifier.Wanted(*wanted)
    shapes = ((wanted.x, x.shape, x_dtype), (wanted.matrix, matrix.shape, matrix_dtype))
    grads = [torch.empty(shape, dtype=dtype, device=x.device) for want, shape, dtype in shapes if want]
    if wanted.sums:
        grads.append(torch.empty(matrix.shape[0], dtype=torch.float32, device=x.device))
    return grads


@operator(
    "(Tensor grad, Tensor x, Tensor matrix, Tensor z, Tensor of_rows, Tensor total, Tensor? bias, Tensor target,"
    " Tensor? weight, Tensor? logit_bias, bool[] wanted, ScalarType x_dtype, ScalarType matrix_dtype,"
    f" {_HEAD}) -> Tensor[]",
    _classifier_gradients,
)
def _classifier_backward(
    grad: Tensor, x: Tensor, matrix: Tensor, z: Tensor, of_rows: Tensor, total: Tensor, bias: Tensor | None,
    target: Tensor, weight: Tensor | None, logit_bias: Tensor | None, wanted: Sequence[bool], x_dtype: torch.dtype,
    matrix_dtype: torch.dtype, *head: object,
) -> list[Tensor]:  # fmt: skip
    found = classifier.backward(
        grad, x, matrix, z, of_rows, total, bias, target, weight, logit_bias, Head(*head), classifier.Wanted(*wanted),
        (x_dtype, matrix_dtype),
    )  # fmt: skip
    return [t for t in found if t is not None]


def classifier_gradients(
    grad: Tensor, x: Tensor, matrix: Tensor, z: Tensor, of_rows: Tensor, total: Tensor, bias: Tensor | None,
    target: Tensor, weight: Tensor | None, logit_bias: Tensor | None, head: Head, wanted: classifier.Wanted,
    dtypes: tuple[torch.dtype, torch.dtype], donated: bool,
) -> classifier.Gradients:  # fmt: skip
    """``fastbf.triton_backend.classifier.backward``."""
    tensors = grad, x, matrix, z, of_rows, total, bias, target, weight, logit_bias
    if donated:  # what overwrites an argument is no operator
        return classifier.backward(*tensors, head, wanted, dtypes, donated=True)
    found = iter(_classifier_backward(*tensors, list(wanted), *dtypes, *head))
    kinds = (wanted.x, wanted.matrix, wanted.sums)
    return classifier.Gradients(*(next(found) if want else None for want in kinds))
