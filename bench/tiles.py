"""Attention's table of tiles, and candidates for it: a grid, pruned by what a device allows, the likely ones first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bench.workloads import HEADS
from fastbf.kernels.attention_configs import TABLE, Config, architecture, config_for, packed_slots, schedule
from fastbf.kernels.launch import cdiv
from fastbf.kernels.limits import Limits

#: Of every kernel, its matrix products.
PRODUCTS = {
    "forward_streaming": 2, "backward_query": 3, "backward_key_value": 4, "forward_packed": 2, "backward_packed": 5,
}  # fmt: skip
#: (bytes per element, head dimension, N, L), the most valuable first.
SHAPES = (
    (2, 512, 256, 1), (2, 512, 512, 1), (2, 512, 4096, 1), (2, 512, 16_384, 1),
    (2, 128, 512, 1), (2, 128, 4096, 1), (2, 128, 32_768, 1),
    (2, 64, 512, 1), (2, 64, 4096, 1), (2, 16, 512, 1), (2, 32, 4096, 1), (2, 256, 512, 1), (2, 256, 4096, 1),
    (2, 96, 128, 197), (2, 64, 2, 1064), (2, 64, 3, 17_821),
    (4, 512, 512, 1), (4, 128, 512, 1), (4, 128, 4096, 1), (4, 64, 2, 1064),
)  # fmt: skip
CANDIDATES = 24  #: of a kernel and shape, at most
LIVE_VALUES = 208  #: fp32 accumulators and scores that a thread's 255 registers hold beside operands and addresses
STEP = 1.3  #: how much slower each doubling away from the table's entries is believed to be


class Case(NamedTuple):
    """A kernel on a shape: attention of N queries to N keys, at each of L positions, in each of ``HEADS`` heads."""

    kernel: str
    head_dim: int
    itemsize: int
    architecture: int  #: as in the table's keys
    n: int
    positions: int

    @property
    def packed(self) -> bool:
        return self.kernel.endswith("packed")

    @property
    def shape(self) -> str:
        return f"head_dim {self.head_dim}, N={self.n}" + (f", L={self.positions}" if self.positions > 1 else "")

    def __str__(self) -> str:
        return f"{self.kernel}, {self.itemsize} bytes, {self.shape}"


def text(config: Config) -> str:
    """As in the table."""
    return f"Config({', '.join(map(str, config if config.reload else config[:5]))})"


def entries(
    kernels: Sequence[str], architectures: Sequence[int], head_dims: Sequence[int], itemsizes: Sequence[int], n: int
) -> list[tuple[Case, Config]]:
    """The table's, at N = n, or at N = 2 where a kernel is packed; of every head dimension if none is named."""
    every = [
        (Case(kernel, head_dim, itemsize, here, 2 if kernel.endswith("packed") else n, 1), config)
        for (kernel, itemsize, here), by_head_dim in TABLE.items()
        for head_dim, configs in by_head_dim.items()
        for config in configs
    ]
    return [
        (case, config)
        for case, config in every
        if case.kernel in kernels and case.architecture in architectures and case.itemsize in itemsizes
        if not head_dims or case.head_dim in head_dims
    ]


def show(table: Sequence[tuple[Case, Config]]) -> None:
    """Prints entries."""
    print(f"{'kernel':<19}{'bytes':>5}{'sm':>5}{'D':>5}  tile")
    for case, config in table:
        print(f"{case.kernel:<19}{case.itemsize:>5}{case.architecture:>5}{case.head_dim:>5}  {text(config)}")


def cases(limits: Limits) -> list[Case]:
    """Every kernel on every shape that it serves."""
    here = architecture(limits)
    every = [Case(kernel, d, size, here, n, l) for size, d, n, l in SHAPES for kernel in PRODUCTS]
    return [case for case in every if case.packed == (schedule(case.n, case.n) == "packed")]


def candidates(case: Case, limits: Limits) -> list[Config]:
    """The table's present choice, then those of a grid that may run, the likely ones first."""
    groups = case.positions * HEADS
    present = config_for(case.kernel, case.n, case.n, groups, case.head_dim, case.itemsize, limits)
    likely = sorted((c for c in _grid(case) if fits(case, c, limits)), key=lambda c: _expected(case, c, limits))
    return [present, *(config for config in likely if config != present)][:CANDIDATES]


