"""A GPU whose libcuda does nothing (``libcuda.c``), under Triton's own NVIDIA driver and launcher."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.stub import stub_gpu

SOURCE = Path(__file__).with_name("libcuda.c")
NAME = "libcuda.so.1"


def _compiler() -> list[str] | None:
    """The command of the C compiler that Triton takes; None if there is none."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return shlex.split(found) if found else None


def obstacle() -> str | None:
    """Why there is no such GPU here, in a sentence; None if there is."""
    if sys.platform != "linux":
        return "Triton's NVIDIA driver looks for libcuda.so.1, which Linux has"
    if torch.cuda.is_available():
        return "the libcuda of a GPU is in this process's reach"
    if _compiler() is None:
        return "no C compiler builds the libcuda that does nothing"
    return None


def build(folder: Path) -> None:
    """Compiles the library into a folder, with the cuda.h of Triton's wheel."""
    from triton.backends import nvidia

    include = Path(nvidia.__file__).parent / "include"
    flags = ["-shared", "-fPIC", "-O1", "-fvisibility=hidden", f"-Wl,-soname,{NAME}", f"-I{include}"]
    subprocess.run([*(_compiler() or []), *flags, str(SOURCE), "-o", str(folder / NAME)], check=True)


class Library:
    """The library, loaded before Triton looks for it, so that Triton's modules find this one."""

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(str(folder / NAME), mode=ctypes.RTLD_GLOBAL)
        self._library.driver_launches.restype = ctypes.c_char_p

    @property
    def loads(self) -> int:
        """How many modules were loaded."""
        return self._library.driver_loads()

    def launches(self) -> list[str]:
        """A line each: kernel, programs, threads, shared memory, stream, attributes, bytes of the parameters."""
        return self._library.driver_launches().decode().splitlines()

    def be_quiet(self) -> None:
        """From now on launches are not noted: that takes far longer than the launch itself."""
        self._library.driver_be_quiet()

    def forget(self) -> None:
        """Forgets launches and loads."""
        self._library.driver_forget()

    @contextmanager
    def failing(self, call: str, result: int) -> Iterator[None]:
        """Within the context ``call`` returns ``result``; "*" is every call that asks for the device's state."""
        self._library.driver_fail(call.encode(), result)
        try:
            yield
        finally:
            self._library.driver_fail(b"", 0)


def nvidia_driver(capability: tuple[int, int]) -> Any:
    """Triton's NVIDIA driver; what it asks of ``torch.cuda`` is answered here, for a torch without CUDA."""
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda _: 0
            self.get_device_capability = lambda _=None: capability
            self.get_active_torch_device = lambda: torch.device("cpu")

    return Driver()


@contextmanager
def device(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Kernels given CPU tensors are compiled for such a GPU, loaded and launched; those of before are forgotten."""
    from unittest.mock import patch

    from fastbf.kernels import launch

    with patch.dict(launch._compiled, clear=True), stub_gpu(nvidia_driver(capability)):
        kernels = [kernel for kernel in _kernels() if kernel.device_caches]
        for kernel in kernels:
            kernel.device_caches.clear()
        yield
        for kernel in _kernels():
            kernel.device_caches.clear()


def _kernels() -> list[Any]:
    from triton.runtime import JITFunction

    from fastbf.kernels import activation, add_norm, attention, cross_entropy, probe

    modules = (activation, add_norm, attention, cross_entropy, probe)
    return [f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)]
