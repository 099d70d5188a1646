"""An encoder layer's weights in the dtype of its matrix products: cast once a call, for both directions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastbf.reference import LayerWeights
from fastbf.torch_state import copy_all

_ALIGNMENT = 8  # elements: every cast tensor starts at a multiple of 16 bytes
_LINEAR = 8  # tensors of the linear layers; those of the norms follow


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


def cast(weights: LayerWeights, buffer: Tensor, others: Sequence[tuple[Tensor, Tensor]]) -> LayerWeights:
    """The weights with the linear layers' tensors cast into ``buffer`` (1-D), the norms' as they are.

    Copies ``others``, pairs of target and source, too. One launch if all sources are dense and of one dtype.
    """
    starts = _starts(weights.out_proj_weight.shape[0], weights.linear1_weight.shape[0])
    views: list[Tensor | None] = [None] * _LINEAR
    targets, sources = [to for to, _ in others], [t for _, t in others]
    for start, i in zip(starts, (0, 2, 4, 6, 1, 3, 5, 7), strict=False):
        w = weights[i]
        if w is not None:
            views[i] = view = buffer[start : start + w.numel()].view(w.shape)
            targets.append(view)
            sources.append(w)
    copy_all(targets, sources)
    return LayerWeights(*views, *weights[_LINEAR:])  # type: ignore[arg-type]


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
    in_proj, out_proj, linear1, linear2 = (buffer[start : start + a * b].view(a, b) for start, (a, b) in pairs)
    return Factors(in_proj, out_proj, linear1, linear2, norm1, norm2)
