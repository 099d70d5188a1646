"""What surrounds a call: autocast, a compiler, a functional transform."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast turns x into where it enters a matrix product; None if it leaves x alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def no_autocast(x: Tensor) -> AbstractContextManager:
    """What runs under this computes in the dtypes it is given."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def traced() -> bool:
    """Whether ``torch.compile`` or a transform of ``torch.func`` looks on.

    Both see through PyTorch's own operators better than through an autograd Function.
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
