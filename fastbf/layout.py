"""The order of results in memory: that of the PyTorch code that a module replaces, so that ``view`` goes on working."""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def like(x: Tensor, source: Tensor) -> Tensor:
    """x, of source's shape, with the strides of ``torch.empty_like(source)``, as a sum has that begins with source."""
    if source.is_contiguous():
        return x.contiguous()
    strides = torch.empty_like(source, device="meta").stride()
    order = sorted(range(x.dim()), key=lambda dim: -strides[dim])
    back = sorted(range(x.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


def formatted(x: Tensor, source: Tensor) -> Tensor:
    """x in source's memory format, channels last or contiguous, as ``torch.cat`` gives it."""
    channels_last = _CHANNELS_LAST.get(source.dim())
    if channels_last is None or source.is_contiguous() or not source.is_contiguous(memory_format=channels_last):
        return x.contiguous()
    return x.contiguous(memory_format=channels_last)
