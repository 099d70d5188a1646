"""The kernels of a call and of its backward, built before the first of them is launched.

Both directions run once with launches that are only listed, on memory that nothing has written to. Allocations and
matrix products are made. What is listed is built side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastbf.autograd import applying
from fastbf.kernels import launch
from fastbf.torch_state import unwatched

_NOTHING = nullcontext()


class _Context:
    """What a Function's two directions hand on."""

    def __init__(self, needs: Sequence[bool]) -> None:
        self.needs_input_grad = tuple(needs)
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.constant: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.constant = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass


def prepared(
    function: type[Function], args: Sequence[Any], built: bool = False
) -> tuple[Callable[..., Any], AbstractContextManager[object]]:  # fmt: skip
    """``function.apply``, no transform of ``torch.func`` being active, and a context to call it in with ``args``.

    Unless all is ``built``, the first launch without a kernel builds those of both directions. A kernel of backward
    that is refused so raises BuildError in forward.
    """
    if torch.compiler.is_compiling():
        return lambda *given: function.apply(*_distinct(given)), _NOTHING
    apply = applying(function, args[0])
    return apply, _NOTHING if built else launch.ahead(build, function, torch.is_grad_enabled(), args)


def _distinct(args: Sequence[Any]) -> list[Any]:
    """The arguments, repeated tensors as views: ``torch.compile`` takes no Function with the same tensor twice."""
    again = [isinstance(a, Tensor) and any(a is other for other in args[:i]) for i, a in enumerate(args)]
    return [a.view_as(a) if repeated else a for a, repeated in zip(args, again, strict=True)]


def build(function: type[Function], differentiates: bool, args: Sequence[Any]) -> None:
    """Builds what the Function launches, and its backward if autograd records.

    Raises:
        BuildError: a compiler or the device refuses a kernel.
    """
    with suppress(torch.OutOfMemoryError):  # kernels are then built as they are launched
        launch.build(_listed(function, differentiates, args))


def _listed(function: type[Function], differentiates: bool, args: Sequence[Any]) -> launch.Plan:
    needs = [differentiates and isinstance(a, Tensor) and a.requires_grad for a in args]
    context: Any = _Context(needs)
    with unwatched(), torch.no_grad(), launch.planned() as plan:  # what a plan multiplies is no part of the call
        results = function.forward(context, *(a.detach() if isinstance(a, Tensor) else a for a in args))
        if any(needs):
            results = results if isinstance(results, tuple) else (results,)
            constant = {id(t) for t in context.constant}
            function.backward(context, *(None if id(t) in constant else torch.empty_like(t) for t in results))
    return plan
