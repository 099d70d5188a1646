"""Kernels built before a training needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastbf.backend import building
from fastbf.suggestions import suggesting
from fastbf.torch_state import flattened


@suggesting
def warm_up(module: nn.Module, *args: Any, step: Callable[..., Any] | None = None) -> int:
    """Builds the kernels that training and evaluation of a module launch, side by side, and launches none.

    Without it a training builds kernels at the first step that needs them. The call makes a step of each, forward, in
    training also backward, in which our kernels do nothing: results are memory that nothing has written to. Parameters,
    gradients, buffers, modes and random numbers are left as they are. Across ranks all of them make the call.

    Args:
        module: on its device, with the parts frozen that will be.
        args: what it is called with, of the shapes and dtypes to come. Another batch size may need other kernels.
        step: called as ``step(module, *args)``; by default the module itself is, ``module(*args)``.

    Returns:
        How many kernels were built. 0 where PyTorch serves, and where all are there.

    Raises:
        RuntimeError: a kernel cannot be built; ``backend="auto"`` takes PyTorch once a call needs it.
        Exception: whatever the step raises.

    The caller's autocast holds for the step::

        with torch.autocast("cuda", torch.bfloat16):
            fastbf.warm_up(net, images, labels, step=lambda net, x, y: net.classifier.loss(*net(x, y)))

    Examples:
        >>> former = fastbf.BatchFormer(32)
        >>> fastbf.warm_up(former, torch.randn(6, 32))  # no GPU, so no kernels
        0
    """
    modes = {m: m.training for m in module.modules()}
    held = [t for t in (*module.parameters(), *module.buffers()) if t.is_cuda]
    if not held and not any(getattr(m, "backend", None) == "triton" for m in modes):
        return 0
    whole = _Step(module, step)
    try:
        with (
            building() as plan,
            torch.random.fork_rng({t.device.index for t in held}),
            torch.autograd.set_multithreading_enabled(False),  # a plan is a thread's own
        ):
            for training in (True, False):
                module.train(training)
                buffers = {name: t.clone() for name, t in whole.named_buffers()}
                with torch.set_grad_enabled(training):
                    results = functional_call(whole, buffers, args)
                if training:
                    _backward(results, whole)
    finally:
        for m, training in modes.items():
            m.training = training
    return len(plan)


class _Step(nn.Module):
    def __init__(self, module: nn.Module, step: Callable[..., Any] | None) -> None:
        super().__init__()
        self.module, self.step = module, step

    def forward(self, *args: Any) -> Any:
        return self.module(*args) if self.step is None else self.step(self.module, *args)


def _backward(results: Any, module: nn.Module) -> None:
    """Gradients of all parameters, which are not kept."""
    found = [t for t in flattened(results)[0] if isinstance(t, Tensor) and t.requires_grad]
    parameters = [p for p in module.parameters() if p.requires_grad]
    if found and parameters:
        torch.autograd.grad([t.sum() for t in found], parameters, allow_unused=True)
