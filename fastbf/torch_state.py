"""What surrounds a call: autocast, a compiler, a functional transform."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


_NOTHING = nullcontext()


def _autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    if device not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device):
        return False
    return torch.is_autocast_enabled(device)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast turns x into where it enters a matrix product; None if it leaves x alone."""
    device = x.device.type
    if not _autocasts(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts what a matrix product reads to autocast's dtype where autocast is on, as ``F.linear`` does."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, *others
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))


def norm_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that ``F.layer_norm`` gives on x's device for an input of ``dtype``: autocast on CUDA makes it fp32."""
    return torch.float32 if x.device.type == "cuda" and autocast_dtype(x) is not None else dtype


def no_autocast(x: Tensor) -> AbstractContextManager:
    """What runs under this computes in the dtypes it is given."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if _autocasts(device) else _NOTHING


def traced_as_constant(function: Callable[..., T]) -> Callable[..., T]:
    """``torch.compile`` takes the function's result at the time of tracing, without looking inside.

    What ``torch.compiler.assume_constant_result`` does, which imports the whole compiler, Triton included.
    """
    function._dynamo_marked_constant = True
    return function


@traced_as_constant
def transformed() -> bool:
    """Whether a transform of ``torch.func`` looks on, which sees through PyTorch's own operators only."""
    return torch._C._are_functorch_transforms_active()


def traced() -> bool:
    """Whether a transform of ``torch.func`` looks on, or ``torch.compile``, which sees better through operators too."""
    return torch.compiler.is_compiling() or transformed()


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def donated(x: Tensor) -> bool:
    """Whether the backward that is running may use up what was saved for it: nothing will read that again.

    Not where the graph is retained, where a CUDA graph is captured, which may replay this backward, or under a
    compiler. x: a tensor on the device.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
