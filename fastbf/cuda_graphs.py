"""CUDA-graph capture of a training step's forward and backward, on PyTorch's own capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from fastbf import checks
from fastbf.suggestions import suggesting
from fastbf.torch_state import flattened, has_gradient_hooks, has_hooks, own_tensors

CAPTURABLE = "cuda"


@suggesting
def make_graphed(callable: Callable[..., Any], sample_args: Sequence[Tensor]) -> Callable[..., Any]:
    """Captures ``callable``'s forward and backward as CUDA graphs and replays them when a call matches.

    ``fastbf.make_graphed(lambda x, y: classifier.loss(former(x), y), (x, y))`` makes a step of a training loop from
    BatchFormer to the loss two graphs. Parameters are found by running the callable. Each replay draws new dropout. A
    call runs eagerly if it differs from the captured one in shapes, dtypes or devices (a ragged last batch), in
    autocast, in a module's mode or dropout rate or in which parameters are trained, or if parameters of a module that
    the callable calls were replaced or moved in memory (``module.half()``).

    Results and the gradients of arguments have memory of their own. Gradients of parameters are in the graph's memory.
    Those in ``.grad`` are copied before a later backward overwrites them, so they accumulate over steps. Those that
    ``torch.autograd.grad`` returned last until the next backward. Backward must come before the next call, because the
    graph holds the activations of one call.

    Args:
        callable: an ``nn.Module`` or a function that takes tensors, and returns tensors or nested containers of them.
            It runs a few times on the sample arguments before capture. A module is returned with its ``forward``
            replaced; copies and pickles of it run eagerly.
        sample_args: tensors of the shapes, dtypes, device and ``requires_grad`` of the calls to come; copied.

    Returns:
        The graphed callable; on CPU, the callable unchanged.

    Raises:
        TypeError: a callable that is none, or sample arguments or results that are not tensors.
        ValueError: no sample arguments, arguments or parameters on several devices, hooks on parameters or on modules
            inside, which would run at capture only; ``DistributedDataParallel`` inside, which must stay outside.
        RuntimeError: what PyTorch cannot capture (a wait for the device, such as ``.item()``); a backward that comes
            after a later call.

    Examples:
        >>> former, classifier = fastbf.BatchFormer(32), fastbf.SharedClassifier(32, 3)
        >>> x, y = torch.randn(6, 32), torch.tensor([0, 0, 0, 1, 1, 2])
        >>> step = fastbf.make_graphed(lambda x, y: classifier.loss(former(x), y), (x, y))
        >>> step(x, y).shape  # on a CPU the function itself
        torch.Size([])

    Source: ``torch.cuda.make_graphed_callables``.
    """
    if isinstance(callable, Tensor) or not hasattr(callable, "__call__"):  # noqa: B004  (the name is an argument's)
        raise TypeError(f"callable must be a module or a function, got {type(callable).__name__}")
    if not isinstance(sample_args, tuple | list):
        raise TypeError(f"sample_args must be a tuple or a list of tensors, got {type(sample_args).__name__}")
    if not sample_args:
        raise ValueError("sample_args must hold at least one tensor, got none")
    named = {f"sample_args[{i}]": checks.tensor(f"sample_args[{i}]", x) for i, x in enumerate(sample_args)}
    checks.same_device("sample_args[0]", sample_args[0], named)
    if sample_args[0].device.type != CAPTURABLE:
        return callable

    module = callable if isinstance(callable, nn.Module) else None
    eager = callable if module is None else module.forward
    graphed = _Graphed(eager, module, tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in sample_args))
    if module is None:
        return graphed
    module.forward = graphed
    return module


def is_graphed(module: nn.Module) -> bool:
    """Whether :func:`make_graphed` replaced the module's ``forward``; ``del module.forward`` undoes that."""
    return isinstance(vars(module).get("forward"), _Graphed)


