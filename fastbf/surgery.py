"""Turning existing models into fastbf models, and trained ones into plain models."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastbf.modules import BatchFormer, BatchFormerLayer


class PassThrough(nn.Module):
    """What :func:`strip` leaves where a BatchFormer was: no parameters, the evaluation behaviour in every mode."""

    def forward(self, features: Tensor, *targets: Any) -> Any:
        """The very same objects: ``features``, or ``(features, *targets)``."""
        return (features, *targets) if targets else features


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")


def convert(module: nn.Module) -> int:
    """Makes every plain ``nn.TransformerEncoderLayer`` in ``module``, itself included, a ``BatchFormerLayer``.

    The layers stay the same objects with the same Parameters, hooks and mode; only their class changes. So
    optimizers keep working, and so does every reference to a layer. Subclasses of the layer are left alone.

    Args:
        module: changed in place.

    Returns:
        How many layers were converted.

    Raises:
        TypeError: not a module.
    """
    _check_module(module)
    plain = [m for m in module.modules() if type(m) is nn.TransformerEncoderLayer]
    for layer in plain:
        layer.__class__ = BatchFormerLayer
        assert isinstance(layer, BatchFormerLayer)  # for type checkers
        layer.backend, layer.process_group = "auto", None
    return len(plain)


def strip(module: nn.Module) -> nn.Module:
    """Removes every ``BatchFormer`` for deployment. The evaluation output is unchanged; no parameter of theirs stays.

    Args:
        module: changed in place. Call ``.eval()`` on it as before any deployment.

    Returns:
        ``module``, or what replaces it if it is itself a BatchFormer.

    Raises:
        TypeError: not a module.
    """
    _check_module(module)
    if isinstance(module, BatchFormer):
        return PassThrough().train(module.training)
    # A module with two names is replaced under both, and one inside another before that.
    for name, child in reversed(list(module.named_modules(remove_duplicate=False))):
        if isinstance(child, BatchFormer):
            module.set_submodule(name, PassThrough().train(child.training))
    return module
