"""How a Function's backward runs that cannot be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def once_differentiable(refusal: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """For the backward of a Function; ``refusal`` is what a second derivative raises RuntimeError with.

    As ``torch.autograd.function.once_differentiable``, but what it returns refuses a second derivative whatever came
    in: PyTorch's lets one through, as zero, where the incoming gradient is a constant.
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @wraps(backward)
        def run(ctx: object, *grads: Tensor) -> Gradients:
            with torch.no_grad():
                found = backward(ctx, *grads)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
                return _refusing(refusal, found)
            return found

        return run

    return decorate


def _refusing(refusal: str, grads: Gradients) -> Gradients:
    """The same gradients; differentiating them raises RuntimeError."""
    refuse = torch._C._functions.DelayedError(refusal.encode(), len(grads))
    return refuse(*(None if grad is None else grad.detach().requires_grad_() for grad in grads))
