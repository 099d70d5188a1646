"""How a Function's backward runs that kernels do: not differentiable twice, and a kernel that cannot be built is named.

Importing this imports triton.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from fastbf.backend import unbuilt
from fastbf.kernels.launch import BuildError

Gradients = tuple[Tensor | None, ...]


def once_differentiable(op: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """For the backward of a Function that serves ``op``.

    As ``torch.autograd.function.once_differentiable``, but what it returns refuses a second derivative whatever came
    in: PyTorch's lets one through, as zero, where the incoming gradient is a constant.
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @wraps(backward)
        def run(ctx: object, *grads: Tensor) -> Gradients:
            try:
                with torch.no_grad():
                    found = backward(ctx, *grads)
            except BuildError as error:
                reason = unbuilt(op, grads[0].device, error)
                raise RuntimeError(
                    f"{reason} From now on backend='auto' takes PyTorch for {op}: run the step again."
                ) from error
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
                return _refusing(op, found)
            return found

        return run

    return decorate


def _refusing(op: str, grads: Gradients) -> Gradients:
    """The same gradients; differentiating them raises RuntimeError."""
    text = f"the Triton kernels of {op} cannot be differentiated twice: use backend='torch' for that"
    refuse = torch._C._functions.DelayedError(text.encode(), len(grads))
    return refuse(*(None if grad is None else grad.detach().requires_grad_() for grad in grads))
