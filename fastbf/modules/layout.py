"""Strides of results, which are those of the PyTorch code that a module replaces, so that ``view`` still works."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def like(x: Tensor, source: Tensor, batch_first: bool) -> Tensor:
    """x, of source's shape, with the strides of the sum of source and the result of PyTorch's attention."""
    if source.is_contiguous():
        return x.contiguous()
    first = torch.empty_strided(source.shape, source.stride(), device="meta")
    other = torch.empty_like(first, memory_format=torch.contiguous_format)
    if batch_first:
        other = other.transpose(0, 1).contiguous().transpose(0, 1)
    order = _outermost_first((first + other).stride())
    return x.permute(order).contiguous().permute([order.index(dim) for dim in range(x.dim())])


def _outermost_first(strides: Sequence[int]) -> list[int]:
    """Dimensions by descending stride. An insertion sort, because ``torch.compile`` does not sort symbols."""
    order: list[int] = []
    for dim, stride in enumerate(strides):
        at = 0
        while at < len(order) and strides[order[at]] >= stride:
            at += 1
        order.insert(at, dim)
    return order


def formatted(x: Tensor, source: Tensor) -> Tensor:
    """x in source's memory format, channels last or contiguous, as ``torch.cat`` returns it."""
    if source.dim() in (4, 5) and not source.is_contiguous() and _is_channels_last(source):
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def _is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch takes x for channels last, which may have gaps.

    Strides decide, because transforms of torch.func hide memory formats.
    """
    least = 0
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.shape[dim] == 0 or x.stride(dim) < max(least, 1) or (dim == 0 and least == x.stride(1)):
            return False
        least = x.stride(dim) * x.shape[dim]
    return True
