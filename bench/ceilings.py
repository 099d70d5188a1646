"""What the device can do at most, measured: a large copy and a large matrix product."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.timing import times


class Ceilings(NamedTuple):
    """Bytes and floating-point operations per second."""

    bytes: float
    flops: float

    def seconds(self, nbytes: float, flops: float) -> float:
        """The least time for that many."""
        return max(nbytes / self.bytes, flops / self.flops)


#: A GPU's dense bf16 products and its copy, both measured on one H100 (docs/design.md). Only for what is computed.
H100 = Ceilings(3.0e12, 800e12)


def measure(device: torch.device, dtype: torch.dtype, seconds: float) -> Ceilings:
    """On this device now: the fastest of many copies, bytes read and written, and of square products of random data."""
    gpu = device.type == "cuda"
    source = torch.empty((1 << 30) if gpu else (1 << 26), device=device).normal_()
    target = torch.empty_like(source)
    size = 8192 if gpu else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    taken = times({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, device, seconds)
    return Ceilings(2 * source.nbytes / min(taken["copy"]), 2 * size**3 / min(taken["product"]))
