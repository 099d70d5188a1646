"""Moving averages of a model's weights by name, for copies that lack some of its modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastbf import checks
from fastbf.modules import SharedClassifier
from fastbf.suggestions import suggesting

#: What ``torch.compile``, FSDP and activation checkpointing call the module that they wrap.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@suggesting
@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, *, buffers: bool = False) -> None:
    """average ← decay · average + (1 − decay) · model, for every parameter of ``average``, found in ``model`` by name.

    It updates a momentum encoder or an exponential moving average that was stripped of its BatchFormers, where going by
    the order of ``parameters()`` pairs wrong ones. Names are the same under ``torch.compile``, data parallel wrappers,
    FSDP, checkpoint wrappers and ``AveragedModel``.

    Args:
        average: changed in place. A copy of ``model``, which may lack modules: ``fastbf.strip(copy.deepcopy(model))``.
            Keep it in fp32, because 16 bits lose small steps.
        model: the model that is trained. Its dtypes and devices may differ from those of ``average``.
        decay: in [0, 1]; 0 copies, 1 changes nothing.
        buffers: also average floating-point buffers (of batch norms), and copy the others.

    Raises:
        TypeError: not modules, or decay is not a number.
        ValueError: a name of ``average`` is missing in ``model``, shapes or scales of classifiers differ, parameters
            are tied in ``average`` only, or decay is outside [0, 1]. Nothing was changed then.

    Examples:
        >>> import copy
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), fastbf.BatchFormer(32))
        >>> average = fastbf.strip(copy.deepcopy(model))
        >>> fastbf.update_average(average, model, 0.99)  # after every step of the optimizer
        >>> [name for name, _ in average.named_parameters()]
        ['0.weight', '0.bias']
    """
    for argument, module in (("average", average), ("model", model)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{argument} must be a torch.nn.Module, got {type(module).__name__}")
    decay = checks.probability("decay", decay)
    parameters = _pairs(average, model, "named_parameters")
    _check_scales(average, model)
    held = _pairs(average, model, "named_buffers") if buffers else []
    if decay == 1:
        return
    groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for mean, value in parameters:
        if decay == 0 or not _is_fractional(mean):
            mean.copy_(value)
            continue
        means, values = groups.setdefault((mean.dtype, mean.device), ([], []))
        means.append(mean)
        values.append(value.to(mean))
    for means, values in groups.values():  # one launch for many parameters
        get_ema_multi_avg_fn(decay)(means, values, 0)
    for mean, value in held:
        if decay and _is_fractional(mean):  # two equal infinities, of an attention mask, have themselves as their mean
            value = value.to(mean)
            value = torch.where(mean == value, mean, mean.lerp(value, 1 - decay))
        mean.copy_(value)


def _is_fractional(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _pairs(average: nn.Module, model: nn.Module, kind: str) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of ``average`` once, with that of ``model``; ``kind`` is the method that names the tensors."""
    theirs, missing = _named(model, kind), []
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    for name, mean in _named(average, kind).items():
        value = theirs.get(name)
        if value is None:
            missing.append(name)
            continue
        if value.shape != mean.shape:
            raise ValueError(
                f"{name} must have the same shape in average and model, got {tuple(mean.shape)} and "
                f"{tuple(value.shape)}"
            )
        if pairs.setdefault(id(mean), (mean, value))[1] is not value:
            raise ValueError(f"{name} is tied to another of average's {kind[6:]}, and in model it is not")
    if missing:
        raise ValueError(
            f"model must have all {kind[6:]} of average, which may be a copy that lacks modules, got none named "
            f"{', '.join(missing)}"
        )
    return list(pairs.values())


def _named(module: nn.Module, kind: str) -> dict[str, Any]:
    """What the method ``kind`` names, without the names of wrappers; one thing with two names has both."""
    while isinstance(module, AveragedModel):
        module = module.module
    wrapped = []
    for path, m in module.named_modules(remove_duplicate=False):
        if path.rpartition(".")[2] in _WRAPPED:
            wrapped.append(path)
        if isinstance(m, DataParallel | DistributedDataParallel):
            wrapped.append(f"{path}.module".removeprefix("."))
    found = dict(getattr(module, kind)(remove_duplicate=False))
    for path in sorted(wrapped, key=len, reverse=True):  # inner ones first
        outside = path.rpartition(".")[0]
        outside += "." if outside else ""
        found = {  # of two modules of one name, the wrapper and what is in it, the latter
            (outside + f"{name}."[len(path) + 1 :]).rstrip(".") if f"{name}.".startswith(f"{path}.") else name: thing
            for name, thing in found.items()
        }
    return found


def _check_scales(average: nn.Module, model: nn.Module) -> None:
    """Raises ValueError where weights of the same name mean something else: ``strip(plain=True)`` folds scales in."""
    theirs = _named(model, "named_modules")
    for name, m in _named(average, "named_modules").items():
        other = theirs.get(name)
        either = isinstance(m, SharedClassifier) or isinstance(other, SharedClassifier)
        if either and getattr(m, "scale", 1) != getattr(other, "scale", 1):
            raise ValueError(
                f"{name or 'the module itself'} must have the same scale in average and model, got "
                f"{getattr(m, 'scale', 1)} and {getattr(other, 'scale', 1)}: strip(plain=True) folds it into the weight"
            )
