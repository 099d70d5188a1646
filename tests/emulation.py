"""What the emulator of compiled kernels in ``../shared/ptx`` needs of fastbf's inside; it looks for this file first.

Each name is one place where the emulator's suite reaches inside, and moves with the tree.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from fastbf import backend, functional, repeats, signatures, tape
from fastbf.dropout import Dropout, Site
from fastbf.dropout import attention_mask as materialised_attention_mask
from fastbf.dropout import elementwise_mask as materialised_elementwise_mask
from fastbf.kernels import attention, launch
from fastbf.kernels.attention_configs import TABLE, Config
from fastbf.kernels.limits import Limits
from fastbf.triton_backend import classifier

MEMORY = 80 << 30  #: bytes of an emulated GPU


@contextmanager
def as_on_gpu(shared_memory: int, processors: int, capability: tuple[int, int], tf32: bool) -> Iterator[None]:
    """fastbf takes CPU tensors with ``backend="triton"`` and chooses tiles as for such a GPU; launch caches are apart.

    From one state of the generator both backends make the same dropout decisions, which they need not elsewhere.

    Args:
        shared_memory: bytes that a program may use.
        processors: multiprocessors.
        capability: compute capability, (9, 0) for one.
        tf32: whether fp32 is multiplied as if PyTorch's setting allowed TF32.
    """
    limits, constants = Limits(shared_memory, processors, capability, MEMORY), attention._constants
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("fastbf")]
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "device_limits"):
                stack.enter_context(patch.object(module, "device_limits", lambda _: limits))
        stack.enter_context(patch.object(backend, "_interpreted", lambda: True))
        stack.enter_context(patch.object(functional, "_needs_seed", lambda *_: True))
        stack.enter_context(patch.dict(launch._compiled, clear=True))
        stack.enter_context(patch.dict(signatures._found, clear=True))
        stack.enter_context(patch.dict(repeats.tapes, clear=True))
        stack.enter_context(patch.object(tape, "is_second", lambda *_, **__: False))  # each launch is made as written
        if tf32:
            allowed = {"PRECISION": "tf32"}
            stack.enter_context(patch.object(attention, "_constants", lambda *x: {**constants(*x), **allowed}))
        yield


def attention_mask(p: float, seed: Tensor, dtype: torch.dtype, q: Tensor, m: int) -> Tensor:
    """(L, H, N, M): what attention's weights are multiplied by; 0 where they are dropped."""
    return materialised_attention_mask(Dropout(p, seed, dtype), q, m)


def attention_mask_at(
    p: float, seed: Tensor, dtype: torch.dtype, groups: Tensor, rows: Tensor, m: int, first_key: int
) -> Tensor:
    """[G, N, M]: the same for groups [G, 1] and query rows [1, N] of a larger batch, and its keys from one on."""
    return Dropout(p, seed, dtype).multiplier(Site.ATTENTION, groups, rows, m, first_key)


def elementwise_mask(p: float, seed: Tensor, dtype: torch.dtype, site: str, x: Tensor) -> Tensor:
    """x's shape; ``site`` is a name in :class:`fastbf.dropout.Site`."""
    return materialised_elementwise_mask(Dropout(p, seed, dtype), Site[site], x)


@contextmanager
def classifier_in_chunks(keep: bool) -> Iterator[None]:
    """The loss on kernels goes in chunks of 16 rows; logits are kept if ``keep``, else computed again in backward."""
    with patch.multiple(classifier, MIN_ROWS=16, CHUNK=0, KEPT=int(keep)):
        yield


@contextmanager
def attention_schedule(streaming: bool) -> Iterator[None]:
    """Attention streams, or is packed, whatever the sizes."""
    with patch.object(attention, "schedule", lambda *_: "streaming" if streaming else "packed"):
        yield


def attention_launchers() -> tuple[Callable, Callable]:
    """forward and backward as ranks call them, with ``origin``."""

    def forward(q, k, v, seed, *, scale, threshold, o, lse, origin=(0, 0, 0)):
        attention.forward(q, k, v, attention.Options(scale, seed, threshold, *origin), o=o, lse=lse)

    def backward(do, q, k, v, o, lse, seed, dq, dk, dv, *, scale, threshold, needs=(True,) * 3, origin=(0, 0, 0)):
        options, grads = attention.Options(scale, seed, threshold, *origin), attention.Gradients(dq, dk, dv)
        attention.backward(do, attention.Inputs(q, k, v, o, lse), options, grads, needs)

    return forward, backward


def attention_table() -> dict[tuple[str, int, int], dict[int, tuple[Config, ...]]]:
    """The committed tiles: {(kernel, bytes per element, architecture): {head dimension: configurations}}."""
    return TABLE


@contextmanager
def attention_tile(kernel: str, config: Config) -> Iterator[None]:
    """This kernel takes these tiles, and the others what the table says."""
    choose = attention.choose
    with patch.object(attention, "choose", lambda name, q, m: config if name == kernel else choose(name, q, m)):
        yield
