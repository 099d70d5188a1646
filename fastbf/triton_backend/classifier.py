"""The shared classifier's loss on kernels, between matrix products.

The logits are kept once, in the dtype of their product, if they take at most a share of the device's memory. Larger
ones are computed in chunks of rows, and again in backward. The gradient overwrites kept logits. If these are needed
once more, because the graph is retained, it is computed in chunks of rows in a buffer of its own.

Source: docs/design.md, the mathematics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from fastbf import tape
from fastbf.kernels import cross_entropy
from fastbf.kernels.cross_entropy import Options
from fastbf.kernels.launch import operator
from fastbf.precision import loss_dtype
from fastbf.reference import LossOptions
from fastbf.repeats import Tape, What
from fastbf.torch_state import autocast_dtype, differentiated, donated, no_autocast
from fastbf.triton_backend.building import prepared
from fastbf.triton_backend.functions import by_kernels, dense, dtypes_of, empty_like, limits_of, narrowed, product_dtype
from fastbf.triton_backend.launches import noting
from fastbf.triton_backend.matmul import add_weight_gradient, linear_into, product_into

__all__ = ["again", "linear_cross_entropy"]

#: Shares of the device's memory: for logits that are kept for backward (5 GiB of 80), and for a chunk of logits or of
#: their gradient (1.25 GiB).
KEPT, CHUNK = 1 / 16, 1 / 64
#: The least number of rows in a chunk. Each chunk reads the whole weight and adds to its whole gradient.
MIN_ROWS = 512


class Head(NamedTuple):
    """A call without its tensors."""

    scale: float  #: this and the next five are those of ``LossOptions``
    reduction: str
    ignore_index: int
    label_smoothing: float
    forked: bool
    stats: bool
    keep: bool  #: whether the logits are kept for backward
    compute: torch.dtype  #: of the matrix products
    loss: torch.dtype
    shape: torch.Size  #: of the input, (M, …, C)

    def options(self, bias: Tensor | None, weight: Tensor | None, logit_bias: Tensor | None) -> Options:
        """The options of both kernels."""
        return Options(weight, bias, logit_bias, self.scale, self.ignore_index, self.label_smoothing)

    def streams(self) -> int:
        """2 for a fork, else 1."""
        return 2 if self.forked else 1


def keeps(rows: int, num_classes: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the logits of a call are kept for backward."""
    return rows * num_classes * dtype.itemsize <= KEPT * limits_of(device).memory


