"""Strides of results, which are those of the PyTorch code that a module replaces, so that ``view`` still works."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def like(x: Tensor, source: Tensor) -> Tensor:
    """x, of source's shape, with the strides of ``torch.empty_like(source)``, which a sum source + … has."""
    if source.is_contiguous():
        return x.contiguous()
    order = _outermost_first(torch.empty_like(source, device="meta").stride())
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
    # Strides decide, because transforms of torch.func hide memory formats.
    if source.dim() in (4, 5) and not source.is_contiguous() and source.movedim(1, -1).is_contiguous():
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()
