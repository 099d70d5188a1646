"""CUDA-graph capture of a training step's forward and backward, on PyTorch's own capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils import _pytree as pytree

from fastbf import checks
from fastbf.cuda_graph_inputs import Used, observed

CAPTURABLE = "cuda"


def make_graphed(callable: Callable[..., Any], sample_args: Sequence[Tensor]) -> Callable[..., Any]:
    """Captures ``callable``'s forward and backward as CUDA graphs and replays them when a call matches.

    ``fastbf.make_graphed(lambda x, y: classifier.loss(former(x), y), (x, y))`` makes a step of a training loop from
    BatchFormer to the loss two graphs. Parameters are found by running the callable; each replay draws its dropout
    afresh. Calls that differ from the captured one in shapes, dtypes or devices (a ragged last batch), in autocast, in
    a module's mode or dropout rate or in which parameters are trained, and calls after parameters of a module that the
    callable calls were replaced or moved in memory (``module.half()``), run eagerly.

    Results and the gradients of arguments are the caller's own. Parameters' gradients lie in the graph's memory: those
    in ``.grad`` are copied before a later backward would overwrite them, so that accumulating over steps is right; what
    ``torch.autograd.grad`` returned for a parameter lasts until the next backward. Backward must come before the next
    call, as the graph holds the activations of one.

    Args:
        callable: an ``nn.Module`` or a function that takes and returns tensors, or nested containers of tensors it
            returns. It runs a few times on the sample arguments before capture. Of a module the ``forward`` is replaced
            and the module returned; copies and pickles of it run eagerly.
        sample_args: tensors of the shapes, dtypes, device and ``requires_grad`` of the calls to come; copied.

    Returns:
        The graphed callable; on CPU, the callable unchanged.

    Raises:
        TypeError: sample arguments or results that are not tensors.
        ValueError: no sample arguments, arguments or parameters on several devices, hooks on parameters or on modules
            inside, which would run at capture only; ``DistributedDataParallel`` inside, which must stay outside.
        RuntimeError: what PyTorch cannot capture (a wait for the device, such as ``.item()``); a backward that comes
            after a later call.

    Source: ``torch.cuda.make_graphed_callables``; DESIGN section 3.
    """
    if not sample_args:
        raise ValueError("sample_args must hold at least one tensor, got none")
    first = checks.tensor("sample_args[0]", sample_args[0])
    rest = {f"sample_args[{i}]": checks.tensor(f"sample_args[{i}]", x) for i, x in enumerate(sample_args)}
    checks.same_device("sample_args[0]", first, rest)
    if first.device.type != CAPTURABLE:
        return callable

    module = callable if isinstance(callable, nn.Module) else None
    eager = callable if module is None else module.forward
    args = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in sample_args)
    graphed = _Graphed(eager, module, args)
    if module is None:
        return graphed
    module.forward = graphed
    return module


class _Graphed:
    """The captured callable, its inputs, and what a call must have in common with the captured one."""

    def __init__(self, eager: Callable[..., Any], module: nn.Module | None, args: tuple[Tensor, ...]) -> None:
        self.eager, self.module = eager, module
        self.used: Used = observed(eager, module, args)
        self.args, self.parameters = args, self.used.leaves
        self.calls = 0
        self.state = self._state(args)
        self.wants_grad = torch.is_grad_enabled()
        with _without_autocast_cache(), _explained():
            self.replay = torch.cuda.make_graphed_callables(
                lambda *inputs: eager(*inputs[: len(args)]), (*args, *self.parameters), allow_unused_input=True
            )
            self.addresses = self._gradients()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or not self._matches(args):
            return self.eager(*args, **kwargs)
        self.calls += 1
        inputs = (_Input.apply(x) if x.requires_grad and x.is_leaf else x for x in args)
        out, structure = pytree.tree_flatten(self.replay(*inputs, *self.parameters))
        return pytree.tree_unflatten(_Results.apply(self, *out), structure)

    def _matches(self, args: tuple[Any, ...]) -> bool:
        return (
            len(args) == len(self.args)
            and all(map(_fits, args, self.args))
            and self.wants_grad >= torch.is_grad_enabled()
            and self._state(args) == self.state
        )

    def _state(self, args: tuple[Tensor, ...]) -> tuple:
        """All but the arguments that a captured kernel depends on."""
        kind = args[0].device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        return autocast, self.used.state()

    def _gradients(self) -> list[int | None]:
        """Where the graph leaves each parameter's gradient."""
        out = [o for o in pytree.tree_leaves(self.replay(*self.args, *self.parameters)) if o.requires_grad]
        if not out or not self.parameters:
            return [None] * len(self.parameters)
        found = torch.autograd.grad(out, self.parameters, [torch.zeros_like(o) for o in out], allow_unused=True)
        return [None if grad is None else grad.data_ptr() for grad in found]

    def keep_gradients(self) -> None:
        """Moves parameters' gradients out of the graph's memory, where the next backward would overwrite them."""
        for parameter, address in zip(self.parameters, self.addresses, strict=True):
            if parameter.grad is not None and parameter.grad.data_ptr() == address:
                parameter.grad = parameter.grad.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        copy = memo.get(id(self.module))
        return self if copy is None else MethodType(type(copy).forward, copy)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self.module is None:
            raise TypeError("a graphed function cannot be pickled: a CUDA graph lives in one process")
        return getattr, (self.module, "forward")


class _Input(Function):
    """Its argument; the gradient in memory of its own."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> Tensor | None:
        return None if grad is None else grad.clone()


class _Results(Function):
    """What a replay returned, in memory of its own; its backward is the first to run, before the graph's."""

    @staticmethod
    def forward(ctx, graphed: _Graphed, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.graphed, ctx.call = graphed, graphed.calls
        copies = tuple(x.clone() for x in results)
        differentiable = graphed.used.differentiable
        ctx.mark_non_differentiable(*(x for x, of in zip(copies, differentiable, strict=True) if not of))
        return copies

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.call != ctx.graphed.calls:
            raise RuntimeError(
                "backward came after a later call of the graphed callable, whose activations took the place of this "
                "one's: run backward before the next call, or do not graph it"
            )
        ctx.graphed.keep_gradients()
        return None, *grads


def _fits(x: Any, sample: Tensor) -> bool:
    if not isinstance(x, Tensor) or x.requires_grad > sample.requires_grad:
        return False
    return x.shape == sample.shape and x.dtype == sample.dtype and x.device == sample.device


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Casts of weights must be in the graph, rather than remembered from before it."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "the callable cannot be captured as a CUDA graph: it must not wait for the device (.item(), .cpu(), shapes "
            f"that depend on data) nor touch tensors of other devices. PyTorch says: {error}"
        ) from error
