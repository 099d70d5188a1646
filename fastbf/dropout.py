"""Dropout's decisions, in PyTorch: a pure function of (seed, site, position, head, row, column).

Philox4x32-7 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) is counter-based. A decision does
not depend on how a tensor is cut into chunks, is the same on every device, and is drawn again in backward instead of
being stored. One Philox call of 128 bits decides for 128 elements at p = 0.5, for 8 at other rates. Without a seed the
words come from PyTorch's default generator, which is quicker.

The layout, which kernels share::

    key      low and high half of the seed
    counter  (column block, row, low half of group, high half of group · 4 + site)
    group    position · H + head   (H = 1 outside attention)
    p = 0.5  column block = column // 128; word (column // 32) % 4; bit column % 32; keep where it is 1
    else     column block = column // 8;   word (column // 2) % 4;  half column % 2; keep where it is ≥ t

t is :func:`drop_threshold`, and p = 0.5 means every p whose t is 32,768. In attention with p ≠ 0.5, bits 1 and 2 of the
column first change places with bits 3 and 4. The eight columns of a call are then those that one GPU thread holds of
32 in a tensor-core product, so that it draws each number that it needs once, in registers (``kernels/rng.py``).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbf.torch_state import traced

_LOW = 0xFFFFFFFF
_ROUNDS = 7
_ALL, _HALF = 65536, 32768  # thresholds of p = 1 and of p = 1/2
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

#: Up to this many words are drawn for a whole layer at once.
_FEW = 1 << 16

_threshold = torch.ops.aten.threshold_backward  # the first argument where the second exceeds the third, else 0

# Views of words as smaller integers have this order.
assert sys.byteorder == "little"


class Site(IntEnum):
    """The four places of an encoder layer where dropout acts (docs/design.md, the mathematics)."""

    ATTENTION = 0
    ATTENTION_OUTPUT = 1
    ACTIVATION = 2
    FEEDFORWARD_OUTPUT = 3


def draw_seed(device: torch.device) -> Tensor:
    """A new int64 seed of shape (1,) on ``device``, from the default generator (obeys ``torch.manual_seed``)."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def drop_threshold(p: float) -> int:
    """How many of 65,536 equally likely 16-bit values mean "drop". The rate applied is this over 65,536."""
    return round(p * _ALL)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], keys: tuple[Tensor, Tensor]) -> Tensor:
    """Philox4x32-7. Counters are int64 tensors of 32-bit values that broadcast, keys those of :func:`round_keys`.

    Returns four words, int32, in a new last dimension.
    """
    return torch.stack(_rounds(*counter, keys), dim=-1).to(torch.int32)


