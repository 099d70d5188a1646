"""Turns existing models into fastbf models, and removes BatchFormer from trained ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastbf.modules import BatchFormer, BatchFormerLayer


class PassThrough(nn.Module):
    """Replaces a BatchFormer in :func:`strip`: no parameters, and the evaluation behaviour in every mode."""

    def forward(self, features: Tensor, *targets: Any) -> Any:
        """The very same objects: ``features``, or ``(features, *targets)``."""
        return (features, *targets) if targets else features


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")


def convert(module: nn.Module) -> int:
    """Makes every ``nn.TransformerEncoderLayer`` in ``module``, itself included, a ``BatchFormerLayer``.

    The layers stay the same objects with the same Parameters, hooks and mode; only their class changes. So
    optimizers keep working, and so does every reference to a layer. Subclasses of the layer are left alone.

    Args:
        module: changed in place.

    Returns:
        How many layers were converted.

    Raises:
        TypeError: not a module.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.TransformerEncoderLayer(32, 4))
        >>> fastbf.convert(model), type(model[0]).__name__
        (1, 'BatchFormerLayer')
    """
    _check_module(module)
    layers = [m for m in module.modules() if type(m) is nn.TransformerEncoderLayer]
    for layer in layers:
        layer.__class__ = BatchFormerLayer
        assert isinstance(layer, BatchFormerLayer)  # for type checkers
        layer.backend, layer.process_group = "auto", None
    return len(layers)


def strip(module: nn.Module) -> nn.Module:
    """Removes every ``BatchFormer`` for deployment. The evaluation output is unchanged; no parameter of theirs stays.

    Args:
        module: changed in place. Call ``.eval()`` on it as before any deployment.

    Returns:
        ``module``, or what replaces it if it is itself a BatchFormer.

    Raises:
        TypeError: not a module.

    Examples:
        >>> model = torch.nn.Sequential(fastbf.BatchFormer(32), fastbf.SharedClassifier(32, 3))
        >>> sorted(fastbf.strip(model.eval()).state_dict())
        ['1.bias', '1.weight']
    """
    _check_module(module)
    if isinstance(module, BatchFormer):
        return PassThrough().train(module.training)
    # A module with two names is replaced under both. In reverse order inner modules come first.
    for name, child in reversed(list(module.named_modules(remove_duplicate=False))):
        if isinstance(child, BatchFormer):
            module.set_submodule(name, PassThrough().train(child.training))
    return module
