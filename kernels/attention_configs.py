"""Tile sizes of the attention kernels: one table, and one pure function that reads it.

A key is (kernel, bytes per element, architecture): 80 stands for every GPU that gives a program at least 99 KiB of
shared memory (Ampere, Ada, consumer Blackwell), 90 for Hopper and 100 for data-centre Blackwell, with 227 KiB. A value
has, for head dimensions up to a number, tiles from the largest to the smallest. :func:`config_for` takes the first
that keeps every multiprocessor busy, and of packed tiles the one that whole groups fill best. ``block_d`` is the chunk
that the head dimension is cut into. Every entry is compiled ahead of time by ``make aot``, which refuses spilled
registers, more shared memory than there is, and unguarded asynchronous work: on Hopper, tiles of backward_key_value
with fewer than 64 queries, 64 keys or more and two stages or more (docs/triton-wgmma.md).

Chosen by counts, not timed on a GPU (``python -m bench tiles --counted``), in 16 bits: both packed kernels of 80 and
90; forward_streaming of 80 from 64 on, and of 90 for 32, 384, 512 and few rows of 256; backward_query of 80, and of 90
for 32, 64, 256 and 512; backward_key_value of 80, and of 90 for 32, 64, 512 and few keys of 96. In fp32
backward_key_value of 80 for 128.
"""

from __future__ import annotations

from typing import NamedTuple

from fastbf.kernels.limits import KIB, Limits

PACKED_ROWS = 32


class Config(NamedTuple):
    """Tiles of one kernel."""

    block_m: int  #: queries
    block_n: int  #: keys
    block_d: int  #: channels in a chunk
    num_warps: int
    num_stages: int  #: of the software pipeline over the loop
    reload: bool = False  #: backward: load tiles in chunks and for each product again, not whole and once


