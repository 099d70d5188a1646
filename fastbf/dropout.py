"""The keep decisions of dropout, in PyTorch: a pure function of (seed, site, position, head, row, column).

Counter-based (Philox4x32-7: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), so a
decision never depends on how a tensor is cut into chunks, is the same on every device, and can be drawn again
in backward instead of being stored. It also costs far less than ``bernoulli_``: at p = 0.5 one Philox call of
128 bits decides for 128 elements, else for 8.

Layout, which every kernel shares::

    key      low and high half of the seed
    counter  (column block, row, low half of group, high half of group · 4 + site)
    group    position · H + head   (H = 1 outside attention)
    p = 0.5  column block = column // 128; word (column // 32) % 4; bit column % 32; keep where it is 1
    else     column block = column // 8;   word (column // 2) % 4;  half column % 2; keep where it is ≥ t

t is :func:`threshold`; p = 0.5 means every p whose t is half of 65,536. In attention, and with 16 bits, bits 1 and 2
of the column change places with bits 3 and 4 first: the eight columns of a call are then those that one GPU thread
holds of 32 in a tensor-core product, and it draws each number it needs once, in registers (``kernels/rng.py``).
"""

from __future__ import annotations

import sys
from enum import IntEnum

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_ROUNDS = 7
_ALL, _HALF = 65536, 32768  # thresholds of p = 1 and of p = 1/2
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# Words are read as smaller integers in memory order.
assert sys.byteorder == "little"


class Site(IntEnum):
    """The four places of an encoder layer where dropout acts (DESIGN section 1)."""

    ATTENTION = 0
    ATTENTION_OUTPUT = 1
    ACTIVATION = 2
    FEEDFORWARD_OUTPUT = 3


def draw_seed(device: torch.device) -> Tensor:
    """A new int64 seed of shape (1,) on ``device``, from the default generator (obeys ``torch.manual_seed``)."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """Of 65,536 equally likely values, how many mean "drop": the rate applied is this over 65,536."""
    return round(p * _ALL)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], keys: tuple[Tensor, Tensor]) -> Tensor:
    """Philox4x32-7. Counters are int64 tensors of 32-bit values that broadcast, keys those of :func:`round_keys`.

    Returns four words, int32, in a new last dimension.
    """
    c0, c1, c2, c3 = counter
    for k0, k1 in zip(*(k.unbind() for k in keys), strict=True):
        # The 64-bit products wrap like unsigned ones. What the next round multiplies is cut to 32 bits; what it only
        # xors may keep its upper bits, which that cut removes.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0 = ((p1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(_LOW)
        c2 = ((p0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        c1, c3 = p1, p0
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1).to(torch.int32)


def round_keys(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The two 32-bit keys of every round, int64 (rounds,), from an int64 seed of one element."""
    i = torch.arange(_ROUNDS, device=seed.device)
    return (seed & _LOW) + i * _WEYL[0] & _LOW, (seed >> 32 & _LOW) + i * _WEYL[1] & _LOW


class Dropout:
    """Draws multipliers (0 where dropped, 1/(1 - rate applied) where kept) for one layer call.

    Args:
        p: probability of dropping, in [0, 1]. 0 and 1 need no random numbers; see :meth:`multiplier`.
        seed: int64 tensor of one element on the device of the result. Never read on the host.
        dtype: of the multipliers.
    """

    def __init__(self, p: float, seed: Tensor, dtype: torch.dtype) -> None:
        self.drop, self.dtype, self.device = threshold(p), dtype, seed.device
        self.keys = round_keys(seed)
        if self.drop == _HALF:
            bits = torch.arange(256, device=self.device)[:, None] >> torch.arange(8, device=self.device)
            self.table = ((bits & 1) * 2).to(dtype)

    def multiplier(self, site: Site, group: Tensor, row: Tensor, columns: int, first_column: int = 0) -> Tensor:
        """Multipliers for every column of the given rows.

        Args:
            site: where in the layer.
            group: int64, position · H + head.
            row: int64, the query's or the sample's index along the batch. Broadcasts with ``group``.
            columns: number of keys or channels.
            first_column: the first of them, a multiple of 128.

        Returns:
            (*broadcast shape of group and row, columns), in ``dtype``; p = 1 gives zeros.
        """
        shape = torch.broadcast_shapes(group.shape, row.shape)
        if self.drop == _ALL:
            return torch.zeros((*shape, columns), dtype=self.dtype, device=self.device)
        swapped = self.drop != _HALF and site == Site.ATTENTION
        per_call = 128 if self.drop == _HALF else 8
        # If swapped, four calls serve 32 columns, and the first of them alone the first few.
        calls = min(-(-columns // 2), 4 * -(-columns // 32)) if swapped else -(-columns // per_call)
        block = torch.arange(calls, device=self.device) + first_column // per_call
        group, row = group[..., None], row[..., None]
        words = philox((block, row & _LOW, group & _LOW, (group >> 32) * 4 + int(site)), self.keys)
        if self.drop == _HALF:
            byte = words.view(torch.uint8).flatten(-2)[..., : -(-columns // 8)]
            keep = self.table.index_select(0, byte.flatten().to(torch.int32)).view(*shape, byte.shape[-1] * 8)
        else:
            half = words.view(torch.int16)
            if swapped:
                half = half.view(*shape, -1, min(4, calls), 4, 2).transpose(-3, -2).flatten(-3)
            half = half.flatten(-2)[..., :columns].to(torch.int32) & 0xFFFF
            keep = (half >= self.drop).to(self.dtype).mul_(_ALL / (_ALL - self.drop))
        return keep[..., :columns]


def attention_mask(dropout: Dropout, q: Tensor, num_keys: int, first_row: int = 0) -> Tensor:
    """The whole multiplier (…, H, N, M) of an attention call whose queries are q (N, …, H, D).

    ``first_row``, here and below, is where the samples begin in the batch that dropout knows.
    """
    groups = torch.arange(q[0, ..., 0].numel(), device=q.device).view(*q.shape[1:-1], 1)
    rows = torch.arange(q.shape[0], device=q.device) + first_row
    return dropout.multiplier(Site.ATTENTION, groups, rows, num_keys)


def elementwise_mask(dropout: Dropout, site: Site, x: Tensor, first_row: int = 0) -> Tensor:
    """The multiplier for a tensor x (N, …, C) at one of the elementwise sites."""
    positions = torch.arange(x[0, ..., 0].numel(), device=x.device).view(x.shape[1:-1])
    rows = (torch.arange(x.shape[0], device=x.device) + first_row).view(-1, *[1] * (x.dim() - 2))
    return dropout.multiplier(site, positions, rows, x.shape[-1])
