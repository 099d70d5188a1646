"""Dropout's decisions in kernels, bit for bit those of ``fastbf/dropout.py``, which documents the layout.

A decision depends on (seed, site, group, row, column) only. The keep mode ``KEEP`` says how it is drawn: ``KEEP_ALL``
not at all, ``KEEP_BITS`` one random bit each (p = 1/2; a Philox call serves 128 columns of a row), ``KEEP_HALVES`` 16
bits each (a call serves 8 columns).

The layout is chosen to be cheap. In the result tile of a tensor-core product a thread holds columns 2t and 2t + 1 of
every eight, where t is its place among the four threads of a row. A call for 16-bit decisions serves exactly those
columns of 32, so that each thread draws what it needs, once, in registers. A call for bits serves all threads of a row.
In a wide tile each of them draws it, which costs less than one instruction an element. Where a tile is narrow, or so
low that several warps hold each row, one thread draws it for all.
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
def _drawn_once(words):
    """Words [BM] or [BM, CALLS], which one thread draws and gives to all that hold elements of the row.

    The compiler would let each of them draw, but it repeats nothing that a gather takes.
    """
    rows = tl.arange(0, words.shape[0])
    if len(words.shape) == 2:
        rows = tl.broadcast_to(rows[:, None], words.shape)
    return tl.gather(words, rows, 0)


@triton.jit
def _two_drawn_once(a, b):
    """Two words of each row, as :func:`_drawn_once`, by one gather."""
    two = _drawn_once(a.to(tl.uint64) | b.to(tl.uint64) << 32)
    return two.to(tl.uint32), (two >> 32).to(tl.uint32)


@triton.jit
def _bits(seed, group, rows, start, BN: tl.constexpr):
    """rows [BM] → [BM, BN], 1 where kept: columns start … start + BN - 1, start a multiple of BN, BN ≤ 128."""
    columns = tl.arange(0, BN)[None, :]
    w0, w1, w2, w3 = _words(seed, ATTENTION, group, rows, rows * 0 + start // 128)
    if BN <= 64:
        upper = start % 128 >= 64
        w0, w1 = tl.where(upper, w2, w0), tl.where(upper, w3, w1)
    if BN <= 32:
        w0 = _drawn_once(tl.where(start % 64 >= 32, w1, w0))
    elif BN == 64 or rows.shape[0] <= 32:
        w0, w1 = _two_drawn_once(w0, w1)
        w2, w3 = _two_drawn_once(w2, w3)
    word = w0[:, None]
    if BN >= 64:
        word = tl.where(columns >= 32, w1[:, None], word)
    if BN == 128:
        word = tl.where(columns >= 64, tl.where(columns >= 96, w3[:, None], w2[:, None]), word)
    if BN == 16:
        word >>= (start % 32).to(tl.uint32)
    # The columns of a thread are 2t plus constants: one shift for all of them, then one that is known when compiling.
    columns = (columns % 32).to(tl.uint32)
    return ((word >> (columns & 6)) >> (columns & 25)) & 1


@triton.jit
def _halves(seed, group, rows, start, BN: tl.constexpr):
    """rows [BM] → [BM, BN], words whose upper 16 bits are random: columns start … start + BN - 1, a multiple of BN.

    No tensors are joined: what a product takes would then leave registers and come back in other threads.
    """
    CALLS: tl.constexpr = 4 if BN == 16 else BN // 8
    calls = start // 32 * 4 + tl.arange(0, CALLS)
    w0, w1, w2, w3 = _words(seed, ATTENTION, group, rows[:, None], calls[None, :])  # [BM, CALLS]
    if rows.shape[0] <= 32 and BN > 32:  # 32 by 32 at 512 channels lacks the shared memory
        w0, w1, w2, w3 = _drawn_once(w0), _drawn_once(w1), _drawn_once(w2), _drawn_once(w3)
    w0, w1, w2, w3 = _by_column(w0, BN), _by_column(w1, BN), _by_column(w2, BN), _by_column(w3, BN)
    columns = tl.arange(0, BN)[None, :]
    eight = columns // 8 % 4  # of the 32 columns that four calls serve: which word decides
    if BN == 16:
        eight += start % 32 // 8
    word = tl.where(eight < 2, tl.where(eight == 0, w0, w1), tl.where(eight == 2, w2, w3))
    return tl.where(columns % 2 == 0, word << 16, word)


@triton.jit
def _by_column(words, BN: tl.constexpr):
    """[BM, CALLS] → [BM, BN]: at each column the word of the call that serves it."""
    BM: tl.constexpr = words.shape[0]
    GROUPS: tl.constexpr = words.shape[1] // 4  # of 32 columns
    words = tl.reshape(words, (BM, GROUPS, 1, 4, 1))
    return tl.reshape(tl.broadcast_to(words, (BM, GROUPS, BN // 8 // GROUPS, 4, 2)), (BM, BN))


@triton.jit
def mask_tile(seed, group, rows, start, threshold, keep_scale, BN: tl.constexpr, KEEP: tl.constexpr):
    """What attention's dropout multiplies a tile of weights by: fp32 [BM, BN], ``keep_scale`` where kept, else 0.

    Args:
        seed: int64.
        group: int64, position · H + head.
        rows: [BM] int32, the queries.
        start: the first key, a multiple of BN; 16 ≤ BN ≤ 128.
        threshold: of 65,536, how many values of 16 bits mean "drop" (used by KEEP_HALVES).
        keep_scale: fp32, 65,536 / (65,536 - threshold), and 0 where the threshold is 65,536.
    """
    if KEEP == KEEP_BITS:
        return _two_or_zero(_bits(seed, group, rows, start, BN))
    else:
        return tl.where(_halves(seed, group, rows, start, BN) >= _drop(threshold), keep_scale, 0.0)


@triton.jit
def mask_each(seed, groups, rows, columns, threshold, keep_scale, KEEP: tl.constexpr):
    """:func:`mask_tile` where each row has a group of its own and columns are keys below 32: fp32 [BM, BN].

    A row's 32 decisions are gathered in one word first, so that an element costs a shift.

    Args:
        seed: int64.
        groups: [BM] int64.
        rows: [BM] int32, the queries.
        columns: [BN] int32, the keys.
        threshold, keep_scale: as in :func:`mask_tile`.
    """
    if KEEP == KEEP_BITS:
        word, _w1, _w2, _w3 = _words(seed, ATTENTION, groups, rows, rows * 0)
        word = _drawn_once(word)
    else:
        drop = _drop(threshold)
        quarter = tl.arange(0, 4)[None, :]
        w0, w1, w2, w3 = _words(seed, ATTENTION, groups[:, None], rows[:, None], quarter)  # [BM, 4]
        two = _two(w0, drop) | _two(w1, drop) << 8 | _two(w2, drop) << 16 | _two(w3, drop) << 24
        word = tl.sum(two << (2 * quarter).to(tl.uint32), 1)
    bits = (word[:, None] >> columns[None, :].to(tl.uint32)) & 1
    if KEEP == KEEP_BITS:
        return _two_or_zero(bits)
    else:
        return tl.where(bits != 0, keep_scale, 0.0)


@triton.jit
def mask_rows(seed, site, positions, rows, start, threshold, keep_scale, BC: tl.constexpr, KEEP: tl.constexpr):
    """What the dropout of an elementwise site multiplies rows of channels by: fp32 [BM, BC], ``keep_scale`` or 0.

    Args:
        seed: int64.
        site: ``fastbf.dropout.Site``.
        positions: [BM] int64.
        rows: [BM] int32, the samples' indices along the batch.
        start: the first channel, a multiple of BC; BC ≥ 32.
        threshold, keep_scale: as in :func:`mask_tile`.
    """
    BM: tl.constexpr = rows.shape[0]
    if KEEP == KEEP_BITS:
        word = start // 32 + tl.arange(0, BC // 32)[None, :]
        w0, w1, w2, w3 = _words(seed, site, positions[:, None], rows[:, None], word // 4)
        words = tl.where(word % 4 < 2, tl.where(word % 4 == 0, w0, w1), tl.where(word % 4 == 2, w2, w3))
        bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :].to(tl.uint32)) & 1
        return _two_or_zero(tl.reshape(bits, (BM, BC)))
    else:
        calls = start // 8 + tl.arange(0, BC // 8)[None, :]
        w0, w1, w2, w3 = _words(seed, site, positions[:, None], rows[:, None], calls)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BM, BC // 8, 2, 2], the four words in their order
        return tl.where(tl.reshape(_upper_halves(words), (BM, BC)) >= _drop(threshold), keep_scale, 0.0)


@triton.jit
def _two_or_zero(bits):
    """Bits as 2.0, the scale of p = 1/2, or 0.0. This costs less than a comparison and a selection."""
    return (bits << 30).to(tl.float32, bitcast=True)


@triton.jit
def _upper_halves(words):
    """Two words of each: its lower half and its upper half, as upper halves. What is below does not matter."""
    return tl.join(words << 16, words)


@triton.jit
def _drop(threshold):
    """The least word whose upper half means "keep"; 0 at 65,536, where the scale is 0."""
    return threshold.to(tl.uint32) << 16


@triton.jit
def _two(word, drop):
    """The decisions of a word's two halves, as two bits."""
    return (word << 16 >= drop).to(tl.uint32) | (word >= drop).to(tl.uint32) << 1
