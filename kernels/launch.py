"""What every launcher shares: the launch itself, and the arguments that dropout adds to a kernel."""

from contextlib import nullcontext

import torch
from torch import Tensor

from fastbf.kernels.rng import KEEP_ALL, KEEP_BITS, KEEP_HALVES


def launch(kernel, programs: int, device: torch.device, arguments: tuple, constants: dict[str, object]) -> None:
    """Runs ``programs`` programs of a kernel on ``device``; ``constants`` hold num_warps and num_stages too."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, **constants)


def keep_mode(threshold: int) -> int:
    """How decisions are drawn: ``KEEP`` of ``kernels/rng.py``."""
    return {0: KEEP_ALL, 32768: KEEP_BITS}.get(threshold, KEEP_HALVES).value


def keep_scale(threshold: int) -> float:
    """What a kept element is multiplied by; nothing is kept at 65,536."""
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def seed_or(seed: Tensor | None, stand_in: Tensor) -> Tensor:
    """The seed, or a pointer that is never read where nothing is dropped."""
    return stand_in if seed is None else seed