TABLE: dict[tuple[str, int, int], dict[int, tuple[Config, ...]]] = {
    ("forward_streaming", 2, 80): {
        32: (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 2), Config(16, 128, 32, 4, 3)),
        64: (Config(128, 32, 64, 4, 3), Config(64, 32, 64, 2, 2), Config(16, 128, 64, 4, 3)),
        128: (Config(128, 64, 64, 8, 2), Config(64, 64, 64, 4, 2), Config(16, 128, 128, 4, 2)),
        256: (Config(128, 16, 128, 8, 2), Config(64, 16, 64, 4, 2), Config(16, 64, 128, 4, 2)),
        512: (Config(32, 32, 64, 4, 2), Config(16, 32, 256, 4, 2)),
    },
    ("forward_streaming", 2, 90): {
        32: (Config(128, 64, 32, 4, 3), Config(64, 64, 32, 4, 2), Config(16, 64, 32, 4, 3)),
        64: (Config(128, 128, 64, 8, 3), Config(64, 64, 64, 4, 2), Config(16, 128, 64, 4, 3)),
        128: (Config(128, 64, 64, 8, 3), Config(64, 64, 128, 4, 2), Config(16, 128, 128, 4, 3)),
        256: (Config(128, 64, 128, 8, 2), Config(16, 64, 128, 4, 2)),
        384: (Config(128, 32, 64, 8, 2), Config(32, 32, 128, 4, 2), Config(16, 64, 128, 4, 2)),
        512: (Config(64, 32, 512, 8, 2), Config(16, 32, 256, 4, 2)),
    },
    ("forward_streaming", 2, 100): {
        32: (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 2), Config(16, 128, 32, 4, 3)),
        64: (Config(128, 32, 64, 8, 3), Config(64, 64, 64, 4, 2), Config(16, 128, 64, 4, 3)),
        128: (Config(128, 64, 64, 8, 3), Config(64, 64, 128, 4, 2), Config(16, 128, 64, 4, 3)),
        256: (Config(128, 32, 128, 8, 2), Config(16, 128, 128, 8, 2)),
        512: (Config(32, 32, 256, 8, 2), Config(16, 64, 256, 8, 2)),
    },
    ("forward_streaming", 4, 80): {
        64: (Config(32, 32, 64, 4, 2),),
        128: (Config(64, 16, 64, 8, 2),),
        256: (Config(32, 16, 64, 4, 2),),
        512: (Config(16, 16, 64, 8, 2),),
    },
    ("forward_streaming", 4, 90): {
        64: (Config(32, 32, 64, 4, 2),),
        128: (Config(32, 32, 64, 4, 2),),
        256: (Config(32, 16, 64, 4, 2),),
        512: (Config(32, 16, 64, 8, 2),),
    },
    ("forward_streaming", 4, 100): {
        64: (Config(32, 32, 64, 4, 2),),
        128: (Config(32, 32, 64, 4, 2),),
        256: (Config(32, 16, 64, 4, 2),),
        512: (Config(32, 16, 64, 8, 2),),
    },
    ("backward_query", 2, 80): {
        32: (Config(128, 32, 32, 4, 3), Config(64, 64, 32, 2, 2), Config(16, 128, 32, 4, 3)),
        64: (Config(128, 32, 64, 4, 3), Config(64, 32, 64, 2, 2), Config(16, 128, 64, 4, 2)),
        128: (Config(128, 32, 64, 8, 2), Config(64, 32, 64, 4, 2), Config(16, 128, 128, 4, 2)),
        256: (Config(64, 16, 64, 4, 2), Config(16, 64, 128, 8, 2)),
        512: (Config(16, 32, 128, 4, 2),),
    },
    ("backward_query", 2, 90): {
        32: (Config(128, 64, 32, 4, 3), Config(64, 64, 32, 4, 2), Config(16, 128, 32, 4, 3)),
        64: (Config(128, 32, 64, 4, 3), Config(64, 64, 64, 4, 2), Config(16, 128, 64, 4, 3)),
        128: (Config(128, 64, 128, 8, 3), Config(64, 64, 128, 4, 2), Config(16, 128, 128, 4, 3)),
        256: (Config(64, 32, 64, 4, 2), Config(16, 64, 128, 8, 2)),
        512: (Config(64, 16, 512, 8, 2), Config(32, 64, 256, 8, 2), Config(16, 64, 128, 8, 2)),
    },
    ("backward_query", 2, 100): {
        32: (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 4, 2), Config(16, 128, 32, 4, 3)),
        64: (Config(128, 64, 64, 8, 3), Config(64, 64, 64, 4, 2), Config(16, 128, 64, 4, 3)),
        128: (Config(128, 64, 128, 8, 3), Config(64, 64, 128, 4, 2), Config(16, 128, 128, 4, 3)),
        256: (Config(32, 32, 256, 8, 2), Config(16, 64, 128, 8, 2)),
        512: (Config(32, 64, 256, 8, 2), Config(16, 32, 256, 8, 2)),
    },
    ("backward_query", 4, 80): {
        64: (Config(32, 32, 64, 8, 2),),
        128: (Config(32, 32, 64, 8, 2),),
        256: (Config(16, 16, 64, 4, 2),),
        512: (Config(16, 16, 32, 8, 2, True),),
    },
    ("backward_query", 4, 90): {
        64: (Config(32, 32, 64, 8, 2),),
        128: (Config(32, 32, 64, 4, 2),),
        256: (Config(32, 16, 64, 8, 2),),
        512: (Config(32, 16, 256, 16, 2),),
    },
    ("backward_query", 4, 100): {
        64: (Config(32, 32, 64, 4, 2),),
        128: (Config(32, 32, 64, 4, 2),),
        256: (Config(32, 16, 128, 8, 2),),
        512: (Config(32, 16, 256, 16, 2),),
    },
    ("backward_key_value", 2, 80): {
        32: (Config(32, 64, 32, 2, 3), Config(64, 16, 32, 2, 3)),
        64: (Config(64, 32, 64, 2, 2), Config(64, 16, 64, 2, 3)),
        128: (Config(16, 64, 128, 4, 2), Config(32, 16, 128, 2, 2)),
        256: (Config(16, 64, 128, 8, 2), Config(32, 16, 128, 4, 2)),
        512: (Config(32, 16, 32, 4, 2),),
    },
    # For 65 to 256 channels the first tiles have the least counted cost of those that are safe and spill nothing.
    ("backward_key_value", 2, 90): {
        32: (Config(64, 64, 32, 4, 3), Config(128, 16, 32, 4, 3)),
        64: (Config(64, 64, 64, 4, 2), Config(128, 16, 64, 4, 3)),
        96: (Config(128, 64, 32, 8, 2), Config(64, 16, 32, 4, 2)),
        128: (Config(128, 64, 32, 8, 1), Config(128, 16, 128, 8, 3)),
        256: (Config(32, 64, 32, 8, 1), Config(128, 16, 128, 8, 2)),
        512: (Config(64, 32, 256, 8, 2), Config(64, 16, 128, 8, 2)),
    },
    ("backward_key_value", 2, 100): {
        32: (Config(128, 64, 32, 8, 3), Config(128, 16, 32, 4, 3)),
        64: (Config(128, 64, 64, 8, 3), Config(64, 16, 64, 4, 3)),
        128: (Config(32, 64, 128, 8, 3), Config(128, 16, 64, 8, 3)),
        256: (Config(32, 64, 128, 8, 2), Config(32, 16, 128, 4, 2)),
        512: (Config(16, 32, 256, 8, 2), Config(32, 16, 256, 8, 2)),
    },
    ("backward_key_value", 4, 80): {
        64: (Config(32, 16, 64, 4, 2),),
        128: (Config(16, 16, 128, 4, 2),),
        256: (Config(16, 16, 64, 4, 3),),
        512: (Config(16, 16, 128, 8, 2, True),),
    },
    ("backward_key_value", 4, 90): {
        64: (Config(16, 32, 64, 8, 2),),
        128: (Config(16, 64, 32, 8, 1),),
        256: (Config(16, 32, 64, 8, 2),),
        512: (Config(16, 16, 128, 8, 2, True),),
    },
    ("backward_key_value", 4, 100): {
        64: (Config(16, 32, 64, 8, 2),),
        128: (Config(16, 16, 64, 4, 2),),
        256: (Config(16, 32, 64, 8, 2),),
        512: (Config(16, 16, 64, 8, 2, True),),
    },
    ("forward_packed", 2, 80): {
        32: (Config(32, 32, 32, 1, 1),),
        64: (Config(16, 16, 32, 1, 1), Config(32, 32, 32, 1, 1)),
        512: (Config(16, 16, 64, 1, 1), Config(32, 32, 32, 1, 1)),
    },
    ("forward_packed", 2, 90): {
        32: (Config(32, 32, 32, 1, 1),),
        64: (Config(16, 16, 32, 1, 1), Config(32, 32, 32, 1, 1)),
        512: (Config(16, 16, 64, 1, 1), Config(32, 32, 32, 1, 1)),
    },
    ("forward_packed", 2, 100): {
        32: (Config(32, 32, 32, 4, 1),),
        64: (Config(32, 32, 64, 4, 1),),
        512: (Config(32, 32, 64, 4, 1),),
    },
    ("forward_packed", 4, 80): {
        512: (Config(32, 32, 32, 8, 1),),
    },
    ("forward_packed", 4, 90): {
        512: (Config(32, 32, 32, 8, 1),),
    },
    ("forward_packed", 4, 100): {
        512: (Config(32, 32, 32, 8, 1),),
    },
    ("backward_packed", 2, 80): {
        32: (Config(16, 16, 32, 1, 1), Config(32, 32, 32, 2, 1)),
        64: (Config(16, 16, 64, 1, 1), Config(32, 32, 64, 2, 1)),
        512: (Config(16, 16, 64, 1, 1), Config(32, 32, 32, 2, 1)),
    },
    ("backward_packed", 2, 90): {
        32: (Config(16, 16, 32, 1, 1), Config(32, 32, 32, 2, 1)),
        64: (Config(16, 16, 64, 1, 1), Config(32, 32, 64, 2, 1)),
        512: (Config(16, 16, 64, 1, 1), Config(64, 64, 64, 4, 1)),
    },
    ("backward_packed", 2, 100): {
        32: (Config(32, 32, 32, 4, 1),),
        64: (Config(32, 32, 64, 4, 1),),
        512: (Config(32, 32, 32, 4, 1),),
    },
    ("backward_packed", 4, 80): {
        512: (Config(32, 32, 16, 8, 1),),
    },
    ("backward_packed", 4, 90): {
        512: (Config(32, 32, 16, 8, 1),),
    },
    ("backward_packed", 4, 100): {
        512: (Config(32, 32, 16, 8, 1),),
    },
}


