"""Which backend runs a call, and why: the one place where that is decided (DESIGN section 4)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbf.context import autocast_dtype, traced

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 512

# The ops of fastbf.functional that Triton kernels serve, and what part of them.
TRITON_OPS = {
    "batch_attention": "a Triton kernel covers batch_attention for these tensors.",
    "encoder_layer": "the attention of encoder_layer runs in a Triton kernel, what surrounds it in PyTorch.",
}
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


def _interpreted() -> bool:
    """Whether Triton runs kernels on CPU tensors (``TRITON_INTERPRET=1``)."""
    import triton

    return triton.knobs.runtime.interpret


def _obstacle(op: str, tensors: tuple[Tensor, ...], head_dim: int | None, interpreter: bool) -> str | None:
    """Why no Triton kernel can serve the call; None if one can. ``interpreter`` is whether CPU tensors may go there."""
    if op not in TRITON_OPS:
        return f"{op} has no Triton kernel in this version."
    if find_spec("triton") is None:
        return "triton is not installed."
    if not tensors:
        return f"no tensors were given, and the kernels of {op} do not serve all."
    x = tensors[0]
    dtype = autocast_dtype(x) or x.dtype
    if op == "batch_attention":
        head_dim = x.shape[-1]
    if traced():
        return "torch.compile or a transform of torch.func looks on, and sees through PyTorch's operators only."
    if x.device.type == "cuda":
        if torch.version.hip is not None:
            return "the kernels' configurations are for NVIDIA GPUs."
        if torch.cuda.get_device_capability(x.device) < (8, 0):
            return "the GPU's compute capability is below 8.0."
    elif x.device.type != "cpu" or not interpreter or not _interpreted():
        return f"{op} was given tensors on {x.device.type}, and Triton's kernels run on CUDA GPUs."
    if dtype not in DTYPES:
        return f"the kernels of {op} take fp32, fp16 and bf16, not {dtype}."
    if head_dim is not None and (head_dim % 8 or head_dim > MAX_HEAD_DIM):
        return f"the head dimension is {head_dim}; kernels take multiples of 8 up to {MAX_HEAD_DIM}."
    if any(t.numel() == 0 for t in tensors):
        return "a tensor is empty."
    return None


def choose(backend: str, op: str, *tensors: Tensor, head_dim: int | None = None, obstacle: str | None = None) -> Choice:
    """The backend for one call of ``op`` on ``tensors``, for which all depends on the first.

    Args:
        head_dim: of an encoder layer, if known.
        obstacle: why the caller itself rules out a kernel.

    Raises:
        ValueError: an unknown backend, or "triton" for a call that no kernel covers; the message says why.
    """
    check_backend(backend)
    if backend == "torch":
        return Choice("torch", "backend='torch' was asked for.")
    obstacle = obstacle or _obstacle(op, tensors, head_dim, interpreter=backend == "triton")
    if obstacle is None:
        return Choice("triton", TRITON_OPS[op])
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
        head_dim = layers[0].self_attn.head_dim if layers else None
        return choose(backend or what.backend, op, *tensors, head_dim=head_dim, obstacle=reason)
    if what not in OPS:
        raise ValueError(f"what must be one of {', '.join(OPS)} or a module of fastbf, got {what!r}")
    return choose(backend or "auto", what, *tensors)
