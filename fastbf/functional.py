"""The public functions: argument checks, choice of backend, dispatch.

N is the batch length, which attention runs along. There are H heads of D channels, and C = H · D. F is the feed-forward
width, K the number of classes, "…" any number of position dimensions. All tensors of a call are on one device.
``backend`` is "auto", "triton" or "torch"; "triton" raises ValueError for a call that no kernel covers.
:func:`fastbf.explain` tells which backend serves a call, and why.

Source: BatchFormer, Hou et al., CVPR 2022 (arXiv 2203.01522), section 3; dense features: BatchFormerV2
(arXiv 2204.01254).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, NoReturn, overload

import torch
from torch import Tensor

from fastbf import checks, repeats
from fastbf.backend import Choice, choose, give_up
from fastbf.distributed import gathering
from fastbf.distributed.process_groups import Batch, Facts, meet, name_of, rank_and_size
from fastbf.dropout import draw_seed, drop_threshold
from fastbf.reference import LayerOptions, LayerWeights, LossOptions
from fastbf.signatures import recall, remember, signature
from fastbf.suggestions import NOTHING, hiding_unknown, names_of, suggesting, unexpected
from fastbf.torch_backend import attention, classifier, elementwise
from fastbf.torch_backend import encoder_layer as layer
from fastbf.torch_state import autocast, autocast_dtype, differentiated, transformed

ACTIVATIONS = ("relu", "gelu")


class LossStats(NamedTuple):
    """Loss and accuracies of each stream; detached, on the device of the loss.

    Each has shape (2,), the plain stream first, if the input is a fork, else (1,). The loss sees logits with
    ``logit_bias``, the logarithm of ``class_counts`` in a classifier; predictions are made without it.

    Examples:
        >>> loss, stats = fastbf.SharedClassifier(32, 3).loss(torch.randn(2, 32), torch.tensor([0, 2]), stats=True)
        >>> stats.loss.shape, stats.unadjusted_accuracy.shape  # no fork: one stream
        (torch.Size([1]), torch.Size([1]))
    """

    loss: Tensor  #: mean loss of the stream's rows, weighted as reduction="mean" weighs them; NaN if all are ignored
    accuracy: Tensor  #: share of the counted rows whose largest logit, logit_bias included, is the target's class
    unadjusted_accuracy: Tensor  #: the same without logit_bias: the accuracy of predictions, the one to report


def _as_seed(seed: int | Tensor | None, p: float, device: torch.device, needed: bool) -> Tensor | None:
    """The seed as a tensor, drawn if ``needed``; None if nothing is dropped or the default generator decides."""
    if seed is None:
        return draw_seed(device) if p and needed else None
    checks.seed(seed, device)
    if p == 0:
        return None
    return seed.reshape(1) if isinstance(seed, Tensor) else torch.full((1,), seed, dtype=torch.int64, device=device)


def _needs_seed(choice: Choice, group: str | None = None) -> bool:
    """Whether decisions must be a function of a seed: on kernels, and where several ranks share a batch."""
    return choice.backend == "triton" or group is not None


@suggesting
def batch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of samples to samples: drop(softmax(scale · q kᵀ)) v along the first dimension.

    Each position and head is a separate problem. The Triton backend takes fp32, fp16 and bf16 with D a multiple of 8 up
    to 512. It copies inputs whose rows do not start at multiples of 16 bytes, stores nothing of size N × M, gives the
    same bits for the same seed, and cannot be differentiated twice. For other calls (fp64, other D, transforms of
    ``torch.func``) "auto" takes PyTorch.

    Args:
        q: (N, …, H, D), floating point, any strides with a contiguous last dimension.
        k: (M, …, H, D), M may differ from N (a batch gathered from other processes).
        v: as k.
        dropout_p: probability in [0, 1] of dropping an attention weight; kept ones are scaled up.
        scale: of the scores; None is 1/√D.
        seed: an int, or an int64 tensor of one element on q's device, that fixes which weights are dropped, the same
            on both backends; None leaves that to the default generator.
        backend: see the module's docstring.

    Returns:
        (N, …, H, D), q's dtype (autocast's dtype under ``torch.autocast``).

    Raises:
        TypeError: not tensors, not floating point, unequal dtypes, a seed of another type.
        ValueError: shapes or devices that do not fit, dropout_p outside [0, 1], no kernel for "triton".

    Examples:
        >>> q, k, v = torch.randn(3, 6, 4, 8)  # 6 samples, 4 heads of 8 channels
        >>> fastbf.functional.batch_attention(q, k, v, dropout_p=0.5).shape
        torch.Size([6, 4, 8])

    Source: paper section 3.2; docs/design.md, the mathematics.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.floating(name, x)
        checks.min_rank(name, x, 3, "(N, …, H, D)")
    checks.same_device("q", q, {"k": k, "v": v})
    checks.same_dtype("q", q, {"k": k, "v": v})
    checks.shape("k", k, (k.shape[0], *q.shape[1:]))
    checks.shape("v", v, tuple(k.shape))
    p = checks.probability("dropout_p", dropout_p)
    choice = choose(backend, "batch_attention", q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else checks.finite("scale", scale)
    seed = _as_seed(seed, p, q.device, _needs_seed(choice))
    q, k, v = autocast(q, k, v)
    if choice.backend == "triton":
        import fastbf.triton_backend.attention as kernels

        try:
            return kernels.batch_attention(q, k, v, scale=scale, dropout_p=p, seed=seed)
        except Exception as error:
            give_up(choice, "batch_attention", q.device, error)
    return attention.batch_attention(q, k, v, scale=scale, dropout_p=p, seed=seed)


@suggesting
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    dropout_p: float,
    eps: float,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm(residual + drop(x)) over the last dimension.

    Args:
        x: (N, …, C), floating point.
        residual: (N, …, C).
        weight: (C,).
        bias: (C,) or None.
        dropout_p: probability in [0, 1].
        eps: added to the variance.
        seed: as in :func:`batch_attention`.
        backend: see the module's docstring.

    Returns:
        (N, …, C), in the dtype that ``F.layer_norm`` gives.

    Raises:
        TypeError, ValueError: as :func:`batch_attention`.

    Examples:
        >>> x, residual = torch.randn(2, 6, 32)
        >>> weight, bias = torch.ones(32), torch.zeros(32)
        >>> fastbf.functional.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=0.5, eps=1e-5).shape
        torch.Size([6, 32])

    Source: docs/design.md, the mathematics, s1 to z and s2 to y.
    """
    checks.floating("x", x)
    checks.min_rank("x", x, 2, "(N, …, C)")
    checks.shape("residual", checks.floating("residual", residual), tuple(x.shape))
    checks.shape("weight", checks.floating("weight", weight), (x.shape[-1],))
    checks.shape("bias", bias, (x.shape[-1],))
    checks.same_device("x", x, {"residual": residual, "weight": weight, "bias": bias})
    p = checks.probability("dropout_p", dropout_p)
    eps = checks.finite("eps", eps)
    choice = choose(backend, "dropout_add_layer_norm", x, residual)
    seed = _as_seed(seed, p, x.device, _needs_seed(choice))
    if choice.backend == "triton":
        import fastbf.triton_backend.elementwise as kernels

        try:
            return kernels.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=p, eps=eps, seed=seed)
        except Exception as error:
            give_up(choice, "dropout_add_layer_norm", x.device, error)
    return elementwise.dropout_add_layer_norm(x, residual, weight, bias, dropout_p=p, eps=eps, seed=seed)