class _Graphed:
    """The captured callable, its inputs, and what a call must have in common with the captured one."""

    def __init__(self, eager: Callable[..., Any], module: nn.Module | None, args: tuple[Tensor, ...]) -> None:
        self.eager, self.module, self.args = eager, module, args
        self.used = _observe(eager, module, args)
        self.parameters = self.used.parameters
        self.calls = 0
        self.state = self._state(args)
        self.wants_grad = torch.is_grad_enabled()
        with _without_autocast_cache(args[0].device.type), _explained():
            self.replay: Callable[..., Any] = torch.cuda.make_graphed_callables(
                lambda *inputs: eager(*inputs[: len(args)]), (*args, *self.parameters), allow_unused_input=True
            )
            self.addresses = self._gradients()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or not self._matches(args):
            return self.eager(*args, **kwargs)
        self.calls += 1
        inputs = (_Input.apply(x) if x.requires_grad and x.is_leaf else x for x in args)
        results, rebuild = flattened(self.replay(*inputs, *self.parameters))
        return rebuild(_Results.apply(self, *results))

    def _matches(self, args: tuple[Any, ...]) -> bool:
        return (
            len(args) == len(self.args)
            and all(map(_fits, args, self.args))
            and self.wants_grad >= torch.is_grad_enabled()
            and self._state(args) == self.state
        )

    def _state(self, args: tuple[Tensor, ...]) -> tuple[object, ...]:
        """Everything but the arguments that a captured kernel depends on."""
        kind = args[0].device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        return autocast, self.used.state()

    def _gradients(self) -> list[int | None]:
        """The address where the graph leaves each parameter's gradient."""
        results = [x for x in flattened(self.replay(*self.args, *self.parameters))[0] if x.requires_grad]
        if not results or not self.parameters:
            return [None] * len(self.parameters)
        incoming = [torch.zeros_like(x) for x in results]
        found = torch.autograd.grad(results, self.parameters, incoming, allow_unused=True)
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
    """Returns its argument; the gradient has memory of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return None if grad is None else grad.clone()


class _Results(Function):
    """Copies of a replay's results, in memory of their own; its backward runs before the graph's."""

    @staticmethod
    def forward(ctx: Any, graphed: _Graphed, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.graphed, ctx.call = graphed, graphed.calls
        copies = tuple(x.clone() for x in results)
        differentiable = graphed.used.differentiable
        ctx.mark_non_differentiable(*(x for x, of in zip(copies, differentiable, strict=True) if not of))
        return copies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.call != ctx.graphed.calls:
            raise RuntimeError(
                "backward came after a later call of the graphed callable, whose activations took the place of this "
                "one's: run backward before the next call, or do not graph it"
            )
        ctx.graphed.keep_gradients()
        return None, *grads


def _fits(x: object, sample: Tensor) -> bool:
    if not isinstance(x, Tensor) or x.requires_grad > sample.requires_grad:
        return False
    return x.shape == sample.shape and x.dtype == sample.dtype and x.device == sample.device


def _without_autocast_cache(device: str) -> torch.autocast:
    """A context with autocast as it is, but for its cache: casts of weights must be in the graph."""
    return torch.autocast(
        device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
    )


@contextmanager
def _explained() -> Iterator[None]:
    """Adds to an error of PyTorch what a callable that is captured must not do."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "the callable cannot be captured as a CUDA graph: it must not wait for the device (.item(), .cpu(), shapes "
            f"that depend on data) nor touch tensors of other devices. PyTorch says: {error}"
        ) from error


class _Used(NamedTuple):
    """What a callable uses beside its arguments."""

    parameters: tuple[Tensor, ...]  #: leaves that get a gradient
    modules: tuple[nn.Module, ...]  #: those that were called, and all inside them
    differentiable: tuple[bool, ...]  #: of each result, flattened
    holders: tuple[Any, ...]  #: modules with tensors that are neither parameters nor buffers

    def state(self) -> tuple[object, ...]:
        """Values of which none may change between capture and replay: addresses, modes, dropout rates."""
        held = [*self.parameters, *(t for module in self.modules for t in own_tensors(module))]
        for module in self.holders:
            held += module.held_tensors()
        tensors = [(id(t), t.data_ptr(), t.requires_grad) for t in held]
        return tensors, [(module.training, vars(module).get("p")) for module in self.modules]


def _observe(call: Callable[..., Any], owner: nn.Module | None, args: tuple[Tensor, ...]) -> _Used:
    """Runs ``call``, the forward of ``owner`` if that is given, on its arguments.

    Raises:
        TypeError: it returns something else than tensors.
        ValueError: what it uses cannot be replayed: hooks, or parameters on another device.
    """
    called: list[nn.Module] = [] if owner is None else [owner]
    hook = register_module_forward_pre_hook(lambda module, _: called.append(module))
    try:
        results, _ = flattened(call(*args))
    finally:
        hook.remove()
    for result in results:
        if not isinstance(result, Tensor):
            raise TypeError(f"callable must return tensors only, got {type(result).__name__}")
    modules = tuple({inner: None for module in called for inner in module.modules()})
    _check_modules(modules, owner)
    parameters = tuple(leaf for leaf in _leaves(results) if not any(leaf is x for x in args))
    _check_parameters(parameters, args[0].device)
    holders = tuple(module for module in modules if hasattr(module, "held_tensors"))
    return _Used(parameters, modules, tuple(result.requires_grad for result in results), holders)


def _leaves(results: list[Tensor]) -> list[Tensor]:
    """The tensors at which the derivatives of the results end."""
    todo = [x.grad_fn for x in results if x.grad_fn is not None]
    seen, leaves = set(todo), []
    while todo:
        node = todo.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        following = [n for n, _ in node.next_functions if n is not None and n not in seen]
        seen.update(following)
        todo += following
    return leaves


def _check_modules(modules: tuple[nn.Module, ...], owner: nn.Module | None) -> None:
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            raise ValueError("callable must not hold DistributedDataParallel: graph the module, then wrap that")
        if module is not owner and has_hooks(module):
            name = type(module).__name__
            raise ValueError(f"modules inside callable must have no hooks, which would run at capture only; {name} has")


def _check_parameters(parameters: tuple[Tensor, ...], device: torch.device) -> None:
    for parameter in parameters:
        if parameter.device != device:
            raise ValueError(f"parameters must be on the device of sample_args, {device}, got {parameter.device}")
        if has_gradient_hooks(parameter):
            raise ValueError("parameters must have no hooks, which would run in the graph and again on what it returns")
