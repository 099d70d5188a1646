"""What the autograd Functions over kernels share: how a backward fails, and rows of channels in memory order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fastbf.autograd import Gradients, once_differentiable
from fastbf.backend import unbuilt
from fastbf.kernels.failures import BuildError
from fastbf.kernels.limits import Limits, device_limits
from fastbf.kernels.rows import Rows
from fastbf.torch_state import copy_all, is_batched, traced_as_constant


def by_kernels(op: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Decorates the backward of a Function of ``op``; a second derivative or an unbuilt kernel raises RuntimeError."""

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @wraps(backward)
        def run(ctx: Any, *grads: Tensor) -> Gradients:
            try:
                return backward(ctx, *grads)
            except BuildError as error:
                reason = unbuilt(op, grads[0].device, error)
                raise RuntimeError(
                    f"{reason} From now on backend='auto' takes PyTorch for {op}: run the step again."
                ) from error
            except RuntimeError as error:  # a batch of gradients has no address for a kernel to read
                if not is_batched(grads[0]):
                    raise
                raise RuntimeError(
                    f"the Triton kernels of {op} take one gradient at a time: use backend='torch' for is_grads_batched "
                    "and jacobian(vectorize=True)"
                ) from error

        twice = f"the Triton kernels of {op} cannot be differentiated twice: use backend='torch', on one rank, for that"
        return once_differentiable(twice)(run)

    return decorate


@traced_as_constant
def limits_of(device: torch.device) -> Limits:
    """The limits of a device."""
    return device_limits(device)


def product_dtype(dtype: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """The dtype in which the gradient of a weight of ``dtype`` leaves its product."""
    return torch.float32 if dtype == torch.float32 else compute


def narrowed(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Any]:
    """The tensors in ``dtype``: themselves, or copies, by one launch if these are of one dtype and dense."""

    def room(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dtype == dtype else torch.empty(t.shape, dtype=dtype, device=t.device)

    found = [*map(room, tensors)]
    copies = [(to, t) for to, t in zip(found, tensors, strict=True) if to is not None and t is not None and to is not t]
    if copies:
        copy_all([to for to, _ in copies], [t for _, t in copies])
    return found


def dtypes_of(tensors: Sequence[Tensor | None]) -> tuple[torch.dtype | None, ...]:
    """The dtype of each."""
    return tuple([None if t is None else t.dtype for t in tensors])


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of x's shape."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def dense(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors, contiguous."""
    return tuple([None if t is None else t.contiguous() for t in tensors])  # a list is quicker than a generator


def order_of(x: Tensor) -> Rows:
    """The rows of x (N, …, C) in the order that it has in memory, (N, L, C) or (L, N, C)."""
    samples = x.shape[0]
    if x.dim() == 2:
        return Rows(samples, 1, False)
    x = x.reshape(samples, -1, x.shape[-1])
    return Rows(samples, x.shape[1], not x.is_contiguous() and x.stride(0) < x.stride(1))


def as_rows(x: Tensor, rows: Rows) -> Tensor:
    """x (N, …, C) as a matrix [R, C] in the order of ``rows``, contiguous."""
    if x.dim() == 2:
        return x.contiguous()
    x = x.reshape(rows.samples, rows.positions, x.shape[-1])
    return (x.transpose(0, 1) if rows.position_major else x).reshape(rows.total(), x.shape[-1]).contiguous()


def from_rows(matrix: Tensor, rows: Rows, shape: torch.Size) -> Tensor:
    """A matrix in the order of ``rows`` → (N, …, C), or a fork (2N, …, C); a view where … is one dimension."""
    if len(shape) == 2:
        return matrix
    if not rows.position_major:
        return matrix.view(-1, *shape[1:])
    return matrix.view(rows.positions, -1, shape[-1]).transpose(0, 1).reshape(-1, *shape[1:])
