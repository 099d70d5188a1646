"""The limits of a device, for the pure functions that choose tiles."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

KIB = 1024


class Limits(NamedTuple):
    """The limits of a device."""

    shared_memory: int  #: bytes that a program may use
    multiprocessors: int
    capability: tuple[int, int]
    memory: int  #: bytes


@cache
def device_limits(device: torch.device) -> Limits:
    """The limits of a GPU; for a CPU, where Triton's interpreter runs, those of an H100."""
    if device.type != "cuda":
        return Limits(227 * KIB, 132, (9, 0), 80 * KIB**3)
    properties: Any = torch.cuda.get_device_properties(device)  # the type stub lacks a field
    capability = (properties.major, properties.minor)
    return Limits(
        properties.shared_memory_per_block_optin, properties.multi_processor_count, capability, properties.total_memory
    )
