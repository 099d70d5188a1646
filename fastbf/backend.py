"""Which backend serves a call, and why. Nothing else decides it (docs/design.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbf import checks, repeats, signatures
from fastbf.suggestions import suggesting
from fastbf.torch_state import traced_as_constant, transformed
from fastbf.warned import warn

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_TRITON = 3, 6
MAX_HEAD_DIM = 512
MAX_CHANNELS = 8192

#: The public ops of fastbf.functional, and the reason for their kernels where these serve.
OPS = {
    "batch_attention": "a Triton kernel covers batch_attention for these tensors.",
    "dropout_add_layer_norm": "a Triton kernel covers dropout_add_layer_norm for these tensors.",
    "activation_dropout": "a Triton kernel covers activation_dropout for these tensors.",
    "encoder_layer": "Triton kernels do all of encoder_layer that stands between its matrix products.",
    "linear_cross_entropy": "Triton kernels do all of linear_cross_entropy but its matrix products.",
}


class Choice(NamedTuple):
    """A backend, "torch" or "triton", and the reason in a sentence.

    Examples:
        >>> fastbf.explain("batch_attention", torch.randn(6, 4, 8), backend="torch").backend
        'torch'
    """

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


# Choices of kernels, by "auto" and by "triton". The pairs are equal, and :func:`give_up` tells them apart by identity.
_CHOSEN = {op: Choice("triton", reason) for op, reason in OPS.items()}
_ASKED_FOR = {op: Choice("triton", reason) for op, reason in OPS.items()}


def check_backend(backend: str) -> str:
    """Returns ``backend`` if it is one of :data:`BACKENDS`, else raises ValueError."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend


@traced_as_constant  # a compiler traces into functions with a cache
def _import_obstacle() -> str | None:
    """Why no kernel can be imported; None if they can."""
    return _imported()


@cache  # the import system searches the file system
def _imported() -> str | None:
    """As :func:`_import_obstacle`, tried once. Warns, as it is asked for calls that kernels could serve."""
    try:
        if find_spec("triton") is None:
            return _warned("triton is not installed, which PyTorch for CUDA comes with on Linux.")
        import triton

        if _release(triton.__version__) < OLDEST_TRITON:
            needed = ".".join(map(str, OLDEST_TRITON))
            return _warned(f"triton {triton.__version__} is installed, and the kernels need {needed} or newer.")
        from fastbf.kernels import probe  # noqa: F401
    except Exception as error:  # any kind: a library that is missing, half an installation
        return _warned(f"triton is installed and cannot be imported: {type(error).__name__}: {error}")
    return None


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(int(number) for number in version.split(".")[:2])


@traced_as_constant
def _interpreted() -> bool:
    """Whether Triton runs kernels on CPU tensors (``TRITON_INTERPRET=1``). It can be imported."""
    import triton

    return triton.knobs.runtime.interpret


@traced_as_constant
def _gpu_obstacle(device: torch.device) -> str | None:
    """Why no kernel can run on a GPU; None if kernels can."""
    return _tried(device)


@cache
def _tried(device: torch.device) -> str | None:
    """As :func:`_gpu_obstacle`, tried until it is known. Warns if a kernel cannot be built on the device."""
    if torch.version.hip is not None:
        return "the kernels' configurations are for NVIDIA GPUs."
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU's compute capability is below 8.0."
    from fastbf.kernels.failures import BuildError
    from fastbf.kernels.probe import probe

    try:
        probe(device)
    except BuildError as error:
        return _warned(f"Triton cannot build a kernel for {device}, {error}")
    return None


@contextmanager
def building() -> Iterator[dict[Any, Any]]:
    """Within the context no kernel of this thread is launched; those that are not built yet are listed.

    At its end they are built, side by side.
    """
    if _import_obstacle() is not None:
        yield {}
        return
    from fastbf.kernels import launch

    with launch.planned() as plan:
        yield plan
    launch.build(plan)


_failed: dict[tuple[str, torch.device], str] = {}