@suggesting
def activation_dropout(
    x: Tensor,
    activation: str,
    *,
    dropout_p: float,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """drop(act(x)).

    Args:
        x: (N, …, F), floating point.
        activation: "relu" or "gelu" (exact, by erf).
        dropout_p: probability in [0, 1].
        seed: as in :func:`batch_attention`.
        backend: see the module's docstring.

    Returns:
        (N, …, F), x's dtype.

    Raises:
        TypeError, ValueError: as :func:`batch_attention`; ValueError for another activation.

    Examples:
        >>> fastbf.functional.activation_dropout(torch.tensor([[-1.0, 2.0]]), "relu", dropout_p=0.0)
        tensor([[0., 2.]])

    Source: docs/design.md, the mathematics, u.
    """
    checks.floating("x", x)
    checks.min_rank("x", x, 2, "(N, …, F)")
    checks.choice("activation", activation, ACTIVATIONS)
    p = checks.probability("dropout_p", dropout_p)
    choice = choose(backend, "activation_dropout", x)
    seed = _as_seed(seed, p, x.device, _needs_seed(choice))
    if choice.backend == "triton":
        import fastbf.triton_backend.elementwise as kernels

        try:
            return kernels.activation_dropout(x, activation, dropout_p=p, seed=seed)
        except Exception as error:
            give_up(choice, "activation_dropout", x.device, error)
    return elementwise.activation_dropout(x, activation, dropout_p=p, seed=seed)


@hiding_unknown
def encoder_layer(
    x: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    linear1_weight: Tensor,
    linear1_bias: Tensor | None,
    linear2_weight: Tensor,
    linear2_bias: Tensor | None,
    norm1_weight: Tensor,
    norm1_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor | None,
    *,
    num_heads: int,
    activation: str = "relu",
    dropout_p: float = 0.0,
    norm_first: bool = False,
    eps: float = 1e-5,
    plain: Tensor | None = None,
    forked: bool = False,
    seed: int | Tensor | None = None,
    backend: str | Choice = "auto",
    process_group: Any = None,
    **unknown: NoReturn,
) -> Tensor:
    """A transformer encoder layer along the first dimension, given its tensors. Returns its result or a fork.

    The Triton backend takes fp32, fp16 and bf16 with C up to 8192 and C / H a multiple of 8 up to 512, and cannot be
    differentiated twice. cuBLAS computes the matrix products, and kernels what stands between them. An x that is
    contiguous or (L, N, C) in memory is not copied, except the mixed half of the latter if ``forked``. Under autocast
    the weights are cast once, for both directions.

    Args:
        x: (N, …, C), floating point; attention runs along N, at each position separately.
        in_proj_weight: (3C, C), and its bias (3C,) or None: q, k and v, stacked.
        out_proj_weight: (C, C), bias (C,) or None.
        linear1_weight: (F, C), bias (F,) or None.
        linear2_weight: (C, F), bias (C,) or None.
        norm1_weight: (C,), bias (C,) or None; norm2 the same.
        num_heads: H, divides C.
        activation: "relu" or "gelu" (exact, by erf).
        dropout_p: probability in [0, 1], at all four sites.
        norm_first: normalise before attention and feed-forward instead of after the residual sums.
        eps: of both norms.
        plain: of x's shape, often x itself. The result is then a fork of ``plain`` and the layer's output.
        forked: whether x is a fork (2N, …, C) already. Then only its mixed half goes through the layer, and ``plain``
            must be None.
        seed: one for the layer's four dropouts, as in :func:`batch_attention`.
        backend: see the module's docstring.
        process_group: a ``torch.distributed`` group or its ``group_name``. Every rank of it calls with its own N ≥ 0
            samples, and queries attend to the samples of all ranks (:mod:`fastbf.distributed`). None is this process
            alone.

    Returns:
        (N, …, C), or with ``plain`` or ``forked`` the fork (2N, …, C), the plain half first.

    Raises:
        TypeError, ValueError: as :func:`batch_attention`; ValueError for another activation or head count, and on
            every rank if the ranks of a process_group do not make the same call.
        RuntimeError: a call with a process_group while a CUDA graph is captured.

    Examples:
        >>> c, f = 32, 64
        >>> attention = torch.randn(3 * c, c), None, torch.randn(c, c), None  # weight and bias, twice
        >>> feed_forward = torch.randn(f, c), None, torch.randn(c, f), None
        >>> norms = torch.ones(c), None, torch.ones(c), None
        >>> x = torch.randn(6, c)
        >>> fastbf.functional.encoder_layer(x, *attention, *feed_forward, *norms, num_heads=4, plain=x).shape
        torch.Size([12, 32])

    Source: paper section 3.2; docs/design.md, the mathematics.
    """
    if unknown:
        raise TypeError(unexpected("encoder_layer", next(iter(unknown)), names_of(encoder_layer)))
    given = (
        in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, linear1_weight, linear1_bias, linear2_weight,
        linear2_bias, norm1_weight, norm1_bias, norm2_weight, norm2_bias,
    )  # fmt: skip
    group = None if process_group is None else name_of(process_group)
    settings = num_heads, activation, dropout_p, norm_first, eps, forked
    kinds = type(num_heads), type(dropout_p), type(eps)
    key = what = None
    if group is None and seed is None:
        other = None if plain is x else plain
        what = repeats.what("encoder_layer", x, backend, plain is None, *settings, *kinds)
        if (tape := repeats.find(what, (x, other, *given))) is not None:
            try:
                return tape.again(tape, x, other, given)
            except Exception as error:
                give_up(choose(backend, "encoder_layer", x), "encoder_layer", x.device, error)
        key = signature(x, given, backend, plain is None, *settings, *kinds)
    weights = LayerWeights._make(given)
    known: tuple[Choice, LayerOptions] | None = recall(key)
    if known is None:
        checks.layer(x, weights, num_heads)
        checks.choice("activation", activation, ACTIVATIONS)
        p = checks.probability("dropout_p", dropout_p)
        options = LayerOptions(num_heads, activation, norm_first, checks.finite("eps", eps), p)
    else:
        choice, options = known
        choice = backend if isinstance(backend, Choice) else choice  # equal choices may differ in who made them
    if plain is not None and plain is not x:
        checks.shape("plain", plain, tuple(x.shape))
        checks.same_device("x", x, {"plain": plain})
    if forked and (plain is not None or x.shape[0] % 2):
        instead = "plain as well" if plain is not None else f"{x.shape[0]} samples"
        raise ValueError(f"x must hold two streams and plain must be None if forked, got {instead}")
    alone = group is None or rank_and_size(group)[1] == 1
    absent = not alone and x.shape[0] == 0
    if absent:  # this rank has no samples, but the others wait for it: it computes with a sample of zeros
        x, plain = _with_zero_sample(x, plain, forked)
    if known is None:
        choice = choose(backend, "encoder_layer", x, head_dim=x.shape[-1] // num_heads)
        remember(key, (choice, options))
    seed = _as_seed(seed, options.dropout_p, x.device, _needs_seed(choice, group))
    batch = None
    if group is not None and not alone:
        batch = _meet(group, x, weights, absent, choice, options, forked, plain is not None)
        if not (batch.total() and x.numel()):
            x, batch = gathering.confirmed(x, batch), None  # nothing to send
    if choice.backend == "triton":
        import fastbf.triton_backend.encoder_layer as kernels

        try:
            out = kernels.encoder_layer(
                x, weights, options, seed=seed, plain=plain, forked=forked, batch=batch, what=what
            )
            return out[:0] if absent else out
        except Exception as error:
            # Across ranks PyTorch cannot take over, because the other ranks would not do the same.
            give_up(choice, "encoder_layer", x.device, error, final=not alone)
        what = None  # which is a call of kernels
    out = layer.encoder_layer(x, weights, options, seed=seed, plain=plain, forked=forked, batch=batch, what=what)
    return out[:0] if absent else out


def _with_zero_sample(x: Tensor, plain: Tensor | None, forked: bool) -> tuple[Tensor, Tensor | None]:
    """Appends a sample of zeros to each stream of x, which has no samples, and to plain."""
    row = x.new_zeros(2 if forked else 1, *x.shape[1:])
    filled = torch.cat([x, row])
    return filled, filled if plain is x else plain if plain is None else torch.cat([plain, row])


def _meet(
    group: str, x: Tensor, weights: LayerWeights, absent: bool, choice: Choice, options: LayerOptions, forked: bool,
    forks: bool,
) -> Batch:  # fmt: skip
    """Meets the other ranks, and returns the batch that they share."""
    if transformed():
        raise ValueError("a process_group is not for transforms of torch.func")
    dtype = autocast_dtype(x) or x.dtype
    roots = [x, weights.in_proj_weight, weights.in_proj_bias]
    roots += [weights.norm1_weight, weights.norm1_bias] if options.norm_first else []
    numbers = options.num_heads, drop_threshold(options.dropout_p)
    facts = Facts("encoder_layer", dtype, differentiated(*roots), choice.backend, *numbers, x.shape[1:])
    call = None
    if choice.backend == "triton":
        tensors = [(t.dtype, t.requires_grad) if t is not None else None for t in (x, *weights)]
        call = (dtype, x.shape, x.stride(), options, forked, forks, torch.is_grad_enabled(), *tensors)
    return meet(group, 0 if absent else x.shape[0] // (2 if forked else 1), facts, call)


@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, logit_bias: Tensor | None = None, scale: float = 1.0, reduction: str = "mean",
    ignore_index: int | None = -100, label_smoothing: float = 0.0, stats: Literal[False] = False, backend: str = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, logit_bias: Tensor | None = None, scale: float = 1.0, reduction: str = "mean",
    ignore_index: int | None = -100, label_smoothing: float = 0.0, stats: Literal[True], backend: str = "auto",
) -> tuple[Tensor, LossStats]: ...  # fmt: skip
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, logit_bias: Tensor | None = None, scale: float = 1.0, reduction: str = "mean",
    ignore_index: int | None = -100, label_smoothing: float = 0.0, stats: bool, backend: str = "auto",
) -> Tensor | tuple[Tensor, LossStats]: ...  # fmt: skip
@hiding_unknown
def linear_cross_entropy(
    input: Tensor = NOTHING,
    linear_weight: Tensor = NOTHING,
    target: Tensor = NOTHING,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    logit_bias: Tensor | None = None,
    scale: float = 1.0,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    stats: bool = False,
    backend: str = "auto",
    **unknown: Any,
) -> Tensor | tuple[Tensor, LossStats]:
    """Cross-entropy of a linear classifier: logits = scale · (input · linear_weightᵀ + linear_bias) + logit_bias.

    The names are those of ``torch.nn.functional.linear_cross_entropy`` (2.13) without its ``options``, and
    ``logit_bias``, ``scale``, ``stats`` and ``backend``. An input with twice as many rows as the target is a fork: its
    two halves share the target, which is not copied.

    The shape decides how many of the logits (M, K) are in memory at a time:

    - Triton takes fp32, fp16 and bf16. Logits of up to 1/16 of the GPU's memory (5 GiB of 80) are kept for backward, in
      the dtype of the product, and their gradient overwrites them. If the graph is retained, compiled or captured as a
      CUDA graph, the gradient has a buffer of its own, in chunks of rows of 1/64 of the memory (512 rows at least).
      Larger logits are computed in such chunks, and again in backward, which is a third more products. This backend
      cannot be differentiated twice.
    - torch: forward computes the gradient of the logits too, by ``F.cross_entropy``. Up to 1 GiB it is kept for
      backward in their place, and larger ones are computed again there, in chunks of rows.

    Both take statistics and sums in fp32 (fp64 for fp64). Nothing is read at a class index out of range. On a GPU its
    loss is NaN and a device-side assertion fails, as in PyTorch.

    Args:
        input: (M, …, C), floating point.
        linear_weight: (K, C), differentiable: a classifier's weight, computed class embeddings, or the keys of a
            contrastive loss.
        target: class indices (N, …) int64, or probabilities (N, …, K) floating point, with N = M or M = 2N.
        linear_bias: (K,) or None.
        weight: (K,), a factor for each class, or None.
        logit_bias: (K,) or None, differentiable, added to the logits (log class counts in Balanced Softmax; -inf
            switches a class off).
        scale: a number that multiplies the product (1/τ in a contrastive loss). For a learned one multiply the input.
        reduction: "mean" (over the rows that are not ignored, weighted, as ``F.cross_entropy``), "sum" or "none".
        ignore_index: rows with this class index do not count; None is -100.
        label_smoothing: in [0, 1].
        stats: also return loss and accuracies of each stream, without waiting for the device.
        backend: see the module's docstring.

    Returns:
        The loss: a scalar, or (M, …) for "none", in the dtype that eager PyTorch gives without class
            weights (fp32 under autocast); with ``stats`` the pair (loss, :class:`LossStats`).

    Raises:
        TypeError: not tensors, not floating point, class indices that are not int64.
        ValueError: shapes, widths or devices that do not fit, on CPU class indices out of range, no kernel for
            "triton".

    Examples:
        >>> fork, weight = torch.randn(12, 32), torch.randn(3, 32)
        >>> target = torch.tensor([0, 0, 0, 1, 1, 2])  # of 6 samples: the fork has both streams
        >>> fastbf.functional.linear_cross_entropy(fork, weight, target, reduction="none").shape
        torch.Size([12])

    Source: paper section 3.2 (shared classifier); Balanced Softmax: Ren et al., NeurIPS 2020, equation 4.
    """
    if unknown:
        raise TypeError(unexpected("linear_cross_entropy", next(iter(unknown)), names_of(linear_cross_entropy)))
    settings = scale, reduction, ignore_index, label_smoothing, stats
    tensors = input, linear_weight, linear_bias, logit_bias, target, weight
    kinds = type(scale), type(ignore_index), type(label_smoothing), type(stats)
    ignored: Any = -100 if ignore_index is None else ignore_index
    requires_grad = torch.is_grad_enabled(), *[getattr(t, "requires_grad", None) for t in tensors]
    what = repeats.what("linear_cross_entropy", input, backend, *requires_grad, *settings, *kinds)
    if (tape := repeats.find(what, tensors)) is not None:
        if tape.stream_for is not None:  # of kernels: PyTorch's operators refuse a class index out of range themselves
            checks.index_range(target, linear_weight.shape[0], ignored)
        try:
            made, of_streams = tape.again(tape, tensors)
            return (made, LossStats(*of_streams)) if stats else made
        except Exception as error:
            try:
                checks.index_range(target, linear_weight.shape[0], ignored)
            except ValueError as refusal:
                raise refusal from None
            give_up(choose(backend, "linear_cross_entropy", input), "linear_cross_entropy", input.device, error)
    key = signature(input, tensors, backend, *requires_grad, *settings, *kinds)
    known: tuple[Choice, LossOptions] | None = recall(key)
    if known is None:
        checks.classifier(input, linear_weight, linear_bias, weight, logit_bias)
        scale = checks.finite("scale", scale)
        ignore_index = checks.integer("ignore_index", ignored)
        checks.choice("reduction", reduction, ("mean", "sum", "none"))
        label_smoothing = checks.probability("label_smoothing", label_smoothing)
        rows, num_classes = tuple(input.shape[:-1]), linear_weight.shape[0]
        forked = checks.target(target, rows, num_classes, input.device, ignore_index)
        obstacle = _classifier_obstacle(target, weight, logit_bias)
        choice = choose(backend, "linear_cross_entropy", input, linear_weight, obstacle=obstacle)
        options = LossOptions(scale, reduction, ignore_index, label_smoothing, forked, stats)
        remember(key, (choice, options))
    else:
        choice, options = known
        checks.index_range(target, linear_weight.shape[0], options.ignore_index)

    others = {"linear_bias": linear_bias, "weight": weight, "logit_bias": logit_bias}
    loss = None
    if choice.backend == "triton":
        import fastbf.triton_backend.classifier as kernels

        try:
            loss, streams = kernels.linear_cross_entropy(input, linear_weight, target, options, **others, what=what)
        except Exception as error:
            give_up(choice, "linear_cross_entropy", input.device, error)
        what = None  # which is a call of kernels
    if loss is None:
        loss, streams = classifier.linear_cross_entropy(input, linear_weight, target, options, **others, what=what)
    return (loss, LossStats(*streams)) if stats else loss


@suggesting
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    logit_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """As :func:`linear_cross_entropy`, of logits that are there already; by PyTorch on every device.

    Args:
        logits: (M, …, K), floating point.
        target: as there, and so are the others.
        weight: (K,) or None.
        logit_bias: (K,) or None.
        reduction: "mean", "sum" or "none".
        ignore_index: an int.
        label_smoothing: in [0, 1].
        stats: whether to return the statistics.

    Returns:
        The loss, or with ``stats`` the pair (loss, :class:`LossStats`).

    Raises:
        TypeError, ValueError: as :func:`linear_cross_entropy`.

    Examples:
        >>> fastbf.functional.cross_entropy(torch.zeros(4, 2), torch.tensor([0, 1])).item()
        0.6931471824645996
    """
    checks.floating("logits", logits)
    checks.min_rank("logits", logits, 2, "(M, …, K)")
    num_classes = logits.shape[-1]
    for name, t in (("weight", weight), ("logit_bias", logit_bias)):
        checks.shape(name, t, (num_classes,))
    checks.same_device("logits", logits, {"weight": weight, "logit_bias": logit_bias})
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    checks.probability("label_smoothing", label_smoothing)
    forked = checks.target(target, tuple(logits.shape[:-1]), num_classes, logits.device, ignore_index)
    options = LossOptions(1.0, reduction, ignore_index, label_smoothing, forked, stats)
    loss, streams = classifier.cross_entropy(logits, target, options, weight=weight, logit_bias=logit_bias)
    return (loss, LossStats(*streams)) if stats else loss


def _classifier_obstacle(target: Tensor, weight: Tensor | None, logit_bias: Tensor | None) -> str | None:
    """Why the classifier's kernels cannot serve a call on any device; None if they can."""
    for name, t in (("probabilities", target), ("class weights", weight)):
        if t is not None and t.requires_grad:
            return f"the kernels of linear_cross_entropy give {name} no gradient."
    if logit_bias is not None and logit_bias.dtype == torch.float64:
        return "logit_bias is fp64."
    return None
