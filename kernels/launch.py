"""What every launcher shares: the launch itself, and the arguments that dropout adds to a kernel."""

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

from fastbf.kernels.rng import KEEP_ALL, KEEP_BITS, KEEP_HALVES

# Compiled kernels and the values of their compile-time parameters, by all that Triton's own cache goes by. Finding one
# here costs the host a fraction of what Triton's dispatcher takes, which looks at every argument anew.
_compiled: dict[tuple, tuple[CompiledKernel, tuple]] = {}


class BuildError(RuntimeError):
    """A kernel could not be compiled, or not be loaded onto the device."""


def launch(
    kernel, programs: int, device: torch.device, tensors: tuple, numbers: tuple, constants: dict[str, object]
) -> None:  # fmt: skip
    """Runs ``programs`` programs of a kernel on ``device``.

    Args:
        kernel: its parameters are pointers, then numbers that it does not specialise on, then compile-time ones.
        tensors, numbers: the first two, in order.
        constants: the compile-time parameters by name, and options of the launch such as num_warps; of one call site
            always in the same order.

    Raises:
        BuildError: the kernel's first launch with such arguments failed.
    """
    if device.index is not None and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, programs, device, tensors, numbers, constants)
        return
    if not isinstance(kernel, JITFunction):  # Triton's interpreter
        kernel[(programs,)](*tensors, *numbers, **constants)
        return
    addresses = 0
    for t in tensors:
        addresses |= t.data_ptr()
    aligned = addresses % 16 == 0 or tuple([t.data_ptr() % 16 == 0 for t in tensors])
    key = (kernel.fn, device, aligned, *[t.dtype for t in tensors], *constants.values())
    found = _compiled.get(key)
    if found is None:
        try:
            compiled = kernel[(programs,)](*tensors, *numbers, **constants)
        except Exception as error:  # Triton's own, a compiler's, a driver's
            raise BuildError(f"{kernel.fn.__name__}: {type(error).__name__}: {error}") from error
        _compiled[key] = compiled, tuple(constants[p.name] for p in kernel.params if p.is_constexpr)
    else:
        compiled, values = found
        compiled[(programs, 1, 1)](*tensors, *numbers, *values)


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. Triton's own is made for kernels and costs the host a few microseconds."""
    return -(-a // b)


def keep_mode(threshold: int) -> int:
    """How decisions are drawn: ``KEEP`` of ``kernels/rng.py``."""
    return {0: KEEP_ALL, 32768: KEEP_BITS}.get(threshold, KEEP_HALVES).value


def keep_scale(threshold: int) -> float:
    """What a kept element is multiplied by; nothing is kept at 65,536."""
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def seed_or(seed: Tensor | None, stand_in: Tensor) -> Tensor:
    """The seed, or a pointer that is never read where nothing is dropped."""
    return stand_in if seed is None else seed