def schedule(n: int, m: int) -> str:
    """ "packed" for tiny batches, several of which share a tile, else "streaming"."""
    return "packed" if max(n, m) <= PACKED_ROWS else "streaming"


def packed_slots(config: Config, n: int, m: int) -> int:
    """How many whole groups of n queries and m keys fit a packed tile."""
    return min(config.block_m // n, config.block_n // m)


def key_value_passes(config: Config) -> tuple[tuple[bool, bool], ...]:
    """Which of (dk, dv) each launch of backward_key_value computes. With ``reload`` registers hold only one."""
    return ((True, False), (False, True)) if config.reload else ((True, True),)


def transposes(config: Config) -> bool:
    """Whether backward_key_value computes scores keys by queries.

    With more warps than tensor-core tiles of 16 queries several would else compute the same scores. What has more
    queries than keys is then wider than high, like the products that follow, and each warp gets columns of its own.
    """
    return not config.reload and config.block_n < config.block_m < 16 * config.num_warps


def architecture(limits: Limits) -> int:
    """The architecture in the table's keys."""
    if limits.shared_memory < 227 * KIB:
        return 80
    return 90 if limits.capability < (10, 0) else 100


def config_for(kernel: str, n: int, m: int, groups: int, head_dim: int, itemsize: int, limits: Limits) -> Config:
    """The tiles for n queries and m keys in each of ``groups`` problems.

    Args:
        kernel: name of a kernel in attention.py.
        head_dim: at most 512.
        itemsize: bytes per element, 2 or 4.
        limits: of the device.
    """
    by_head_dim = TABLE[kernel, itemsize, architecture(limits)]
    configs = by_head_dim[min(d for d in by_head_dim if d >= head_dim)]
    if kernel.endswith("packed"):
        return max(configs, key=lambda config: packed_slots(config, n, m) / (config.block_m + config.block_n))
    for config in configs:
        block, rows = (config.block_n, m) if kernel == "backward_key_value" else (config.block_m, n)
        if groups * -(-rows // block) >= limits.multiprocessors and block < 2 * rows:
            return config
    return configs[-1]
