"""How many elements the torch backend works on at a time, and the dtypes of sums and losses."""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of logits in a chunk. On CPU a chunk stays in the outer caches. On a GPU it bounds memory, and is large enough
# for a launch to fill the machine.
_CPU_BYTES = 8 << 20
_GPU_BYTES = 256 << 20


def chunk_elements(device: torch.device, dtype: torch.dtype) -> int:
    """Elements of ``dtype`` in a chunk."""
    return (_CPU_BYTES if device.type == "cpu" else _GPU_BYTES) // dtype.itemsize


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and statistics: fp32, or fp64 for fp64 inputs."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def widened(x: Tensor) -> Tensor:
    """x in :func:`compute_dtype`."""
    return x if x.dtype.itemsize >= 4 else x.float()


def loss_dtype(dtype: torch.dtype, target: Tensor, logit_bias: Tensor | None) -> torch.dtype:
    """The dtype that eager PyTorch's cross-entropy gives without autocast, for products of ``dtype``."""
    for t in (target, logit_bias):
        if t is not None and t.is_floating_point():
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype
