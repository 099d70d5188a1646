"""Turns existing models into fastbf models, and removes BatchFormer from trained ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastbf.modules import BatchFormer, BatchFormerLayer
from fastbf.plain import make_plain
from fastbf.suggestions import suggesting
from fastbf.warned import warn


class PassThrough(nn.Module):
    """Replaces a BatchFormer in :func:`strip`: no parameters, and the evaluation behaviour in every mode."""

    def forward(self, features: Tensor, *targets: Any) -> Any:
        """The very same objects: ``features``, or ``(features, *targets)``."""
        return (features, *targets) if targets else features


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        advice = ": load it into a model, and give that" if isinstance(module, Mapping) else ""
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}{advice}")


@suggesting
def convert(module: nn.Module) -> int:
    """Makes every ``nn.TransformerEncoderLayer`` in ``module``, itself included, a ``BatchFormerLayer``.

    The layers stay the same objects with the same Parameters, hooks and mode; only their class changes. So
    optimizers keep working, and so does every reference to a layer. Subclasses of the layer are left alone, and so are
    encoder layers of other classes. Where nothing is found a UserWarning says so, and names the classes of such layers.

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
    if not layers and not any(type(m) is BatchFormerLayer for m in module.modules()):
        warn(_nothing_found(module), UserWarning)
    return len(layers)


def _nothing_found(module: nn.Module) -> str:
    """What ``convert`` looked for in vain, and the encoder layers of classes that it does not know, if any."""
    counts = Counter(type(m) for m in module.modules() if _resembles_an_encoder_layer(m))
    if not counts:
        return (
            f"convert found no torch.nn.TransformerEncoderLayer in {type(module).__name__}, and nothing like one. A "
            "network without such layers gets a fastbf.BatchFormer between its features and its classifier"
        )
    found = []
    for cls, count in counts.items():
        inherits = issubclass(cls, nn.TransformerEncoderLayer)
        found.append(
            f"{count} {cls.__module__}.{cls.__qualname__}, "
            + ("which inherits from it and may do something else" if inherits else "which does not inherit from it")
        )
    return (
        f"convert found no torch.nn.TransformerEncoderLayer. It left alone: {'; '.join(found)}. Where such a layer has "
        "that class's parameters and forward, make fastbf.BatchFormerLayer instead"
    )


def _resembles_an_encoder_layer(module: nn.Module) -> bool:
    """Whether a module is an encoder layer by its class or its name, or has the parts of one."""
    if isinstance(module, BatchFormer | BatchFormerLayer | nn.TransformerDecoderLayer):
        return False
    children = list(module.children())
    attentions = sum(isinstance(child, nn.MultiheadAttention) for child in children)
    norms = sum(isinstance(child, nn.LayerNorm) for child in children)
    parts = attentions == 1 and norms >= 2
    return isinstance(module, nn.TransformerEncoderLayer) or type(module).__name__.endswith("EncoderLayer") or parts


@suggesting
def strip(module: nn.Module, *, plain: bool = False) -> nn.Module:
    """Removes every ``BatchFormer`` for deployment. The evaluation output is unchanged; no parameter of theirs stays.

    Args:
        module: changed in place. Call ``.eval()`` on it as before any deployment.
        plain: leave no type of fastbf, for ``torch.jit.script``, ``torch.ao.quantization.quantize_dynamic`` and pickles
            of whole models that load where fastbf is not installed. An ``nn.Identity`` takes the place of a
            BatchFormer, and takes no targets: a model that calls ``former(features, targets)`` needs
            ``former(features)``. A SharedClassifier becomes an ``nn.Linear`` of the same name with the scale folded
            into new Parameters, and parametrizations into weight and bias; class counts and ``loss`` are gone. A
            BatchFormerLayer that stays becomes an ``nn.TransformerEncoderLayer``, as before :func:`convert`. These two
            stay the same objects. What cannot be made plain, such as a subclass with a ``forward`` of its own, stays,
            and a UserWarning says what and why.

    A model without a BatchFormer is returned as it is. If it has a BatchFormerLayer, as :func:`convert` makes them, a
    UserWarning says that such layers are at work at test time, too.

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
    removed = BatchFormer | PassThrough
    empty = nn.Identity if plain else PassThrough
    layers = [m for m in module.modules() if isinstance(m, BatchFormerLayer)]
    if layers and not plain and not any(isinstance(m, removed) for m in module.modules()):
        warn(
            f"strip found no BatchFormer in {type(module).__name__} and changes nothing. BatchFormerLayer, of which it "
            f"has {len(layers)}, is an encoder layer of the network, at test time, too. strip(module, plain=True) "
            "makes each an nn.TransformerEncoderLayer again",
            UserWarning,
        )
    # A module with two names is replaced under both. In reverse order inner modules come first.
    for name, child in reversed(list(module.named_modules(remove_duplicate=False))):
        if isinstance(child, removed) or _compiled(child, empty):
            if not name:
                return empty().train(child.training)
            module.set_submodule(name, empty().train(child.training))
    return make_plain(module) if plain else module


def _compiled(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is ``torch.compile`` of one that is now of a kind; its graph is still the old one's."""
    return isinstance(dict(module.named_children()).get("_orig_mod"), kind)
