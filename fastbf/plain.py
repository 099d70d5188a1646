"""Modules of torch in place of fastbf's, in the same objects."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastbf.cuda_graphs import is_graphed
from fastbf.modules import BatchFormerLayer, SharedClassifier
from fastbf.warned import warn


def make_plain(module: nn.Module) -> nn.Module:
    """Makes the classifiers in ``module`` an ``nn.Linear`` and the layers an ``nn.TransformerEncoderLayer``.

    They stay the same objects, with their hooks and mode. Captured CUDA graphs are dropped. What cannot be made plain
    stays as it is, and a UserWarning names it with the reason.
    """
    folded: dict[tuple[int, float], tuple[Tensor, nn.Parameter]] = {}
    left = []
    for name, m in module.named_modules():
        if is_graphed(m):
            del m.forward
        if not isinstance(m, SharedClassifier | BatchFormerLayer):
            continue
        reason = _classifier_obstacle(m) if isinstance(m, SharedClassifier) else _layer_obstacle(m)
        if reason is not None:
            left.append(f"{name or 'the module itself'} ({type(m).__name__}: {reason})")
        elif isinstance(m, SharedClassifier):
            _to_linear(m, folded)
        else:
            _become(m, BatchFormerLayer(1, 1, device="meta"), nn.TransformerEncoderLayer(1, 1, device="meta"))
    if left:
        warn(f"strip left modules that cannot be made plain: {'; '.join(left)}", UserWarning)
    return module


def _layer_obstacle(layer: BatchFormerLayer) -> str | None:
    """Why a layer cannot become an ``nn.TransformerEncoderLayer``, in a few words; None if it can."""
    if type(layer) is not BatchFormerLayer:
        return "a subclass may do something else"
    if "forward" in vars(layer):
        return "it has a forward of its own"
    if layer._group is not None:
        return "it has a process_group, without which it gives something else; set that to None"
    return None


def _classifier_obstacle(classifier: SharedClassifier) -> str | None:
    """Why a classifier cannot become an ``nn.Linear``, in a few words; None if it can."""
    classes = list(takewhile(lambda c: c is not SharedClassifier, _class_of(classifier).__mro__))
    if "forward" in vars(classifier) or any({"forward", "__call__"} & vars(c).keys() for c in classes):
        return "it has a forward of its own"
    if any({"weight", "bias"} & vars(c).keys() for c in classes):
        return "its class computes weight or bias"
    if not all(issubclass(c, SharedClassifier) for c in classes):  # FSDP's classes are such
        return "its class has other bases as well"
    if classifier.scale == 1:
        return None
    if any(name in vars(classifier) for name in ("weight", "bias")):
        return (
            f"scale={classifier.scale} cannot be folded into what a forward pre-hook computes; remove the hook by "
            "remove_weight_norm, remove_spectral_norm or prune.remove of torch.nn.utils"
        )
    if not all(_keeps_precision(t, classifier.scale) for _, t in _values(classifier)):
        return f"weight · scale={classifier.scale} does not fit in {classifier.weight.dtype}"
    return None


def _class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, as it was before parametrizations."""
    return parametrize.type_before_parametrizations(module)


def _values(classifier: SharedClassifier) -> Iterator[tuple[str, Tensor]]:
    """Weight and bias by name, as in evaluation, which the parametrization of a spectral norm tells from training."""
    modes = {m: m.training for m in classifier.modules()}
    classifier.eval()
    with torch.no_grad():
        found = [(name, getattr(classifier, name)) for name in ("weight", "bias")]
    for m, training in modes.items():
        m.training = training
    return ((name, t) for name, t in found if t is not None)


def _keeps_precision(x: Tensor, scale: float) -> bool:
    """Whether x · scale, in x's dtype, is right to one rounding: no overflow, no underflow that matters."""
    if x.is_meta:
        return True
    exact = x.detach().double() * scale
    error, largest = ((x.detach() * scale).double() - exact).abs(), exact.abs().amax()
    return bool((error <= torch.finfo(x.dtype).eps * largest).all()) or not bool(largest.isfinite())


def _to_linear(classifier: SharedClassifier, folded: dict[tuple[int, float], tuple[Tensor, nn.Parameter]]) -> None:
    """Folds the scale into new Parameters, by which others that are tied to these keep their values.

    Args:
        folded: the old and the new Parameter by the old one's identity and the scale; classifiers that share both
            share the new one.
    """
    scale, computed = classifier.scale, parametrize.is_parametrized(classifier)
    for name, t in _values(classifier):
        if computed and parametrize.is_parametrized(classifier, name):
            parametrization: Any = cast(Any, classifier.parametrizations)[name]
            trained = any(p.requires_grad for p in parametrization.parameters())
            if parametrization.is_tensor:  # torch writes into the original
                parametrization.original = nn.Parameter(parametrization.original.detach().clone(), trained)
            parametrize.remove_parametrizations(classifier, name)
            setattr(classifier, name, nn.Parameter(t.detach() * scale, trained))
        elif scale != 1:
            new = folded.setdefault((id(t), scale), (t, nn.Parameter(t.detach() * scale, t.requires_grad)))[1]
            setattr(classifier, name, new)
    ours = SharedClassifier(1, 1, class_counts=[1], class_weight=[1], device="meta")
    _become(classifier, ours, nn.Linear(1, 1, device="meta"))


def _become(module: nn.Module, ours: nn.Module, plain: nn.Module) -> None:
    """Gives a module the class of ``plain``, and takes away the attributes that ``ours`` has and ``plain`` has not."""
    buffers = dict(ours.named_buffers(recurse=False))
    for name in (vars(ours).keys() | buffers.keys()) - vars(plain).keys():
        if name in vars(module) or name in buffers:
            delattr(module, name)
    module.__class__ = type(plain)
