"""What a callable uses beside its arguments, seen by running it once: parameters, modules and their modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree


class Used(NamedTuple):
    """What a callable uses."""

    leaves: tuple[Tensor, ...]  #: tensors that get a gradient, arguments apart
    modules: tuple[nn.Module, ...]  #: that were called, and all inside them
    differentiable: tuple[bool, ...]  #: of the results, flattened

    def state(self) -> tuple:
        """What, if it changes, makes the callable do something else, or somewhere else in memory."""
        held = [t for m in self.modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        tensors = [(id(t), t.data_ptr(), t.requires_grad) for t in (*self.leaves, *held)]
        return tensors, [(m.training, vars(m).get("p")) for m in self.modules]  # p: the rate of a dropout


def observed(call: Callable[..., Any], owner: nn.Module | None, args: tuple[Tensor, ...]) -> Used:
    """Runs ``call``, the forward of ``owner`` if that is given, on its arguments.

    Raises:
        TypeError: it returns something else than tensors.
        ValueError: what it uses cannot be replayed: hooks, or parameters on another device.
    """
    with _modules_called() as called:
        results = pytree.tree_leaves(call(*args))
    for result in results:
        if not isinstance(result, Tensor):
            raise TypeError(f"callable must return tensors only, got {type(result).__name__}")
    roots = called if owner is None else [owner, *called]
    modules = tuple({inner: None for root in roots for inner in root.modules()})
    _check_modules(modules, owner)
    leaves = tuple(leaf for leaf in _leaves(results) if not any(leaf is x for x in args))
    _check_leaves(leaves, args[0].device)
    return Used(leaves, modules, tuple(result.requires_grad for result in results))


@contextmanager
def _modules_called() -> Iterator[list[nn.Module]]:
    called: list[nn.Module] = []
    hook = register_module_forward_pre_hook(lambda module, _: called.append(module))
    try:
        yield called
    finally:
        hook.remove()


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
        name = type(module).__name__
        if isinstance(module, DistributedDataParallel):
            raise ValueError("callable must not hold DistributedDataParallel: graph the module, then wrap that")
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if module is not owner and any(hooks):
            raise ValueError(f"modules inside callable must have no hooks, which would run at capture only; {name} has")


def _check_leaves(leaves: tuple[Tensor, ...], device: torch.device) -> None:
    for leaf in leaves:
        if leaf.device != device:
            raise ValueError(f"parameters must be on the device of sample_args, {device}, got {leaf.device}")
        if leaf._backward_hooks or leaf._post_accumulate_grad_hooks:
            raise ValueError("parameters must have no hooks, which would run in the graph and again on what it returns")
