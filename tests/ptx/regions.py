"""Which bytes of shared memory an instruction touches, as a set: an int with a bit for every four bytes.

Operands of products are laid out as the PTX manual's chapters on wgmma and tcgen05 draw them: rows of 32, 64 or 128
bytes, of which pieces of 16 bytes are permuted (swizzled) among eight rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.ptx.values import Value

WORD = 4
PIECE = 16  #: bytes that swizzling keeps together
WORDS = (1 << 18) // WORD  #: more than a program has
EVERYWHERE = (1 << WORDS) - 1

#: A descriptor's layout → bytes of a row, and which bits of the row's number are added to those of a piece's.
_LAYOUTS_WGMMA = {1: (128, 7), 2: (64, 3), 3: (32, 1)}
_LAYOUTS_TCGEN05 = {2: (128, 7), 4: (64, 3), 6: (32, 1)}


class Operand(NamedTuple):
    """A matrix in shared memory."""

    rows: int
    depth: int  #: elements that a product sums over
    size: int  #: bytes of an element
    transposed: bool  #: a row of memory holds one step of depth


def region(addresses: Value, width: int) -> int:
    """``width`` bytes from each address on; everything if they are not known, or beyond what there is."""
    if addresses is None:
        return EVERYWHERE
    first = np.unique(addresses).astype(np.int64) // WORD
    return _set(first[:, None] + np.arange(-(-width // WORD)))


def operand(descriptor: int, shape: Operand, tcgen05: bool) -> int:
    """What a product reads of an operand; everything if the descriptor's layout has no swizzle."""
    layouts, shift = (_LAYOUTS_TCGEN05, 61) if tcgen05 else (_LAYOUTS_WGMMA, 62)
    if descriptor >> shift not in layouts:
        return EVERYWHERE
    width, mask = layouts[descriptor >> shift]
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    if shape.transposed:
        rows, depth = np.arange(0, shape.rows, PIECE // shape.size)[:, None], np.arange(shape.depth)
        in_memory = width // shape.size
        address = rows % in_memory * shape.size + rows // in_memory * leading + depth % 8 * width + depth // 8 * stride
    else:
        rows, depth = np.arange(shape.rows)[:, None], np.arange(0, shape.depth * shape.size, PIECE)
        address = rows % 8 * width + rows // 8 * stride + depth
    address += start
    address ^= (address >> 7 & mask) << 4
    return _set((address.ravel() // WORD)[:, None] + np.arange(PIECE // WORD))


def _set(words: np.ndarray) -> int:
    if words.size and (words.min() < 0 or words.max() >= WORDS):
        return EVERYWHERE
    bits = np.zeros(WORDS, np.uint8)
    bits[words] = 1
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")
