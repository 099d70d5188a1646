"""CUDA-graph capture of a training step's forward and backward, on PyTorch's own capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastbf import checks


def make_graphed(callable: Callable[..., Tensor], sample_args: Sequence[Tensor]) -> Callable[..., Tensor]:
    """Captures ``callable``'s forward and backward as CUDA graphs and replays them when the arguments match.

    Dropout is drawn afresh at every replay. Arguments of other shapes (a ragged last batch), dtypes or devices, and
    calls in another mode than at capture, run eagerly.

    Args:
        callable: an ``nn.Module``, or a function of tensors that uses no parameters, returning tensors. A module's
            ``forward`` is replaced and the module returned, as ``torch.cuda.make_graphed_callables`` does.
        sample_args: tensors of the shapes, dtypes, device and ``requires_grad`` of the calls to come.

    Returns:
        The graphed callable; on CPU, the callable unchanged.

    Raises:
        TypeError: sample arguments that are not tensors.
        ValueError: no sample arguments, or arguments on several devices.
        RuntimeError: from PyTorch, where the callable cannot be captured.

    Source: ``torch.cuda.make_graphed_callables``; DESIGN section 3.
    """
    if not sample_args:
        raise ValueError("sample_args must hold at least one tensor, got none")
    first = checks.tensor("sample_args[0]", sample_args[0])
    rest = {f"sample_args[{i}]": checks.tensor(f"sample_args[{i}]", x) for i, x in enumerate(sample_args)}
    checks.same_device("sample_args[0]", first, rest)
    if first.device.type != "cuda":
        return callable

    is_module = isinstance(callable, nn.Module)
    eager = callable.forward if is_module else callable
    captured = _signature(sample_args)
    mode = callable.training if is_module else None
    graphed = torch.cuda.make_graphed_callables(callable, tuple(sample_args))
    replay = graphed.forward if is_module else graphed

    def forward(*args: Tensor) -> Tensor:
        matches = _signature(args) == captured and (not is_module or callable.training == mode)
        return (replay if matches else eager)(*args)

    if not is_module:
        return forward
    callable.forward = forward
    return callable


def _signature(args: Sequence[Tensor]) -> list[tuple]:
    return [(x.shape, x.dtype, x.device, x.requires_grad) for x in args]
