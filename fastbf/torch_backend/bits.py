"""Flags as bits, eight in a byte, by products of 64-bit integers.

Byte i of a 64-bit number, from 0 to 7, holds flag i at bit 8i. The factor has the bits 9k. Bit 8i + 9k of the product
is flag i, which for k = 7 - i is one of the upper eight. No two of these numbers are equal, so that nothing carries.
The same factor takes bit 7 - i of a byte back to bit 8i + 7.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_FACTOR = 0x8040201008040201 - (1 << 64)  # as a signed number
_ONES = 0x0101010101010101

# Views of eight bytes as one number have this order.
assert sys.byteorder == "little"


def pack(flags: Tensor) -> Tensor:
    """Flags, bool of any shape, as uint8 (⌈n / 8⌉,)."""
    flags = flags.flatten()
    flags = F.pad(flags, (0, -len(flags) % 8)) if len(flags) % 8 else flags
    return flags.view(torch.int64).mul(_FACTOR).bitwise_right_shift_(56).to(torch.uint8)


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Flags of a shape, int8 of 0 and 1, from what :func:`pack` returned."""
    numbers = bits.to(torch.int64).mul_(_FACTOR).bitwise_right_shift_(7).bitwise_and_(_ONES)
    return numbers.view(torch.int8)[: math.prod(shape)].view(shape)


def size(count: int) -> int:
    """The bytes of ``count`` flags."""
    return -(-count // 8)
