"""The shared classifier's loss, linear + cross-entropy of a fork, forward and backward: workloads and providers.

Beside fastbf and plain PyTorch: ``torch.compile``, PyTorch's ``linear_cross_entropy`` in chunks, and two published
fused losses, which are optional: ``pip install liger-kernel cut-cross-entropy``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbf.functional import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Unavailable(RuntimeError):
    """Why a provider cannot serve a workload here."""


class Workload(NamedTuple):
    m: int  # rows of the fork, 2N
    c: int  # channels
    k: int  # classes

    def __str__(self) -> str:
        return f"2N={self.m} C={self.c} K={self.k}"

    def tensors(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features (2N, C), the classifier's weight (K, C) and bias (K,), which want gradients, and N class indices."""
        x, w = torch.randn(self.m, self.c, device=device), torch.randn(self.k, self.c, device=device) * self.c**-0.5
        tensors = (t.to(dtype).requires_grad_() for t in (x, w, torch.zeros(self.k, device=device)))
        return *tensors, torch.randint(0, self.k, (self.m // 2,), device=device)


CPU_WORKLOADS = (Workload(256, 2048, 1000), Workload(2048, 512, 8142), Workload(1024, 512, 50_000))
#: The paper's classifiers at its batches and at large ones, and a vocabulary.
GPU_WORKLOADS = (
    Workload(1024, 64, 100),
    Workload(512, 2048, 1000),
    Workload(1024, 2048, 8142),
    Workload(8192, 512, 1000),
    Workload(65_536, 512, 8142),
    Workload(16_384, 2048, 128_000),
)


def _plain(x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w, b), torch.cat([y, y]))


def _fastbf(x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return linear_cross_entropy(x, w, y, linear_bias=b)


def _compiled(_: Workload, device: torch.device) -> Loss:
    return torch.compile(_plain)


def _pytorch_chunks(_: Workload, device: torch.device) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy; 2.13 has")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, w, b, y: F.linear_cross_entropy(x, w, torch.cat([y, y]), linear_bias=b, options=options)


def _liger(_: Workload, device: torch.device) -> Loss:
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise Unavailable(f"liger-kernel: {error}") from error
    if device.type != "cuda":
        raise Unavailable("liger-kernel needs a GPU")
    return lambda x, w, b, y: liger_fused_linear_cross_entropy(x, w, torch.cat([y, y]), b)


def _cut(_: Workload, device: torch.device) -> Loss:
    """Without the bias, which it does not take."""
    try:
        from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy
    except ImportError as error:
        raise Unavailable(f"cut-cross-entropy: {error}") from error
    if device.type != "cuda":
        raise Unavailable("cut-cross-entropy's kernels need a GPU")
    return lambda x, w, b, y: cut_cross_entropy(x, w, torch.cat([y, y])) + 0 * b.sum()


PROVIDERS: dict[str, Callable[[Workload, torch.device], Loss]] = {
    "plain": lambda *_: _plain,
    "fastbf": lambda *_: _fastbf,
    "torch.compile": _compiled,
    "F.linear_cross_entropy": _pytorch_chunks,
    "liger": _liger,
    "cut-cross-entropy": _cut,
}


def make_step(provider: str, w: Workload, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """A closure that computes the loss and its gradients, those of the step before released.

    Raises:
        Unavailable: the provider is not installed, or not for this device; or its loss is not plain PyTorch's.
    """
    loss, tensors = PROVIDERS[provider](w, device), w.tensors(device, dtype)
    with torch.no_grad():
        error = (loss(*tensors).double() / _plain(*tensors).double() - 1).abs().item()
    if not error < 0.01:
        raise Unavailable(f"{provider} computes another loss: off by {error:.1%}")

    def step() -> None:
        for t in tensors:
            t.grad = None
        loss(*tensors).backward()

    return step
