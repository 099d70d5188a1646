"""An encoder layer's weights in the dtype of its matrix products: cast once a call, for both directions."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastbf.reference import LayerWeights

_ALIGNMENT = 8  # elements: every cast tensor starts at a multiple of 16 bytes
_LINEAR = 8  # of a layer's tensors are the linear layers', the others the norms'


def needs_cast(weights: LayerWeights, dtype: torch.dtype) -> bool:
    """Whether any of the linear layers' tensors has another dtype."""
    return any(w is not None and w.dtype != dtype for w in weights[:_LINEAR])


def _starts(channels: int, width: int) -> list[int]:
    """Where the linear layers' tensors start in a buffer that holds all of them, weights first, and where it ends."""
    sizes = [3 * channels * channels, channels * channels, width * channels, width * channels]
    sizes += [3 * channels, channels, width, channels]
    return list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))


def cast_size(channels: int, width: int) -> int:
    """Elements that :func:`cast` fills, for C channels and a feed-forward of F."""
    return _starts(channels, width)[-1]


def cast(weights: LayerWeights, buffer: Tensor, also: dict[Tensor, Tensor]) -> LayerWeights:
    """The weights with the linear layers' tensors cast into ``buffer`` (1-D), the norms' as they are.

    One launch where all that is cast is dense and of one dtype. Fills the keys of ``also`` with their values, too.
    """
    starts = _starts(weights.out_proj_weight.shape[0], weights.linear1_weight.shape[0])
    views: list[Tensor | None] = [None] * _LINEAR
    for start, i in zip(starts, (0, 2, 4, 6, 1, 3, 5, 7), strict=False):
        w = weights[i]
        views[i] = None if w is None else buffer[start : start + w.numel()].view(w.shape)
    given = [i for i, view in enumerate(views) if view is not None]
    torch._foreach_copy_([*(views[i] for i in given), *also.keys()], [*(weights[i] for i in given), *also.values()])
    return LayerWeights(*views, *weights[_LINEAR:])


class Factors(NamedTuple):
    """The weights that backward multiplies with."""

    in_proj: Tensor  # (3C, C), in the products' dtype, as the next three
    out_proj: Tensor  # (C, C)
    linear1: Tensor  # (F, C)
    linear2: Tensor  # (C, F)
    norm1: Tensor  # (C,)
    norm2: Tensor  # (C,)


def cast_factors(buffer: Tensor, width: int, norm1: Tensor, norm2: Tensor) -> Factors:
    """:class:`Factors` from the buffer that :func:`cast` filled, for a feed-forward of F = ``width``."""
    channels = norm1.shape[0]
    starts = _starts(channels, width)
    shapes = ((3 * channels, channels), (channels, channels), (width, channels), (channels, width))
    pairs = zip(starts, shapes, strict=False)
    return Factors(*(buffer[start : start + a * b].view(a, b) for start, (a, b) in pairs), norm1, norm2)