def _grid(case: Case) -> Iterator[Config]:
    rows, narrow, wide = (16, 32, 64, 128), min(32, case.head_dim), max(32, 1 << (case.head_dim - 1).bit_length())
    sizes = (16, 32, 64, 128, 256, 512) if case.kernel == "forward_streaming" else (16, 32, 64, 128, 256)
    chunks = [d for d in sizes if narrow <= d <= wide and case.head_dim <= 8 * d]
    reload = (False, True) if case.kernel in ("backward_query", "backward_key_value") else (False,)
    return itertools.starmap(Config, itertools.product(rows, rows, chunks, (1, 2, 4, 8), (1, 2, 3, 4), reload))


def _expected(case: Case, config: Config, limits: Limits) -> float:
    """Something like a time, to sort by: what the busiest multiprocessor has to do, and how unusual the tile is.

    A cycle is worth 2048 products or 32 bytes, a step of the loop 1000 cycles of waiting.
    """
    own, other = config[:2] if case.kernel != "backward_key_value" else config[1::-1]
    tiles = case.positions * HEADS * cdiv(case.n, own)
    if case.packed:
        tiles = cdiv(case.positions * HEADS, packed_slots(config, case.n, case.n))
    moved = 2 * (own + other if case.packed or config.reload else other) * case.itemsize / 32
    work = max(PRODUCTS[case.kernel] * own * other / 2048, moved) * _channels(case, config)
    cycles = cdiv(case.n, other) * (cdiv(tiles, limits.multiprocessors) * work + 1000)
    by_head_dim = TABLE[case.kernel, case.itemsize, case.architecture]
    entries = by_head_dim[min(d for d in by_head_dim if d >= case.head_dim)]
    return cycles * STEP ** min(_distance(config, entry) for entry in entries)


def _distance(a: Config, b: Config) -> float:
    """Doublings between two tiles, of rows, channels, warps and stages; loading again counts as one."""
    return sum(abs(math.log2(x / y)) for x, y in zip(a[:5], b[:5], strict=True)) + (a.reload != b.reload)


def fits(case: Case, config: Config, limits: Limits) -> bool:
    """Whether shared memory and registers may do, and no tile is made for twice as many samples as there are."""
    m, n = config[:2]
    # Packed, there are as many queries as keys: in a tile that is not square some places are idle.
    sized = m == n and packed_slots(config, case.n, case.n) > 0 if case.packed else max(m, n) < 2 * case.n
    room = shared_memory(case, config, limits) <= limits.shared_memory
    return sized and room and live_values(case, config) <= LIVE_VALUES


def shared_memory(case: Case, config: Config, limits: Limits) -> int:
    """Bytes that a program's tiles take at least: what it keeps, and what the pipeline over its loop holds.

    That is a buffer for each stage but one; a stage more where Hopper's asynchronous products, which take tiles of 64
    rows, still read a buffer.
    """
    kept, streamed, _, width = _rows(case, config)
    rows = min(config[:2]) if case.kernel == "backward_key_value" else config.block_m
    hopper = limits.capability[0] == 9 and case.itemsize == 2 and rows >= 64 and config.num_warps >= 4
    return (kept + streamed * max(1, config.num_stages - (not hopper))) * width * case.itemsize


def live_values(case: Case, config: Config) -> float:
    """Fp32 accumulators and scores, in a thread."""
    scores = config.block_m * config.block_n * (1 if case.kernel.startswith("forward") else 2)
    _, _, accumulated, _ = _rows(case, config)
    width = config.block_d if case.packed else _channels(case, config)
    return (accumulated * width + scores) / (32 * config.num_warps)


def _rows(case: Case, config: Config) -> tuple[int, int, int, int]:
    """Rows kept, streamed and accumulated, and how many channels of the first two are in shared memory."""
    m, n, chunk = config[:3]
    if config.reload:
        return 0, m + n, n if case.kernel == "backward_key_value" else m, chunk
    if case.packed:
        return 0, m + n, m, chunk
    return {
        "forward_streaming": (m, 2 * n, m, _channels(case, config)),
        "backward_query": (2 * m, 2 * n, m, _channels(case, config)),
        "backward_key_value": (2 * n, 2 * m, 2 * n, _channels(case, config)),
    }[case.kernel]


def _channels(case: Case, config: Config) -> int:
    """The head dimension, in whole chunks."""
    return cdiv(case.head_dim, config.block_d) * config.block_d
