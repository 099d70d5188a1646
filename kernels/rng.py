"""Dropout's decisions in kernels, bit for bit those of ``fastbf/dropout.py``, which documents the layout.

A decision depends on (seed, site, group, row, column) only. The keep mode ``KEEP`` says how it is drawn: ``KEEP_ALL``
not at all, ``KEEP_BITS`` one random bit each (p = 1/2; a Philox call serves 128 columns of a row), ``KEEP_HALVES`` 16
bits each (a call serves 8 columns).

The layout is chosen to be cheap. In the result tile of a tensor-core product a thread holds columns 2t and 2t + 1 of
every eight, where t is its place among the four threads of a row. A call for 16-bit decisions serves exactly those
columns of 32, so that each thread draws what it needs, once, in registers. A call for bits serves all four threads of
a row. Each of them draws it, which still costs less than one instruction an element.
"""

import triton
import triton.language as tl

KEEP_ALL = tl.constexpr(0)
KEEP_BITS = tl.constexpr(1)
KEEP_HALVES = tl.constexpr(2)

# Where dropout acts: fastbf.dropout.Site.
ATTENTION = tl.constexpr(0)

ROUNDS = tl.constexpr(7)


@triton.jit
def _words(seed, site, group, row, call):
    """The four words of a Philox call; row, group and call broadcast."""
    low = group.to(tl.uint32)
    high = ((group >> 32) * 4 + site).to(tl.uint32)
    return tl.philox(seed, call.to(tl.uint32), row.to(tl.uint32), low, high, ROUNDS)


@triton.jit
def _bits(seed, group, rows, start, BN: tl.constexpr):
    """rows [BM] → [BM, BN], 1 where kept: columns start … start + BN - 1, start a multiple of BN, BN ≤ 128."""
    columns = tl.arange(0, BN)[None, :]
    w0, w1, w2, w3 = _words(seed, ATTENTION, group, rows, rows * 0 + start // 128)
    if BN <= 64:
        upper = start % 128 >= 64
        w0, w1 = tl.where(upper, w2, w0), tl.where(upper, w3, w1)
    if BN <= 32:
        w0 = tl.where(start % 64 >= 32, w1, w0)
    word = w0[:, None]
    if BN >= 64:
        word = tl.where(columns >= 32, w1[:, None], word)
    if BN == 128:
        word = tl.where(columns >= 64, tl.where(columns >= 96, w3[:, None], w2[:, None]), word)
    return (word >> ((start + columns) % 32).to(tl.uint32)) & 1


@triton.jit
def _halves(seed, group, rows, start, BN: tl.constexpr):
    """rows [BM] → [BM, BN], 16 random bits each: columns start … start + BN - 1, start a multiple of BN."""
    BM: tl.constexpr = rows.shape[0]
    CALLS: tl.constexpr = 4 if BN == 16 else BN // 8
    calls = start // 32 * 4 + tl.arange(0, CALLS)
    w0, w1, w2, w3 = _words(seed, ATTENTION, group, rows[:, None], calls[None, :])  # [BM, CALLS]
    if BN == 16:
        lower = start % 32 == 0
        words = tl.join(tl.where(lower, w0, w2), tl.where(lower, w1, w3))  # [BM, 4, 2]
        eights: tl.constexpr = 2
    else:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BM, CALLS, 2, 2], the four words in their order
        eights: tl.constexpr = 4
    halves = tl.join(words & 0xFFFF, words >> 16)
    halves = tl.reshape(halves, (BM, CALLS // 4, 4, eights, 2))
    return tl.reshape(tl.permute(halves, (0, 1, 3, 2, 4)), (BM, BN))


@triton.jit
def keep_tile(seed, group, rows, start, threshold, BN: tl.constexpr, KEEP: tl.constexpr):
    """Attention's decisions for a tile: bool [BM, BN].

    Args:
        seed: int64.
        group: int64, position · H + head.
        rows: [BM] int32, the queries.
        start: the first key, a multiple of BN; 16 ≤ BN ≤ 128.
        threshold: of 65,536, how many values of 16 bits mean "drop" (used by KEEP_HALVES).
    """
    if KEEP == KEEP_BITS:
        return _bits(seed, group, rows, start, BN) != 0
    else:
        return _halves(seed, group, rows, start, BN) >= threshold.to(tl.uint32)


@triton.jit
def keep_each(seed, groups, rows, columns, threshold, KEEP: tl.constexpr):
    """Attention's decisions where each row has a group of its own and columns are keys below 32: bool [BM, BN].

    A row's 32 decisions are gathered in one word first, so that an element costs a shift.

    Args:
        seed: int64.
        groups: [BM] int64.
        rows: [BM] int32, the queries.
        columns: [BN] int32, the keys.
        threshold: as in :func:`keep_tile`.
    """
    if KEEP == KEEP_BITS:
        word, _w1, _w2, _w3 = _words(seed, ATTENTION, groups, rows, rows * 0)
    else:
        drop = threshold.to(tl.uint32)
        quarter = tl.arange(0, 4)[None, :]
        w0, w1, w2, w3 = _words(seed, ATTENTION, groups[:, None], rows[:, None], quarter)  # [BM, 4]
        two = _two(w0, drop) | _two(w1, drop) << 8 | _two(w2, drop) << 16 | _two(w3, drop) << 24
        word = tl.sum(two << (2 * quarter).to(tl.uint32), 1)
    return ((word[:, None] >> columns[None, :].to(tl.uint32)) & 1) != 0


@triton.jit
def keep_rows(seed, site, positions, rows, start, threshold, BC: tl.constexpr, KEEP: tl.constexpr):
    """The decisions of an elementwise site for rows of channels: bool [BM, BC].

    Args:
        seed: int64.
        site: ``fastbf.dropout.Site``.
        positions: [BM] int64.
        rows: [BM] int32, the samples' indices along the batch.
        start: the first channel, a multiple of BC; BC ≥ 32.
        threshold: as in :func:`keep_tile`.
    """
    BM: tl.constexpr = rows.shape[0]
    if KEEP == KEEP_BITS:
        word = start // 32 + tl.arange(0, BC // 32)[None, :]
        w0, w1, w2, w3 = _words(seed, site, positions[:, None], rows[:, None], word // 4)
        words = tl.where(word % 4 < 2, tl.where(word % 4 == 0, w0, w1), tl.where(word % 4 == 2, w2, w3))
        bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :].to(tl.uint32)) & 1
        return tl.reshape(bits, (BM, BC)) != 0
    else:
        calls = start // 8 + tl.arange(0, BC // 8)[None, :]
        w0, w1, w2, w3 = _words(seed, site, positions[:, None], rows[:, None], calls)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BM, BC // 8, 2, 2], the four words in their order
        halves = tl.join(words & 0xFFFF, words >> 16)
        return tl.reshape(halves, (BM, BC)) >= threshold.to(tl.uint32)


@triton.jit
def _two(word, drop):
    """The decisions of a word's two halves, as two bits."""
    return ((word & 0xFFFF) >= drop).to(tl.uint32) | ((word >> 16) >= drop).to(tl.uint32) << 1
