"""What the elementwise kernels share: the order of rows, the dropout of a tile, and tile sizes.

A tensor (N, L, C) is a matrix of N · L rows in memory order: sample by sample, or, for layouts like DETR's (L, N, C),
position by position. Nothing is transposed. A kernel finds a row's sample and position, on which dropout depends, by
division.
"""

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl

from fastbf.kernels.limits import Limits


class Rows(NamedTuple):
    """The rows of a tensor (N, L, C), dense in memory."""

    samples: int
    positions: int
    position_major: bool  #: memory holds (L, N, C)
    first: int = 0  #: the first sample's index in the whole batch

    def total(self) -> int:
        """R, the number of rows."""
        return self.samples * self.positions

    def inner(self) -> int:
        """Rows in one step of the outer dimension."""
        return self.samples if self.position_major else self.positions

    def fork(self) -> tuple[int, int]:
        """(s, h): row i, of outer index a, is row i + a · s of a fork in its plain half, i + a · s + h in the mixed."""
        return (self.samples, self.samples) if self.position_major else (0, self.total())


class Tile(NamedTuple):
    """Tile of an elementwise kernel."""

    rows: int
    channels: int
    num_warps: int

    def maxnreg(self) -> int:
        """Registers of a thread, few enough that two programs of 8 warps share a multiprocessor.

        Without a limit, ptxas spills a few values to fit more programs than that.
        """
        return min(128, 2048 // self.num_warps)


# Warps for tiles of up to so many elements; a tile has at least the first number. Backward has few programs, each of
# which needs more loads in flight.
_WARPS = {
    "add_norm_forward": {1024: 4, 2048: 8, 4096: 16, 8192: 32},
    "add_norm_backward": {2048: 8, 8192: 16},
}
ACTIVATION_TILE = Tile(4, 512, 4)


@cache
def norm_tile(kernel: str, channels: int) -> Tile:
    """A tile of whole rows, of several if they are short."""
    width = max(32, 1 << (channels - 1).bit_length())
    warps = _WARPS[kernel]
    rows = max(1, min(warps) // width)
    return Tile(rows, width, warps[min(size for size in warps if size >= rows * width)])


def partial_sums(rows: int, limits: Limits) -> int:
    """The number of partial sums over ``rows``, one a program: of four rows or more, at most two a multiprocessor.

    More of them cost more bytes than their parallelism gains.
    """
    return max(1, min(2 * limits.multiprocessors, rows // 4))


@triton.jit
def place(index, inner, position_major, first):
    """Rows [BM] in memory order → outer index, sample in the whole batch, position (int64)."""
    outer = index // inner
    within = index - outer * inner
    sample = tl.where(position_major != 0, within, outer)
    position = tl.where(position_major != 0, outer, within)
    return outer, first + sample, position.to(tl.int64)