def _rounds(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, keys: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The four words of a Philox call, int64 whose upper halves are undefined."""
    for k0, k1 in zip(*(k.unbind() for k in keys), strict=True):
        # The 64-bit products wrap like unsigned ones. c0 and c2 are cut to 32 bits, because the next round multiplies
        # them. c1 and c3 keep their upper bits, which the next round cuts off.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0 = _xor(p1 >> 32, c1).bitwise_xor_(k0).bitwise_and_(_LOW)
        c2 = _xor(p0 >> 32, c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        c1, c3 = p1, p0
    return list(torch.broadcast_tensors(c0, c1, c2, c3))


def _xor(a: Tensor, b: Tensor) -> Tensor:
    """a ^ b, in a's memory where it fits."""
    return a.bitwise_xor_(b) if a.shape == b.shape else a ^ b


def round_keys(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The two 32-bit keys of every round, int64 (rounds,), from an int64 seed of one element."""
    i = torch.arange(_ROUNDS, device=seed.device)
    return (seed & _LOW) + i * _WEYL[0] & _LOW, (seed >> 32 & _LOW) + i * _WEYL[1] & _LOW


class Dropout:
    """The decisions of one call, as words. An element whose word exceeds ``limit`` is kept, and scaled by ``scale``.

    Args:
        dropout_p: probability of dropping, in [0, 1].
        seed: int64 tensor of one element on the device of the words, never read on the host. None takes words from the
            default generator, in the order of calls.
        dtype: of multipliers.
        first: indices of the first group, sample and key of attention among those that ``seed`` is for.
    """

    def __init__(
        self, dropout_p: float, seed: Tensor | None, dtype: torch.dtype, first: tuple[int, int, int] = (0, 0, 0)
    ) -> None:  # fmt: skip
        self.dropout_p: float = dropout_p
        self.seed: Tensor | None = seed
        self.threshold: int = drop_threshold(dropout_p)
        self.dtype: torch.dtype = dtype
        self.first: tuple[int, int, int] = first
        self.limit: float = self.threshold - _HALF - 0.5
        self.scale: float = 0.0 if self.threshold == _ALL else _ALL / (_ALL - self.threshold)
        self.keys: tuple[Tensor, Tensor] | None = None if seed is None else round_keys(seed)
        if seed is not None and self.threshold == _HALF:  # the bits of every byte as words: 0 for 1, -1 for 0
            bits = torch.arange(256, device=seed.device)[:, None] >> torch.arange(8, device=seed.device)
            self.table: Tensor = ((bits & 1) - 1).to(torch.int16)
        self.reserved: Tensor | None = None
        self.traced: bool = traced()
        #: PyTorch's own dropout decides: a compiler or a transform is active, and no seed is given.
        self.plain: bool = seed is None and self.traced

    def scores(self, shape: Sequence[int], device: torch.device, group: int = 0, row: int = 0) -> Tensor:
        """Words of a piece of attention's scores, (groups, queries, keys), which begins at a group and a row."""
        if self.keys is None:
            return self._drawn(shape, device)
        group, row = group + self.first[0], row + self.first[1]
        groups = torch.arange(group, group + shape[0], device=device)[:, None]
        rows = torch.arange(row, row + shape[1], device=device)
        return self.words(Site.ATTENTION, groups, rows, shape[2], self.first[2])

    def elements(self, site: Site, shape: Sequence[int], device: torch.device) -> Tensor:
        """Words of a tensor (N, …, C) at one of the elementwise sites."""
        if self.keys is None:
            return self._drawn(shape, device)
        positions = torch.arange(math.prod(shape[1:-1]), device=device).view(shape[1:-1])
        rows = torch.arange(self.first[1], self.first[1] + shape[0], device=device)
        return self.words(site, positions, rows.view(-1, *[1] * (len(shape) - 2)), shape[-1])

    def multipliers(self, sites: Sequence[tuple[Site, Sequence[int]]], device: torch.device) -> list[Tensor]:
        """:meth:`as_multiplier` of tensors (N, …, C) at elementwise sites; without a seed they are drawn at once."""
        if self.plain:
            return [F.dropout(torch.ones(s, dtype=self.dtype, device=device), self.dropout_p) for _, s in sites]
        if self.keys is not None:
            return [self.as_multiplier(self.elements(*site, device)) for site in sites]
        sizes = [math.prod(shape) for _, shape in sites]
        parts = self.as_multiplier(self._drawn((sum(sizes),), device)).split_with_sizes(sizes)
        return [part.view(shape) for part, (_, shape) in zip(parts, sites, strict=True)]

    def reserve(self, count: int, device: torch.device) -> None:
        """Draws the next ``count`` words at once, if they are few, which costs the host less. Without a seed only."""
        if self.keys is None and not self.plain and count <= _FEW:
            self.reserved = self._drawn((count,), device)

    def _drawn(self, shape: Sequence[int], device: torch.device) -> Tensor:
        count = math.prod(shape)
        if self.reserved is not None and len(self.reserved) >= count:
            words, rest = self.reserved.split((count, len(self.reserved) - count))
            self.reserved = rest if len(rest) else None  # which frees memory
            return words.view(shape)
        # Generators are quickest at 64-bit numbers, which hold several words each. At p = 0.5 a byte is a word.
        kind, each = (torch.int8, 8) if self.threshold == _HALF else (torch.int16, 4)
        numbers = torch.empty(-(-count // each), dtype=torch.int64, device=device).random_(-(2**63), None)
        return numbers.view(kind)[:count].view(shape)

    def words(self, site: Site, group: Tensor, row: Tensor, columns: int, first_column: int = 0) -> Tensor:
        """The words of all columns of the given rows, from the seed.

        Args:
            site: where in the layer.
            group: int64, position · H + head.
            row: int64, the query's or the sample's index along the batch. Broadcasts with ``group``.
            columns: number of keys or channels.
            first_column: the first of them, a multiple of 128.

        Returns:
            (*broadcast shape of group and row, columns), int16.
        """
        shape = torch.broadcast_shapes(group.shape, row.shape)
        swapped = self.threshold != _HALF and site == Site.ATTENTION
        per_call = 128 if self.threshold == _HALF else 8
        # If swapped, four calls serve 32 columns; up to eight columns need fewer calls.
        calls = min(-(-columns // 2), 4 * -(-columns // 32)) if swapped else -(-columns // per_call)
        block = torch.arange(calls, device=group.device) + first_column // per_call
        group, row = group[..., None], row[..., None]
        assert self.keys is not None
        four = _rounds(block, row & _LOW, group & _LOW, (group >> 32) * 4 + int(site), self.keys)
        if swapped:
            four = [w.unflatten(-1, (-1, min(4, calls))) for w in four]
        words = torch.stack(four, dim=-2 if swapped else -1).to(torch.int32).flatten(len(shape))
        if self.threshold == _HALF:
            byte = words.view(torch.uint8)[..., : -(-columns // 8)]
            words = self.table.index_select(0, byte.flatten().to(torch.int32))
            return words.view(*shape, byte.shape[-1] * 8)[..., :columns]
        return words.view(torch.int16)[..., :columns] ^ -_HALF  # keeps the order of unsigned numbers

    def multiplier(self, site: Site, group: Tensor, row: Tensor, columns: int, first_column: int = 0) -> Tensor:
        """:meth:`as_multiplier` of :meth:`words`."""
        return self.as_multiplier(self.words(site, group, row, columns, first_column))

    def as_multiplier(self, words: Tensor) -> Tensor:
        """What dropout multiplies by: 0 where dropped, ``scale`` where kept, in ``dtype``."""
        wide = torch.promote_types(self.dtype, torch.float32)  # holds a word
        scale = torch.full((), self.scale, dtype=wide, device=words.device)
        return _threshold(scale, words, self.limit).to(self.dtype)


def attention_mask(dropout: Dropout, q: Tensor, num_keys: int) -> Tensor:
    """The whole multiplier (…, H, N, M) of an attention call whose queries are q (N, …, H, D)."""
    shape = (*q.shape[1:-1], q.shape[0], num_keys)
    if dropout.plain:
        return F.dropout(torch.ones(shape, dtype=dropout.dtype, device=q.device), dropout.dropout_p)
    return dropout.as_multiplier(dropout.scores((math.prod(shape[:-2]), *shape[-2:]), q.device)).view(shape)


def elementwise_mask(dropout: Dropout, site: Site, x: Tensor) -> Tensor:
    """The multiplier for a tensor x (N, …, C) at one of the elementwise sites."""
    return dropout.multipliers([(site, x.shape)], x.device)[0]
