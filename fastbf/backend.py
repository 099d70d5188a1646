"""Which backend runs a call, and why: the one place where that is decided (DESIGN section 4)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

BACKENDS = ("auto", "triton", "torch")

# The ops of fastbf.functional that a Triton kernel covers.
TRITON_OPS: frozenset[str] = frozenset()
OPS = (
    "batch_attention",
    "dropout_add_layer_norm",
    "activation_dropout",
    "encoder_layer",
    "linear_cross_entropy",
)


class Choice(NamedTuple):
    """A backend, "torch" or "triton", and the reason in a sentence."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


def check_backend(backend: str) -> str:
    """Returns ``backend`` if it is one of :data:`BACKENDS`, else raises ValueError."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend


def _obstacle(op: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why no Triton kernel can serve the call; None if one can."""
    if op not in TRITON_OPS:
        return f"{op} has no Triton kernel in this version."
    return None


def choose(backend: str, op: str, *tensors: Tensor, obstacle: str | None = None) -> Choice:
    """The backend for one call of ``op`` on ``tensors``; ``obstacle`` is why the caller itself rules out a kernel.

    Raises:
        ValueError: an unknown backend, or "triton" for a call that no kernel covers; the message says why.
    """
    check_backend(backend)
    if backend == "torch":
        return Choice("torch", "backend='torch' was asked for.")
    obstacle = obstacle or _obstacle(op, tensors)
    if obstacle is None:
        return Choice("triton", f"a Triton kernel covers {op} for these tensors.")
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot serve this call: {obstacle}")
    return Choice("torch", obstacle)


def explain(what: str | nn.Module, *tensors: Tensor, backend: str | None = None) -> Choice:
    """The backend that a call would use, and why.

    Args:
        what: the name of a function of ``fastbf.functional``, or a ``BatchFormer``, ``BatchFormerLayer`` or
            ``SharedClassifier``.
        tensors: the tensors it would be called with.
        backend: "auto", "triton" or "torch"; None is the module's own setting, or "auto" for a function.

    Returns:
        :class:`Choice`; ``print(fastbf.explain(module, x))`` reads as a sentence.

    Raises:
        ValueError: an unknown function or backend, or "triton" where no kernel covers the call.
        TypeError: ``what`` is neither a name nor a module of fastbf.
    """
    if isinstance(what, nn.Module):
        op = getattr(what, "op", None)
        if op not in OPS:
            raise TypeError(f"what must be the name of a function or a module of fastbf, got {type(what).__name__}")
        layers = [m for m in what.modules() if hasattr(m, "parent_reason")]
        reason = next(filter(None, (layer.parent_reason() for layer in layers)), None)
        return choose(backend or what.backend, op, *tensors, obstacle=reason)
    if what not in OPS:
        raise ValueError(f"what must be one of {', '.join(OPS)} or a module of fastbf, got {what!r}")
    return choose(backend or "auto", what, *tensors)
