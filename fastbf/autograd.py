"""How Functions are applied, those that can be differentiated once, and gradients inside of a Function's forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from fastbf.torch_state import outlived

Gradients = tuple[Tensor | None, ...]


def applying(function: type[Function], first: Any) -> Callable[..., Any]:
    """``function.apply``, no transform of ``torch.func`` being active, for arguments of which this is the first."""
    of_base: Any = super(Function, function)  # Function's own looks at every argument for a transform
    apply: Callable[..., Any] = function.apply if outlived(first) else of_base.apply
    return apply


def once_differentiable(refusal: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Decorates the backward of a Function; a second derivative raises RuntimeError with the text ``refusal``.

    ``torch.autograd.function.once_differentiable`` raises only where the incoming gradient requires grad. If that is a
    constant, a second derivative is silently zero.
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @wraps(backward)
        def run(ctx: Any, *grads: Tensor) -> Gradients:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                found = backward(ctx, *grads)
            if torch.compiler.is_compiling():
                return found
            # create_graph=True: autograd records what is done with these gradients.
            leaves = (None if grad is None else grad.detach().requires_grad_() for grad in found)
            return _Refusing.apply(refusal, *leaves)

        return run

    return decorate


@contextmanager
def recording(enabled: bool) -> Iterator[None]:
    """The context of operators whose gradient a Function's forward takes at once.

    Hooks of the user's on saved tensors, such as those of checkpointing, are not for what is saved here.
    """
    with torch.set_grad_enabled(enabled), saved_tensors_hooks(_itself, _itself):
        yield


def _itself(x: Tensor) -> Tensor:
    return x


class _Refusing(Function):
    """Returns gradients as they are. A derivative of these raises RuntimeError."""

    @staticmethod
    def forward(ctx: Any, refusal: str, *grads: Tensor | None) -> Gradients:
        ctx.refusal = refusal
        # Detached, because autograd would make views of the inputs, which cannot be changed in place.
        return tuple(None if grad is None else grad.detach() for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        raise RuntimeError(ctx.refusal)