def unbuilt(op: str, device: torch.device, error: Exception) -> str:
    """Makes "auto" take PyTorch for ``op`` on a device whose kernel could not be built; returns the reason."""
    reason = _failed[op, device] = f"a Triton kernel of {op} could not be built, {error}."
    signatures.forget()
    repeats.forget()
    return reason


def give_up(choice: Choice, op: str, device: torch.device, error: Exception, *, final: bool = False) -> None:
    """Warns that a kernel could not be built, and makes "auto" take PyTorch for ``op`` on this device.

    Args:
        choice: of kernels.
        op: the function that they serve.
        device: the device that they run on.
        error: what they raised.
        final: whether PyTorch may not take over.

    Raises:
        Exception: ``error``, if it is no BuildError, the caller asked for "triton", a compiler traces the call, or the
            choice is final.
    """
    from fastbf.kernels.failures import BuildError

    if not isinstance(error, BuildError) or final or choice is _ASKED_FOR[op] or torch.compiler.is_compiling():
        raise error
    _warned(unbuilt(op, device, error))


def _warned(reason: str) -> str:
    warn(f"fastbf uses PyTorch: {reason}")
    return reason


def _not_on_a_gpu(op: str, x: Tensor) -> str:
    return f"{op} was given tensors on {x.device.type}, and Triton's kernels run on CUDA GPUs."


def _obstacle(
    op: str, tensors: tuple[Tensor, ...], head_dim: int | None, channels: int | None, interpreter: bool
) -> str | None:
    """Why no Triton kernel can serve the call; None if one can. ``interpreter``: whether CPU tensors may be served."""
    if tensors and tensors[0].device.type != "cuda" and not interpreter:
        return _not_on_a_gpu(op, tensors[0])
    obstacle = _import_obstacle()
    if obstacle is not None:
        return obstacle
    if not tensors:
        return f"the kernels of {op} do not serve all tensors: give those of the call."
    x = tensors[0]
    if op == "batch_attention":
        head_dim = x.shape[-1]
    elif op not in ("activation_dropout", "linear_cross_entropy"):
        channels = channels or x.shape[-1]
    if transformed():
        return "a transform of torch.func or forward-mode AD is active, which see through PyTorch's operators only."
    if x.device.type == "cuda":
        obstacle = _gpu_obstacle(x.device)
        if obstacle is not None:
            return obstacle
    elif x.device.type != "cpu" or not _interpreted():
        return _not_on_a_gpu(op, x)
    for t in tensors:
        if t.dtype not in DTYPES:
            return f"the kernels of {op} take fp32, fp16 and bf16, not {t.dtype}."
        if type(t) not in (Tensor, nn.Parameter) and not torch.compiler.is_compiling():
            return f"a tensor is a {type(t).__name__}, which kernels do not see through."
    if head_dim is not None and (head_dim % 8 or head_dim > MAX_HEAD_DIM):
        return f"the head dimension is {head_dim}; kernels take multiples of 8 up to {MAX_HEAD_DIM}."
    if channels is not None and channels > MAX_CHANNELS:
        return f"there are {channels} channels; kernels that normalise take up to {MAX_CHANNELS}."
    if any(t.numel() == 0 for t in tensors):
        return "a tensor is empty."
    return _failed.get((op, x.device))


def choose(
    backend: str | Choice,
    op: str,
    *tensors: Tensor,
    head_dim: int | None = None,
    channels: int | None = None,
    obstacle: str | None = None,
) -> Choice:
    """The backend for one call of ``op`` on ``tensors``. The first one's shape counts.

    Args:
        backend: what the caller asks for, or a choice, which is returned.
        head_dim: of an encoder layer, if known.
        channels: of an encoder layer, if they are not the first tensor's last dimension.
        obstacle: why the caller rules out kernels, if it does.

    Raises:
        ValueError: an unknown backend, or "triton" for a call that no kernel covers; the message says why.
    """
    if isinstance(backend, Choice):
        return backend
    check_backend(backend)
    if backend == "torch":
        return Choice("torch", "backend='torch' was asked for.")
    obstacle = obstacle or _obstacle(op, tensors, head_dim, channels, interpreter=backend == "triton")
    if obstacle is None:
        return (_CHOSEN if backend == "auto" else _ASKED_FOR)[op]
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot serve this call: {obstacle}")
    return Choice("torch", obstacle)