def _chunks(x: Tensor, num_classes: int) -> list[slice]:
    """Chunks of rows: as few as memory allows, of about the same size."""
    rows, most = x.shape[0], max(MIN_ROWS, int(CHUNK * limits_of(x.device).memory) // (num_classes * x.dtype.itemsize))
    if rows <= most:
        return [slice(0, rows)]
    step = -(-rows // -(-rows // most))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _buffer(x: Tensor, num_classes: int, rows: int) -> Tensor:
    """Memory for the logits of ``rows`` rows, or for their gradient."""
    return torch.empty(rows, cross_entropy.padded(num_classes, x.dtype), dtype=x.dtype, device=x.device)


class Saved(NamedTuple):
    """What forward saves for backward."""

    x: Tensor  #: (M, C) in the products' dtype
    matrix: Tensor  #: (K, C), the classifier's weight in the same dtype
    z: Tensor  #: (M, K + padding), the products; no rows if they are not kept
    numbers: Tensor  #: fp32, 1-D: what :func:`_parts` tells apart


#: How many numbers of :class:`Saved` are not those of rows: whose addresses remain multiples of 16 bytes.
_FEW = 16


def _parts(numbers: Tensor, streams: int) -> tuple[Tensor, Tensor, Tensor]:
    """The total (1,) that a mean divides by, statistics (3, streams), and the rows' numbers (6, M).

    The last two are ``STATS`` and ``ROW`` of ``kernels/cross_entropy.py``.
    """
    stats = numbers[4 : 4 + cross_entropy.STATS * streams].view(cross_entropy.STATS, streams)
    return numbers[:1], stats, numbers[_FEW:].view(cross_entropy.ROW, -1)


def forward(
    x: Tensor, matrix: Tensor, target: Tensor, options: Options, head: Head
) -> tuple[Tensor, Tensor | None, Saved]:  # fmt: skip
    """The loss of logits = scale · (x · matrixᵀ + bias) + logit_bias, statistics, and what is saved for backward.

    Args:
        x: (M, C), contiguous.
        matrix: (K, C), the classifier's weight.
        target: (N,) int64 or (N, K) floating point, M = N or 2N.
        options: of the loss, with its tensors.
        head: the call.
    """

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    rows, whole = x.shape[0], head.reduction != "none"
    loss = empty(*() if whole else (rows,), dtype=head.loss)
    numbers = empty(_FEW + cross_entropy.ROW * rows)
    total, unasked, of_rows = _parts(numbers, head.streams())
    stats = empty(*unasked.shape) if head.stats else None
    with no_autocast(x):
        x, matrix = narrowed((x, matrix), head.compute)
        kept = _buffer(x, matrix.shape[0], rows if head.keep else 0)
        _forward_rows(x, matrix, target, options, head.stats, kept, of_rows)
    if not whole:
        loss.copy_(of_rows[0])
    cross_entropy.finish(
        of_rows, streams=head.streams(), mean=head.reduction == "mean", loss=loss if whole else total, total=total,
        stats=unasked if stats is None else stats,
    )  # fmt: skip
    return loss, stats, Saved(x, matrix, kept, numbers)


@operator("kept", "of_rows")
def _forward_rows(
    x: Tensor, matrix: Tensor, target: Tensor, options: Options, count: bool, kept: Tensor, of_rows: Tensor
) -> None:
    """Writes the numbers of every row, and the products where ``kept`` has room for them.

    All chunks are one operator. A compiler would save each chunk's products for backward, and unroll the loop.
    """
    keep, num_classes = len(kept) > 0, matrix.shape[0]
    chunks = [slice(0, x.shape[0])] if keep else _chunks(x, num_classes)
    room = kept if keep else _buffer(x, num_classes, chunks[0].stop)
    for part in chunks:
        z = room[: part.stop - part.start, :num_classes]
        linear_into(x[part], matrix, None, z)
        cross_entropy.forward(z, target, options, count=count, first=part.start, of_rows=of_rows)


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    matrix: bool
    bias: bool
    logit_bias: bool

    def sums(self) -> bool:
        """Whether the logits' gradient summed over rows is wanted."""
        return self.bias or self.logit_bias


class ClassifierGradients(NamedTuple):
    """What backward writes to, None where it is not wanted."""

    x: Tensor | None  #: in x's dtype
    matrix: Tensor | None  #: in fp32 or the products' dtype
    sums: Tensor | None  #: fp32 (K,): the logits' gradient summed over rows


def backward(
    grad: Tensor, saved: Saved, target: Tensor, options: Options, head: Head, wanted: Wanted,
    dtypes: tuple[torch.dtype, torch.dtype], donated: bool = False,
) -> ClassifierGradients:  # fmt: skip
    """The gradients of one call.

    Args:
        grad: of the loss, () or (M,), contiguous.
        saved: as forward returned it.
        target, options, head: as in forward.
        wanted: which gradients; at least one.
        dtypes: of x's gradient, and of the weight's, fp32 or that of the products.
        donated: whether the gradient of the products may overwrite them.
    """

    def empty(shape: torch.Size | tuple[int], dtype: torch.dtype, needed: bool) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=grad.device) if needed else None

    grads = ClassifierGradients(
        empty(saved.x.shape, dtypes[0], wanted.x),
        empty(saved.matrix.shape, dtypes[1], wanted.matrix),
        empty((saved.matrix.shape[0],), torch.float32, wanted.sums()),
    )
    room = saved.z if donated else None  # the kernel writes to each element after it has read it
    with no_autocast(grad):
        _backward_rows(grad, saved, target, options, head.reduction == "mean", room, grads)
    return grads


@operator("room", "grads_x", "grads_matrix", "grads_sums")
def _backward_rows(
    grad: Tensor, saved: Saved, target: Tensor, options: Options, mean: bool, room: Tensor | None,
    grads: ClassifierGradients,
) -> None:  # fmt: skip
    """Writes the gradients, with that of the products in ``room``, (M, K + padding), or in chunks of rows.

    All chunks are one operator, as in forward.
    """
    (x, matrix, kept, numbers), num_classes = saved, saved.matrix.shape[0]
    total, _, of_rows = _parts(numbers, 1)
    chunks = _chunks(x, num_classes) if room is None else [slice(0, x.shape[0])]
    buffer = _buffer(x, num_classes, chunks[0].stop) if room is None else room
    d_matrix = grads.matrix
    if d_matrix is not None and len(chunks) > 1:
        d_matrix = d_matrix if d_matrix.dtype == torch.float32 else empty_like(d_matrix, torch.float32)
    for rows in chunks:
        dz = buffer[: rows.stop - rows.start, :num_classes]
        logits = kept[rows, :num_classes] if len(kept) else dz
        if not len(kept):
            linear_into(x[rows], matrix, None, logits)
        first = rows.start == 0
        part = grads.sums if first or grads.sums is None else torch.empty_like(grads.sums)
        cross_entropy.backward(
            grad, logits, target, of_rows, options, total=total if mean else None, first=rows.start, dz=dz, sums=part
        )  # fmt: skip
        if grads.x is not None:
            product_into(dz, matrix, grads.x[rows])
        if d_matrix is not None and first:
            product_into(dz.t(), x[rows], d_matrix)
        elif d_matrix is not None:  # the sum over several chunks is kept in fp32
            add_weight_gradient(d_matrix, dz, x[rows])
        if grads.sums is not None and part is not None and part is not grads.sums:
            grads.sums.add_(part)
    if grads.matrix is not None and d_matrix is not None and d_matrix is not grads.matrix:
        grads.matrix.copy_(d_matrix)


class _Classifier(Function):
    """Returns the loss and, without gradient, each stream's loss and accuracies (3, streams) if they are asked for.

    Saves, in the products' dtype, x, the weight and the products unless they are too large; and six fp32 numbers a row.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None, logit_bias: Tensor | None, target: Tensor,
        weight: Tensor | None, head: Head, what: What | None, found: Tape | None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        inputs = x, matrix, bias, logit_bias, target, weight
        made = tape.play(what, inputs, None, found)
        if made is None:
            with noting(what, inputs, None, head, again) as made:
                made += _results(x, matrix, target, head.options(bias, weight, logit_bias), head)
        loss, stats, *saved = made
        ctx.save_for_backward(*saved, bias, weight, logit_bias)
        ctx.head, ctx.dtypes = head, dtypes_of(inputs) if found is None else found.dtypes
        if stats is None:
            return loss
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)  # zeros for the statistics would cost a launch
        return loss, stats

    @staticmethod
    @by_kernels("linear_cross_entropy")
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        head, needs, dtypes, saved = ctx.head, ctx.needs_input_grad, ctx.dtypes, ctx.saved_tensors
        if grad is None:  # that of the statistics alone
            return (None,) * len(needs)
        grad, overwrites = grad.contiguous(), head.keep and donated(grad)
        if overwrites:  # autograd then knows that the logits are overwritten, even if this fails half-way
            grad.data_ptr()  # which a batch of gradients, that no kernel takes, does not have
            increment_version(Saved(*saved[:4]).z)

        what = "linear_cross_entropy backward", head, needs, dtypes, overwrites
        inputs = grad, *saved
        made = tape.play(what, inputs)
        if made is None:
            with noting(what, inputs) as made:
                made += _gradients(inputs, head, needs, dtypes, overwrites)
        return tuple(made)


def _results(
    x: Tensor, matrix: Tensor, target: Tensor, options: Options, head: Head
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """What :func:`forward` returns, with x itself where it was not copied; and the target, contiguous.

    x is (M, …, C), target (N, …) or (N, …, K), returned as (N,) or (N, K).
    """
    target = (target.reshape(-1, len(matrix)) if target.is_floating_point() else target.flatten()).contiguous()
    loss, stats, saved = forward(x.flatten(0, -2).contiguous(), matrix, target, options, head)
    if x.is_contiguous() and x.dtype == head.compute:
        saved = saved._replace(x=x)  # autograd looks after changes in place of x, and not of a view that was made here
    return loss, stats, *saved, target


def _gradients(
    tensors: tuple[Any, ...], head: Head, needs: tuple[bool, ...], dtypes: tuple[torch.dtype | None, ...],
    donated: bool,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of forward's arguments, None where they are not needed.

    Args:
        tensors: the loss's gradient, and what forward saves.
        needs: of forward's arguments.
        dtypes: of its tensors.
        donated: whether the gradient of the products may overwrite them.
    """
    grad, x, *rest, target, bias, weight, logit_bias = tensors
    wanted = Wanted(*needs[:4])
    x_dtype, matrix_dtype, bias_dtype, logit_bias_dtype, *_ = dtypes
    assert x_dtype is not None
    assert matrix_dtype is not None
    grads = backward(
        grad, Saved(x.flatten(0, -2), *rest), target, head.options(bias, weight, logit_bias), head, wanted,
        (x_dtype, product_dtype(matrix_dtype, head.compute)), donated,
    )  # fmt: skip
    d_matrix = None if grads.matrix is None else grads.matrix.to(matrix_dtype)
    d_bias = d_logit_bias = None
    if grads.sums is not None and wanted.bias:
        d_bias = (grads.sums if head.scale == 1 else grads.sums * head.scale).to(bias_dtype)
    if grads.sums is not None and wanted.logit_bias:
        d_logit_bias = grads.sums.to(logit_bias_dtype)
    d_x = None if grads.x is None else grads.x.view(head.shape)
    return [d_x, d_matrix, d_bias, d_logit_bias, None, None, None, None, None]


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, options: LossOptions, *, linear_bias: Tensor | None,
    weight: Tensor | None, logit_bias: Tensor | None, what: What | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """The loss, and each stream's loss, accuracy and unadjusted accuracy if ``stats``.

    A tape of the call is for calls of ``what``, and :func:`again` makes them by it.
    """
    autocasts = autocast_dtype(input)
    compute, num_classes = autocasts or input.dtype, linear_weight.shape[0]
    keep = differentiated(input, linear_weight, linear_bias, logit_bias)
    keep = keep and keeps(input.shape[:-1].numel(), num_classes, compute, input.device)
    loss_type = torch.float32 if autocasts else loss_dtype(input.dtype, target, logit_bias)
    head = Head(*options, keep=keep, compute=compute, loss=loss_type, shape=input.shape)
    linear_bias, weight, logit_bias = dense(linear_bias, weight, logit_bias)
    what = what or ("linear_cross_entropy", head)
    given = input, linear_weight, linear_bias, logit_bias, target, weight, head, what, None
    apply, ahead = prepared(_Classifier, given)
    with ahead:
        return _told_apart(apply(*given), head)


def again(found: Tape, tensors: tuple[Any, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A call that a tape fits, given input, linear_weight, linear_bias, logit_bias, target and weight."""
    given = *tensors, found.of, None, found
    apply, ahead = prepared(_Classifier, given)
    with ahead:
        return _told_apart(apply(*given), found.of)


def _told_apart(made: Any, head: Head) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, and the statistics that were asked for, from what the Function returns."""
    loss, stats = made if head.stats else (made, None)
    if head.reduction == "none":
        loss = loss.view(head.shape[:-1])
    return loss, () if stats is None else stats.unbind()
