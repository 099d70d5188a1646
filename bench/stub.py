"""A GPU that does nothing: Triton compiles for it and launches on it, so that what a launch costs the host shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from fastbf import backend, repeats, signatures


class _Driver:
    """What Triton asks of a driver."""

    def __init__(self) -> None:
        self.launches = 0
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), 0, 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 227 << 10},
        )

    def launcher_cls(self, source: object, metadata: object) -> object:
        def run(*_: object) -> None:
            self.launches += 1

        return run

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _forget() -> None:
    """What is known of a signature, and its launches, are this driver's."""
    signatures.forget()
    repeats.forget()


@contextmanager
def stub_gpu(driver: Any = None) -> Iterator[Any]:
    """Kernels given CPU tensors are compiled for a device that does nothing and launched on it.

    driver: what Triton asks; by default one for sm_90 that counts launches.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("unset TRITON_INTERPRET: the interpreter takes the place of what is measured")
    driver, interpreted = driver or _Driver(), backend._interpreted
    _forget()
    triton.runtime.driver.set_active(driver)
    backend._interpreted = lambda: True
    try:
        yield driver
    finally:
        _forget()
        backend._interpreted = interpreted
        triton.runtime.driver._active = None