@suggesting
def explain(what: str | nn.Module, *tensors: Tensor, backend: str | None = None) -> Choice:
    """The backend that a call would use, and why.

    Args:
        what: the name of a function of ``fastbf.functional``, or a ``BatchFormer``, ``BatchFormerLayer`` or
            ``SharedClassifier``.
        tensors: the tensors it would be called with, a layer's masks among them.
        backend: "auto", "triton" or "torch"; None is the module's own setting, or "auto" for a function.

    Returns:
        :class:`Choice`; ``print(fastbf.explain(module, x))`` reads as a sentence.

    Raises:
        ValueError: an unknown function or backend, or "triton" where no kernel covers the call.
        TypeError: ``what`` is neither a name nor a module of fastbf.
        TypeError, ValueError: features whose layout, width, device or dtype does not fit the module, as in its call.
            Targets, masks and the tensors of a function are not checked.

    Examples:
        >>> print(fastbf.explain(fastbf.BatchFormer(32), torch.randn(6, 32)))
        torch: encoder_layer was given tensors on cpu, and Triton's kernels run on CUDA GPUs.
    """
    if not isinstance(what, nn.Module):
        if isinstance(what, str) and what in OPS:
            return choose(backend or "auto", what, *tensors)
        names, given = ", ".join(OPS), repr(what) if isinstance(what, str) else type(what).__name__
        kind = ValueError if isinstance(what, str) else TypeError
        raise kind(f"what must be a module of fastbf or the name of a function, one of {names}; got {given}")
    module: Any = what
    op = getattr(module, "op", None)
    if op not in OPS:
        kinds = "a BatchFormer, a BatchFormerLayer, a SharedClassifier or the name of a function"
        raise TypeError(f"what must be {kinds}, got {type(module).__name__}{_others(module)}")
    is_former = hasattr(module, "mix")
    if is_former and not module.training:
        return Choice("torch", "a BatchFormer in evaluation mode returns its input, and nothing runs.")
    is_layer = op == "encoder_layer" and not is_former
    for x in tensors[:1]:
        checks.floating("src" if is_layer else "features", x)
    parts: list[Any] = [m for m in module.modules() if hasattr(m, "parent_reason")]
    of_input = tensors[:1] if is_layer else ()
    reason = next(filter(None, (part.parent_reason(*of_input) for part in parts)), None)
    if is_layer and reason is None and any(mask is not None for mask in tensors[1:]):
        reason = "the call has an attention mask."
    if op == "encoder_layer":
        tensors = tensors[:1]  # the others are masks or targets
    for x in tensors[:1]:
        if is_former:
            module._check(x)
            x = x.new_empty(0, module.dim)  # which its layers take, if they take x
        if reason is None and parts:  # else torch's own forward checks, if anything does
            parts[0]._check(x)
    attention = getattr(parts[0], "self_attn", None) if parts else None
    return choose(
        backend or str(module.backend),
        op,
        *tensors,
        head_dim=attention and attention.head_dim,
        channels=attention and attention.embed_dim,
        obstacle=reason,
    )


def _others(module: nn.Module) -> str:
    """What to ask for instead of a module that is not one of fastbf's."""
    found = [f"{name} ({type(m).__name__})" for name, m in module.named_modules() if getattr(m, "op", None) in OPS]
    outer = [name for name in found if not any(name.startswith(f"{other.split()[0]}.") for other in found)]
    if outer:
        return f": ask for one of those that it holds, {', '.join(outer[:3])}" + (", …" if outer[3:] else "")
    if any(isinstance(m, nn.TransformerEncoderLayer) for m in module.modules()):
        return ": fastbf.convert makes a BatchFormerLayer of an nn.TransformerEncoderLayer"
    return ", which holds none of them"
