"""Attention along the batch axis, forward and backward.

Every (position, head) pair is a *group*, an attention problem of its own: queries [N, D] against keys and values
[M, D]. Two schedules:

*streaming*  one program for a tile of BM queries of one group walks over the keys in tiles of BN, with the online
             softmax of Milakov and Gimelshein (arXiv 1805.02867). Where all keys fit one tile the loop runs once, and
             the whole score row is resident. Backward recomputes the weights from the saved log-sum-exp: one kernel
             walks over keys for dq, one over queries for dk and dv (Dao et al., arXiv 2205.14135), so that every sum
             has a fixed order and nothing is added atomically.
*packed*     for N and M of at most 32, usually at many positions: one tile holds as many whole groups as fit, and
             scores between groups are masked. Tiles are small, so that there are few of these, and mostly one warp
             computes one, so that none waits for another. A program has whole groups, so backward needs inputs only.

The head dimension is cut into NC chunks of BD channels. So it is padded to the next multiple of BD only, and a tile of
many channels has several accumulators.

Shapes: q, o, do, dq (N, L, H, D), k, v, dk, dv (M, L, H, D) by strides, channels contiguous; lse and delta (L·H, N)
fp32, lse to the base 2 of the scaled scores. In a kernel s_qn, s_ql, s_qh are the strides of q's batch, position and
head in units of 8 elements; p_ marks a pointer. Offsets are 64-bit.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbf.kernels.attention_configs import Config, config_for, key_value_passes, packed_slots, schedule, transposes
from fastbf.kernels.launch import cdiv, keep_mode, keep_scale, launch, operator, seed_or
from fastbf.kernels.limits import device_limits
from fastbf.kernels.rng import KEEP_ALL, mask_each, mask_tile

LOG2_E = 1.4426950408889634

# Lengths, strides and other numbers. No value of these compiles a kernel anew.
_TENSORS = ("q", "k", "v", "o", "do", "dq", "dk")
_RUNTIME = ["N", "M", "H", "groups", "tiles", "slots", "threshold"]
_RUNTIME += ["first_group", "first_row", "minus_first_row", "first_key"]
_RUNTIME += [f"s_{tensor}{dimension}" for tensor in _TENSORS for dimension in "nlh"]


@triton.jit
def _stride(stride):
    """The stride in elements, in 64 bits. The compiler knows what divides it, and loads 16 bytes at once."""
    return stride.to(tl.int64) * 8


@triton.jit
def _base(position, head, s_l, s_h):
    """Offset of a group's first element."""
    return position * _stride(s_l) + head * _stride(s_h)


@triton.jit
def _rows(rows, s_n, BD: tl.constexpr):
    """Offsets [R, BD] of rows [R] of a group, first chunk."""
    return rows[:, None] * _stride(s_n) + tl.arange(0, BD)[None, :]


@triton.jit
def _load(pointers, m_rows, chunk, D: tl.constexpr, BD: tl.constexpr):
    """[R, BD]: a chunk of rows, zeros past their end and past the last channel."""
    if D % BD == 0:
        return tl.load(pointers + chunk * BD, mask=m_rows[:, None], other=0.0)
    else:
        m_channels = chunk * BD + tl.arange(0, BD) < D
        return tl.load(pointers + chunk * BD, mask=m_rows[:, None] & m_channels[None, :], other=0.0)


@triton.jit
def _store(pointers, values, m_rows, chunk, D: tl.constexpr, BD: tl.constexpr):
    values = values.to(pointers.dtype.element_ty)
    if D % BD == 0:
        tl.store(pointers + chunk * BD, values, mask=m_rows[:, None])
    else:
        m_channels = chunk * BD + tl.arange(0, BD) < D
        tl.store(pointers + chunk * BD, values, mask=m_rows[:, None] & m_channels[None, :])


@triton.jit
def _load_all(pointers, m_rows, D: tl.constexpr, BD: tl.constexpr, NC: tl.constexpr):
    """Every chunk of rows: NC times [R, BD]."""
    chunks = ()
    for c in tl.static_range(NC):
        chunks += (_load(pointers, m_rows, c, D, BD),)
    return chunks


@triton.jit
def _dot_chunk(a, b, s, PRECISION: tl.constexpr):
    """s + a b, a [RA, BD] and b [BD, RB] a chunk of channels each.

    In IEEE fp32 a chunk is summed by itself: one sum over 512 channels has up to three times the rounding error of a
    sum of chunks. The compiler merges a product and an addition unless the product is told how often to add.
    """
    if PRECISION == "ieee":
        return s + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=a.shape[1])
    else:
        return tl.dot(a, b, s, input_precision=PRECISION)


@triton.jit
def _product(b_a, b_b, s, m_a, m_b, D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):
    """s + a bᵀ [RA, RB], one chunk of a [RA, D] and b [RB, D] in shared memory at a time."""
    for c in range((D + BD - 1) // BD):
        s = _dot_chunk(_load(b_a, m_a, c, D, BD), tl.trans(_load(b_b, m_b, c, D, BD)), s, PRECISION)
    return s


@triton.jit
def _scores(a, b, s, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """s + a bᵀ of queries a and keys b, [BM, BN], or [BN, BM] if TRANSPOSED."""
    if TRANSPOSED:
        return _dot_chunk(b, tl.trans(a), s, PRECISION)
    else:
        return _dot_chunk(a, tl.trans(b), s, PRECISION)


@triton.jit
def _along_queries(x, TRANSPOSED: tl.constexpr):
    """x [BM] beside scores."""
    return x[None, :] if TRANSPOSED else x[:, None]


@triton.jit
def _zeros(R: tl.constexpr, BD: tl.constexpr, NC: tl.constexpr):
    chunks = ()
    for _ in tl.static_range(NC):
        chunks += (tl.zeros((R, BD), tl.float32),)
    return chunks


@triton.jit(do_not_specialize=_RUNTIME)
def forward_streaming(
    p_q, p_k, p_v, p_o, p_lse, p_seed,
    N: tl.int32, M: tl.int32, H: tl.int32, tiles: tl.int32,
    first_group: tl.int32, first_row: tl.int32, minus_first_row: tl.int32, first_key: tl.int32,
    scale_log2: tl.float32, threshold: tl.int32, keep_scale: tl.float32,
    s_qn: tl.int64, s_ql: tl.int64, s_qh: tl.int64,
    s_kn: tl.int64, s_kl: tl.int64, s_kh: tl.int64,
    s_vn: tl.int64, s_vl: tl.int64, s_vh: tl.int64,
    s_on: tl.int64, s_ol: tl.int64, s_oh: tl.int64,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of BM queries of one group: o and lse. Grid: groups · tiles, tiles = ⌈N / BM⌉.

    With a chunk of 512 channels weights are LATE: they meet their values a step after their keys, and the last ones
    after the loop. So neither product of a step takes the other's result, and on Hopper Triton spreads the warps over
    rows and columns of both. It spreads them over rows alone where one takes the other's, and of eight warps every two
    would compute the same 64 rows of scores.
    """
    NC: tl.constexpr = (D + BD - 1) // BD
    LATE: tl.constexpr = BD == 512
    program = tl.program_id(0)
    group = first_group + program // tiles
    position, head = group // H, group % H
    kv_position = position - first_group // H
    group = group.to(tl.int64)
    first = program % tiles * BM
    rows = first + tl.arange(0, BM)
    samples = first_row + rows
    keys = tl.arange(0, BN)
    m_rows = rows < N
    if KEEP != KEEP_ALL:
        seed = tl.load(p_seed)

    q = _load_all(p_q + _base(position, head, s_ql, s_qh) + _rows(rows, s_qn, BD), m_rows, D, BD, NC)
    b_k = p_k + _base(kv_position, head, s_kl, s_kh) + _rows(keys, s_kn, BD)
    b_v = p_v + _base(kv_position, head, s_vl, s_vh) + _rows(keys, s_vn, BD)
    acc = _zeros(BM, BD, NC)
    maximum = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if LATE:
        p = tl.zeros((BM, BN), p_v.dtype.element_ty)
        b_v -= BN * _stride(s_vn)
    for start in range(0, M, BN):
        m_keys = keys < M - start
        past_end = tl.where(m_keys, 0.0, float("-inf"))
        s = tl.zeros((BM, BN), tl.float32)
        for c in tl.static_range(NC):
            k = _load(b_k, m_keys, c, D, BD)
            s = _dot_chunk(q[c], tl.trans(k), s, PRECISION)
        if LATE:
            v = _load(b_v, keys >= BN - start, 0, D, BD)  # nothing in the first step
            acc = (tl.dot(p, v, acc[0], input_precision=PRECISION),)
        s = s * scale_log2 + past_end[None, :]  # [BM, BN]
        new_maximum = tl.maximum(maximum, tl.max(s, 1))
        rescale = tl.exp2(maximum - new_maximum)
        p = tl.exp2(s - new_maximum[:, None])
        total = total * rescale + tl.sum(p, 1)
        maximum = new_maximum
        if KEEP != KEEP_ALL:
            p *= mask_tile(seed, group, samples, first_key + start, threshold, keep_scale, BN, KEEP)
        p = p.to(p_v.dtype.element_ty)
        if LATE:
            acc = (acc[0] * rescale[:, None],)
        else:
            new_acc = ()
            for c in tl.static_range(NC):
                v = _load(b_v, m_keys, c, D, BD)
                new_acc += (tl.dot(p, v, acc[c] * rescale[:, None], input_precision=PRECISION),)
            acc = new_acc
        b_k += BN * _stride(s_kn)
        b_v += BN * _stride(s_vn)
    if LATE:
        keys = (M - 1) // BN * BN + tl.arange(0, BN)
        b_v = p_v + _base(kv_position, head, s_vl, s_vh) + _rows(keys, s_vn, BD)
        v = _load(b_v, keys < M, 0, D, BD)
        acc = (tl.dot(p, v, acc[0], input_precision=PRECISION),)

    rows = (first_row + first + minus_first_row) + tl.arange(0, BM)  # anew: no register holds them meanwhile
    m_rows = rows < N
    b_o = p_o + _base(position, head, s_ol, s_oh) + _rows(rows, s_on, BD)
    tl.store(p_lse + group * N + rows, maximum + tl.log2(total), mask=m_rows)
    for c in tl.static_range(NC):
        _store(b_o, acc[c] * (1.0 / total)[:, None], m_rows, c, D, BD)


@triton.jit(do_not_specialize=_RUNTIME)
def backward_query(
    p_q, p_k, p_v, p_o, p_do, p_lse, p_delta, p_dq, p_seed,
    N: tl.int32, M: tl.int32, H: tl.int32, tiles: tl.int32,
    first_group: tl.int32, first_row: tl.int32, minus_first_row: tl.int32, first_key: tl.int32,
    scale: tl.float32, scale_log2: tl.float32, threshold: tl.int32, keep_scale: tl.float32,
    s_qn: tl.int64, s_ql: tl.int64, s_qh: tl.int64,
    s_kn: tl.int64, s_kl: tl.int64, s_kh: tl.int64,
    s_vn: tl.int64, s_vl: tl.int64, s_vh: tl.int64,
    s_on: tl.int64, s_ol: tl.int64, s_oh: tl.int64,
    s_don: tl.int64, s_dol: tl.int64, s_doh: tl.int64,
    s_dqn: tl.int64, s_dql: tl.int64, s_dqh: tl.int64,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, RELOAD: tl.constexpr, NEEDS_DQ: tl.constexpr,
):  # fmt: skip
    """A tile of BM queries of one group: delta = rowsum(do ∘ o), and dq if NEEDS_DQ. Grid as forward_streaming's.

    Gradients of scores are LATE as weights are there: they meet their keys a step after, which are loaded again.
    """
    NC: tl.constexpr = (D + BD - 1) // BD
    LATE: tl.constexpr = BD == 512
    program = tl.program_id(0)
    group = first_group + program // tiles
    position, head = group // H, group % H
    kv_position = position - first_group // H
    group = group.to(tl.int64)
    first = program % tiles * BM
    rows = first + tl.arange(0, BM)
    samples = first_row + rows
    keys = tl.arange(0, BN)
    m_rows = rows < N

    b_o = p_o + _base(position, head, s_ol, s_oh) + _rows(rows, s_on, BD)
    b_do = p_do + _base(position, head, s_dol, s_doh) + _rows(rows, s_don, BD)
    do = ()
    delta = tl.zeros((BM,), tl.float32)
    for c in tl.static_range(NC):
        do += (_load(b_do, m_rows, c, D, BD),)
        o = _load(b_o, m_rows, c, D, BD)
        delta += tl.sum(o.to(tl.float32) * do[c].to(tl.float32), 1)
    tl.store(p_delta + group * N + rows, delta, mask=m_rows)

    if NEEDS_DQ:
        if KEEP != KEEP_ALL:
            seed = tl.load(p_seed)
        b_q = p_q + _base(position, head, s_ql, s_qh) + _rows(rows, s_qn, BD)
        b_k = p_k + _base(kv_position, head, s_kl, s_kh) + _rows(keys, s_kn, BD)
        b_v = p_v + _base(kv_position, head, s_vl, s_vh) + _rows(keys, s_vn, BD)
        if not RELOAD:
            q = _load_all(b_q, m_rows, D, BD, NC)
        lse = tl.load(p_lse + group * N + rows, mask=m_rows, other=0.0)
        dq = _zeros(BM, BD, NC)
        if LATE:
            ds = tl.zeros((BM, BN), p_q.dtype.element_ty)
        for start in range(0, M, BN):
            m_keys = keys < M - start
            past_end = tl.where(m_keys, 0.0, float("-inf"))
            s = tl.zeros((BM, BN), tl.float32)
            dp = tl.zeros((BM, BN), tl.float32)
            k = ()
            if RELOAD:
                s = _product(b_q, b_k, s, m_rows, m_keys, D, BD, PRECISION)
                dp = _product(b_do, b_v, dp, m_rows, m_keys, D, BD, PRECISION)
            else:
                for c in tl.static_range(NC):
                    k += (_load(b_k, m_keys, c, D, BD),)
                    s = _dot_chunk(q[c], tl.trans(k[c]), s, PRECISION)
                for c in tl.static_range(NC):
                    v = _load(b_v, m_keys, c, D, BD)
                    dp = _dot_chunk(do[c], tl.trans(v), dp, PRECISION)
            if LATE:
                k_before = _load(b_k - BN * _stride(s_kn), keys >= BN - start, 0, D, BD)  # nothing in the first step
                dq = (tl.dot(ds, k_before, dq[0], input_precision=PRECISION),)
            p = tl.exp2(s * scale_log2 + (past_end[None, :] - lse[:, None]))  # [BM, BN]
            if KEEP != KEEP_ALL:
                dp *= mask_tile(seed, group, samples, first_key + start, threshold, keep_scale, BN, KEEP)
            ds = (p * (dp - delta[:, None])).to(p_q.dtype.element_ty)
            if not LATE:
                new_dq = ()
                for c in tl.static_range(NC):
                    k_c = _load(b_k, m_keys, c, D, BD) if RELOAD else k[c]
                    new_dq += (tl.dot(ds, k_c, dq[c], input_precision=PRECISION),)
                dq = new_dq
            b_k += BN * _stride(s_kn)
            b_v += BN * _stride(s_vn)
        if LATE:
            keys = (M - 1) // BN * BN + tl.arange(0, BN)
            b_k = p_k + _base(kv_position, head, s_kl, s_kh) + _rows(keys, s_kn, BD)
            dq = (tl.dot(ds, _load(b_k, keys < M, 0, D, BD), dq[0], input_precision=PRECISION),)

        rows = (first_row + first + minus_first_row) + tl.arange(0, BM)  # anew, as in forward
        m_rows = rows < N
        b_dq = p_dq + _base(position, head, s_dql, s_dqh) + _rows(rows, s_dqn, BD)
        for c in tl.static_range(NC):
            _store(b_dq, dq[c] * scale, m_rows, c, D, BD)


@triton.jit(do_not_specialize=_RUNTIME)
def backward_key_value(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv, p_seed,
    N: tl.int32, M: tl.int32, H: tl.int32, tiles: tl.int32,
    first_group: tl.int32, first_row: tl.int32, minus_first_row: tl.int32, first_key: tl.int32,
    scale: tl.float32, scale_log2: tl.float32, threshold: tl.int32, keep_scale: tl.float32,
    s_qn: tl.int64, s_ql: tl.int64, s_qh: tl.int64,
    s_kn: tl.int64, s_kl: tl.int64, s_kh: tl.int64,
    s_vn: tl.int64, s_vl: tl.int64, s_vh: tl.int64,
    s_don: tl.int64, s_dol: tl.int64, s_doh: tl.int64,
    s_dkn: tl.int64, s_dkl: tl.int64, s_dkh: tl.int64,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, RELOAD: tl.constexpr, TRANSPOSED: tl.constexpr,
    NEEDS_DK: tl.constexpr, NEEDS_DV: tl.constexpr,
):  # fmt: skip
    """A tile of BN keys of one group: dk if NEEDS_DK and dv if NEEDS_DV, which share their strides.

    Grid: groups · tiles, tiles = ⌈M / BN⌉.

    Scores are queries by keys, as in forward: in a transposed tile each decision of a Philox call belongs to another
    thread. They are TRANSPOSED, keys by queries, where warps would else compute the same ones (``transposes``).
    """
    NC: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    group = first_group + program // tiles
    position, head = group // H, group % H
    kv_position = position - first_group // H
    group = group.to(tl.int64)
    first = program % tiles * BN
    keys = first + tl.arange(0, BN)
    rows = tl.arange(0, BM)
    m_keys = keys < M
    if KEEP != KEEP_ALL:
        seed = tl.load(p_seed)

    b_k = p_k + _base(kv_position, head, s_kl, s_kh) + _rows(keys, s_kn, BD)
    b_v = p_v + _base(kv_position, head, s_vl, s_vh) + _rows(keys, s_vn, BD)
    if not RELOAD:
        k, v = _load_all(b_k, m_keys, D, BD, NC), _load_all(b_v, m_keys, D, BD, NC)
    b_q = p_q + _base(position, head, s_ql, s_qh) + _rows(rows, s_qn, BD)
    b_do = p_do + _base(position, head, s_dol, s_doh) + _rows(rows, s_don, BD)
    dk = _zeros(BN, BD, NC)
    dv = _zeros(BN, BD, NC)
    for start in range(0, N, BM):
        m_rows = rows < N - start
        s = tl.zeros((BN, BM) if TRANSPOSED else (BM, BN), tl.float32)
        dp = tl.zeros((BN, BM) if TRANSPOSED else (BM, BN), tl.float32)
        q, do = (), ()
        if RELOAD:
            s = _product(b_q, b_k, s, m_rows, m_keys, D, BD, PRECISION)
            if NEEDS_DK:
                dp = _product(b_do, b_v, dp, m_rows, m_keys, D, BD, PRECISION)
        else:
            for c in tl.static_range(NC):
                q += (_load(b_q, m_rows, c, D, BD),)
                s = _scores(q[c], k[c], s, TRANSPOSED, PRECISION)
            for c in tl.static_range(NC):
                do += (_load(b_do, m_rows, c, D, BD),)
                if NEEDS_DK:
                    dp = _scores(do[c], v[c], dp, TRANSPOSED, PRECISION)
        lse = tl.load(p_lse + group * N + start + rows, mask=m_rows, other=0.0)
        delta = tl.load(p_delta + group * N + start + rows, mask=m_rows, other=0.0)
        m_queries, delta = _along_queries(m_rows, TRANSPOSED), _along_queries(delta, TRANSPOSED)
        # An infinite key must not enter through rows of zeros. A value that is not finite makes its key's gradient NaN
        # through any row, of zeros or not.
        p = tl.where(m_queries, tl.exp2(s * scale_log2 - _along_queries(lse, TRANSPOSED)), 0.0)
        if KEEP != KEEP_ALL:
            samples = first_row + start + rows
            mask = mask_tile(seed, group, samples, first_key + first, threshold, keep_scale, BN, KEEP)
            if TRANSPOSED:
                mask = tl.trans(mask)
            ds = p * (dp * mask - delta)
            p *= mask
        else:
            ds = p * (dp - delta)
        if NEEDS_DV:
            p = p.to(p_do.dtype.element_ty)
            if not TRANSPOSED:
                p = tl.trans(p)
            new_dv = ()
            for c in tl.static_range(NC):
                do_c = _load(b_do, m_rows, c, D, BD) if RELOAD else do[c]
                new_dv += (tl.dot(p, do_c, dv[c], input_precision=PRECISION),)
            dv = new_dv
        if NEEDS_DK:
            ds = ds.to(p_q.dtype.element_ty)
            if not TRANSPOSED:
                ds = tl.trans(ds)
            new_dk = ()
            for c in tl.static_range(NC):
                q_c = _load(b_q, m_rows, c, D, BD) if RELOAD else q[c]
                new_dk += (tl.dot(ds, q_c, dk[c], input_precision=PRECISION),)
            dk = new_dk
        b_q += BM * _stride(s_qn)
        b_do += BM * _stride(s_don)

    keys = (first_row + first + minus_first_row) + tl.arange(0, BN)  # anew, as in forward
    m_keys = keys < M
    o_dk = _base(kv_position, head, s_dkl, s_dkh) + _rows(keys, s_dkn, BD)
    for c in tl.static_range(NC):
        if NEEDS_DK:
            _store(p_dk + o_dk, dk[c] * scale, m_keys, c, D, BD)
        if NEEDS_DV:
            _store(p_dv + o_dk, dv[c], m_keys, c, D, BD)


@triton.jit
def _slots(first_group, groups, count, slots, H, B: tl.constexpr):
    """A packed tile's rows [B], ``count`` to a group: slot, index in the group, position, head, whether it exists."""
    place = tl.arange(0, B)
    slot = place * ((65535 + count) // count) >> 16  # place // count, exact for up to 128 places and 32 rows
    group = first_group + slot
    position = group // H
    return slot, place - slot * count, position, group - position * H, slot < tl.minimum(slots, groups - first_group)


@triton.jit
def _dot_within(a, b, slot_rows, slot_inner, slots, PRECISION: tl.constexpr):
    """a [R, K] · b [K, BD]; a is 0 between slots. NaN and Inf of b stay in their slots, though 0 · NaN is NaN."""
    out = tl.dot(a, b, input_precision=PRECISION)
    if tl.sum(tl.sum(out * 0.0, 1), 0) != 0.0:
        for slot in range(slots):
            own = tl.dot(a, tl.where((slot_inner == slot)[:, None], b, 0.0), input_precision=PRECISION)
            out = tl.where((slot_rows == slot)[:, None], own, out)
    return out


@triton.jit
def _packed_softmax(s, same, m_rows, scale_log2):
    """Softmax [BM, BN] of raw scores within slots; zeros between them, and in rows that hold no query."""
    s = tl.where(same, s * scale_log2, float("-inf"))
    p = tl.exp2(s - tl.where(m_rows, tl.max(s, 1), 0.0)[:, None])
    total = tl.where(m_rows, tl.sum(p, 1), 1.0)  # p is 0 between slots, or NaN within too
    return tl.where(same, p * (1.0 / total)[:, None], 0.0)


@triton.jit(do_not_specialize=_RUNTIME)
def forward_packed(
    p_q, p_k, p_v, p_o, p_seed,
    N: tl.int32, M: tl.int32, H: tl.int32, groups: tl.int32, slots: tl.int32,
    first_group: tl.int32, first_row: tl.int32, minus_first_row: tl.int32, first_key: tl.int32,
    scale_log2: tl.float32, threshold: tl.int32, keep_scale: tl.float32,
    s_qn: tl.int64, s_ql: tl.int64, s_qh: tl.int64,
    s_kn: tl.int64, s_kl: tl.int64, s_kh: tl.int64,
    s_vn: tl.int64, s_vl: tl.int64, s_vh: tl.int64,
    s_on: tl.int64, s_ol: tl.int64, s_oh: tl.int64,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """``slots`` whole groups in one tile: o. Grid: ⌈groups / slots⌉.

    ALIKE: q, k and v share shape and strides, so that places are computed once, and queries have the keys' positions.
    """
    NC: tl.constexpr = (D + BD - 1) // BD
    if ALIKE:
        M, s_kn, s_kl, s_kh, s_vn, s_vl, s_vh = N, s_qn, s_ql, s_qh, s_qn, s_ql, s_qh
    first = tl.program_id(0) * slots
    q_slot, q_row, q_position, q_head, m_rows = _slots(first, groups, N, slots, H, BM)
    k_slot, k_row, k_position, k_head, m_keys = _slots(first, groups, M, slots, H, BN)
    if not ALIKE:
        q_position += first_group // H
    same = q_slot[:, None] == k_slot[None, :]  # a slot exists in rows and keys, or in neither

    b_q = p_q + _base(q_position, q_head, s_ql, s_qh)[:, None] + _rows(q_row, s_qn, BD)
    b_k = p_k + _base(k_position, k_head, s_kl, s_kh)[:, None] + _rows(k_row, s_kn, BD)
    b_v = p_v + _base(k_position, k_head, s_vl, s_vh)[:, None] + _rows(k_row, s_vn, BD)
    if NC == 1:  # loads while the scores are computed
        v = _load(b_v, m_keys, 0, D, BD)
    s = tl.zeros((BM, BN), tl.float32)
    for c in range(NC):
        s = _dot_chunk(_load(b_q, m_rows, c, D, BD), tl.trans(_load(b_k, m_keys, c, D, BD)), s, PRECISION)
    p = _packed_softmax(s, same, m_rows, scale_log2)
    if KEEP != KEEP_ALL:
        group = (first_group + first + q_slot).to(tl.int64)
        p *= mask_each(tl.load(p_seed), group, first_row + q_row, k_row, threshold, keep_scale, KEEP)
    p = p.to(p_v.dtype.element_ty)

    b_o = p_o + _base(q_position, q_head, s_ol, s_oh)[:, None] + _rows(q_row, s_on, BD)
    for c in range(NC):
        if NC > 1:
            v = _load(b_v, m_keys, c, D, BD)
        o = _dot_within(p, v, q_slot, k_slot, slots, PRECISION)
        _store(b_o, o, m_rows, c, D, BD)


@triton.jit(do_not_specialize=_RUNTIME)
def backward_packed(
    p_q, p_k, p_v, p_do, p_dq, p_dk, p_dv, p_seed,
    N: tl.int32, M: tl.int32, H: tl.int32, groups: tl.int32, slots: tl.int32,
    first_group: tl.int32, first_row: tl.int32, minus_first_row: tl.int32, first_key: tl.int32,
    scale: tl.float32, scale_log2: tl.float32, threshold: tl.int32, keep_scale: tl.float32,
    s_qn: tl.int64, s_ql: tl.int64, s_qh: tl.int64,
    s_kn: tl.int64, s_kl: tl.int64, s_kh: tl.int64,
    s_vn: tl.int64, s_vl: tl.int64, s_vh: tl.int64,
    s_don: tl.int64, s_dol: tl.int64, s_doh: tl.int64,
    s_dqn: tl.int64, s_dql: tl.int64, s_dqh: tl.int64,
    s_dkn: tl.int64, s_dkl: tl.int64, s_dkh: tl.int64,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """``slots`` whole groups in one tile: dq, dk and dv from q, k, v and do alone. Grid: ⌈groups / slots⌉.

    ALIKE: as in forward_packed, and so do dq, dk and dv.
    """
    NC: tl.constexpr = (D + BD - 1) // BD
    if ALIKE:
        M, s_kn, s_kl, s_kh, s_vn, s_vl, s_vh = N, s_qn, s_ql, s_qh, s_qn, s_ql, s_qh
        s_dkn, s_dkl, s_dkh = s_dqn, s_dql, s_dqh
    ONCE: tl.constexpr = NC == 1 and BM * BD <= 1024  # loads each tensor once; registers hold no more
    first = tl.program_id(0) * slots
    q_slot, q_row, q_position, q_head, m_rows = _slots(first, groups, N, slots, H, BM)
    k_slot, k_row, k_position, k_head, m_keys = _slots(first, groups, M, slots, H, BN)
    if not ALIKE:
        q_position += first_group // H
    same = q_slot[:, None] == k_slot[None, :]  # a slot exists in rows and keys, or in neither

    b_q = p_q + _base(q_position, q_head, s_ql, s_qh)[:, None] + _rows(q_row, s_qn, BD)
    b_k = p_k + _base(k_position, k_head, s_kl, s_kh)[:, None] + _rows(k_row, s_kn, BD)
    b_v = p_v + _base(k_position, k_head, s_vl, s_vh)[:, None] + _rows(k_row, s_vn, BD)
    b_do = p_do + _base(q_position, q_head, s_dol, s_doh)[:, None] + _rows(q_row, s_don, BD)
    s = tl.zeros((BM, BN), tl.float32)
    dp = tl.zeros((BM, BN), tl.float32)
    if ONCE:
        q, k, do = _load(b_q, m_rows, 0, D, BD), _load(b_k, m_keys, 0, D, BD), _load(b_do, m_rows, 0, D, BD)
    for c in range(NC):
        if not ONCE:
            q, k = _load(b_q, m_rows, c, D, BD), _load(b_k, m_keys, c, D, BD)
        s = _dot_chunk(q, tl.trans(k), s, PRECISION)
        if not ONCE:
            do = _load(b_do, m_rows, c, D, BD)
        dp = _dot_chunk(do, tl.trans(_load(b_v, m_keys, c, D, BD)), dp, PRECISION)
    p = _packed_softmax(s, same, m_rows, scale_log2)
    dp = tl.where(same, dp, 0.0)
    kept = p
    if KEEP != KEEP_ALL:
        group = (first_group + first + q_slot).to(tl.int64)
        mask = mask_each(tl.load(p_seed), group, first_row + q_row, k_row, threshold, keep_scale, KEEP)
        dp *= mask
        kept = p * mask
    ds = tl.where(same, p * (dp - tl.sum(p * dp, 1)[:, None]), 0.0).to(p_q.dtype.element_ty)
    kept = kept.to(p_do.dtype.element_ty)

    b_dq = p_dq + _base(q_position, q_head, s_dql, s_dqh)[:, None] + _rows(q_row, s_dqn, BD)
    o_dk = _base(k_position, k_head, s_dkl, s_dkh)[:, None] + _rows(k_row, s_dkn, BD)
    for c in range(NC):
        if not ONCE:
            k = _load(b_k, m_keys, c, D, BD)
        dq = _dot_within(ds, k, q_slot, k_slot, slots, PRECISION)
        _store(b_dq, dq * scale, m_rows, c, D, BD)
        if not ONCE:
            q = _load(b_q, m_rows, c, D, BD)
        dk = _dot_within(tl.trans(ds), q, k_slot, q_slot, slots, PRECISION)
        _store(p_dk + o_dk, dk * scale, m_keys, c, D, BD)
        if not ONCE:
            do = _load(b_do, m_rows, c, D, BD)
        dv = _dot_within(tl.trans(kept), do, k_slot, q_slot, slots, PRECISION)
        _store(p_dv + o_dk, dv, m_keys, c, D, BD)


def _positions(x: Tensor) -> Tensor:
    """(N, …, H, D) → (N, L, H, D)."""
    return x.unsqueeze(1) if x.dim() == 3 else x.flatten(1, -3)


def _layout(x: Tensor) -> Tensor:
    """(N, …, H, D) → (N, L, H, D) as the kernels read it: a view, or a copy if rows do not start at 16 bytes."""
    x = _positions(x)
    rows_begin_at_8 = all(stride % 8 == 0 for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1)
    if x.stride(-1) != 1 or not rows_begin_at_8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    return x


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Batch, position and head stride over 8; 0 along a dimension of one, whose stride may be anything."""
    samples, positions, heads, _ = x.shape
    sample, position, head, _ = x.stride()
    return sample // 8 if samples > 1 else 0, position // 8 if positions > 1 else 0, head // 8 if heads > 1 else 0


def _alike(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether all three share shape and strides, as where one tensor holds them."""
    return q.shape == k.shape and _strides(q) == _strides(k) == _strides(v)


def _tiles(config: Config) -> dict[str, Any]:
    """The compile-time arguments and launch options of a configuration."""
    return {
        "BM": config.block_m, "BN": config.block_n, "BD": config.block_d,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def _constants(x: Tensor, threshold: int) -> dict[str, Any]:
    """The compile-time arguments that every kernel takes, tiles aside."""
    # fp32 products in TF32 only where PyTorch's own are (docs/design.md, contracts).
    tf32 = x.dtype != torch.float32 or (x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32")
    return {"D": x.shape[-1], "KEEP": keep_mode(threshold), "PRECISION": "tf32" if tf32 else "ieee"}


def choose(kernel: str, q: Tensor, m: int) -> Config:
    """The table's tiles for q (N, L, H, D) against m keys on q's device."""
    n, positions, heads, head_dim = q.shape
    return config_for(kernel, n, m, positions * heads, head_dim, q.dtype.itemsize, device_limits(q.device))


class Options(NamedTuple):
    """The options of an attention call.

    ``group``, ``row`` and ``key`` are the indices of its first group, query and key in the whole batch. If the queries
    have more positions than the keys, those from ``group`` on are computed.
    """

    scale: float
    seed: Tensor | None = None  #: int64, one element, on q's device; None only if nothing is dropped
    threshold: int = 0  #: of 65,536 equally likely values, how many mean "drop"
    group: int = 0  #: a multiple of H
    row: int = 0
    key: int = 0  #: a multiple of 128 if the call streams, else 0

    def numbers(self) -> tuple[int, int, int, int]:
        """The origin as kernels take it.

        Kernels compute rows from samples by adding ``-row``, a number of its own. If the compiler knew its relation to
        ``row``, it would keep rows and samples both in registers.
        """
        return self.group, self.row, -self.row, self.key


def streams(n: int, m: int) -> bool:
    """Whether attention of n queries to m keys writes lse, and needs lse and o for backward."""
    return schedule(n, m) == "streaming"


def _flops_forward(q: Sequence[int], k: Sequence[int], *_: object, **__: object) -> int:
    """Of two products, q kᵀ and p v."""
    return 4 * q[0] * math.prod(k)


@operator("o", "lse", flops=_flops_forward)
def forward(q: Tensor, k: Tensor, v: Tensor, options: Options, *, o: Tensor, lse: Tensor | None) -> None:
    """o = drop(softmax(scale · q kᵀ)) v, and the log-sum-exp of every row of scores.

    Args:
        q: (N, …, H, D), D ≤ 512, channels contiguous (rows that do not start at 16 bytes are copied).
        k, v: (M, …, H, D), as q.
        options: of the scores.
        o: q's shape, to write to, channels contiguous.
        lse: (positions · H, N) fp32, to write to; None unless :func:`streams`.
    """
    q, k, v, o = _layout(q), _layout(k), _layout(v), _positions(o)
    n, _, heads, _ = q.shape
    m, groups = k.shape[0], k.shape[1] * heads
    numbers = (*options.numbers(), options.scale * LOG2_E, options.threshold, keep_scale(options.threshold))
    numbers += (*_strides(q), *_strides(k), *_strides(v), *_strides(o))
    constants = _constants(q, options.threshold)
    seed = seed_or(options.seed, q)
    if lse is None:
        config = choose("forward_packed", q, m)
        slots = packed_slots(config, n, m)
        numbers = (n, m, heads, groups, slots, *numbers)
        constants |= {"ALIKE": _alike(q, k, v), **_tiles(config)}
        launch(forward_packed, cdiv(groups, slots), q.device, (q, k, v, o, seed), numbers, constants)
        return
    config = choose("forward_streaming", q, m)
    tiles = cdiv(n, config.block_m)
    numbers = (n, m, heads, tiles, *numbers)
    constants |= _tiles(config)
    launch(forward_streaming, groups * tiles, q.device, (q, k, v, o, lse, seed), numbers, constants)


class Gradients(NamedTuple):
    """Where backward writes: channels contiguous, rows at multiples of 16 bytes, k and v with equal strides."""

    q: Tensor  #: (N, …, H, D)
    k: Tensor  #: (M, …, H, D)
    v: Tensor  #: (M, …, H, D)


class Inputs(NamedTuple):
    """Inputs and results of forward."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor | None
    lse: Tensor | None


def _flops_backward(do: Sequence[int], q: Sequence[int], k: Sequence[int], *rest: Any, **_: object) -> int:
    """Of a product for each gradient, and of do vᵀ for those of q and k; computing the scores again is not counted."""
    to_q, to_k, to_v = rest[-1]
    return 2 * q[0] * math.prod(k) * (to_q + to_k + to_v + (to_q or to_k))


@operator("grads_q", "grads_k", "grads_v", flops=_flops_backward)
def backward(
    do: Tensor, saved: Inputs, options: Options, grads: Gradients, needs: Sequence[bool] = (True, True, True)
) -> None:
    """Writes the gradients of q, k and v.

    Args:
        do: (N, …, H, D), any strides.
        saved: o and lse are None if forward was packed. If the keys are a part of all keys, o and lse are those of
            attention to all.
        options: as in :func:`forward`.
        grads: to write to.
        needs: which gradients are wanted. The packed schedule writes all, the streaming one only these.
    """
    do, q, k, v = _layout(do), _layout(saved.q), _layout(saved.k), _layout(saved.v)
    o, lse, (dq, dk, dv) = saved.o, saved.lse, map(_positions, grads)
    n, _, heads, _ = q.shape
    m, groups = k.shape[0], k.shape[1] * heads
    scale, threshold = options.scale, options.threshold
    numbers = (*options.numbers(), scale, scale * LOG2_E, threshold, keep_scale(threshold))
    numbers += (*_strides(q), *_strides(k), *_strides(v))
    constants = _constants(q, threshold)
    seed = seed_or(options.seed, q)
    if lse is None:
        config = choose("backward_packed", q, m)
        slots = packed_slots(config, n, m)
        numbers = (n, m, heads, groups, slots, *numbers, *_strides(do), *_strides(dq), *_strides(dk))
        constants |= {"ALIKE": _alike(q, k, v) and _alike(dq, dk, dv), **_tiles(config)}
        launch(backward_packed, cdiv(groups, slots), q.device, (q, k, v, do, dq, dk, dv, seed), numbers, constants)
        return
    config = choose("backward_query", q, m)
    assert o is not None
    o = _positions(o)
    delta = torch.empty_like(lse)
    tiles = cdiv(n, config.block_m)
    tensors = (q, k, v, o, do, lse, delta, dq, seed)
    sizes = (n, m, heads, tiles, *numbers, *_strides(o), *_strides(do), *_strides(dq))
    flags = {**constants, "RELOAD": config.reload, "NEEDS_DQ": needs[0], **_tiles(config)}
    launch(backward_query, groups * tiles, q.device, tensors, sizes, flags)
    config = choose("backward_key_value", q, m)
    tiles = cdiv(m, config.block_n)
    tensors = (q, k, v, do, lse, delta, dk, dv, seed)
    sizes = (n, m, heads, tiles, *numbers, *_strides(do), *_strides(dk))
    for part in key_value_passes(config):
        needs_dk, needs_dv = needs[1] and part[0], needs[2] and part[1]
        if needs_dk or needs_dv:
            flags = {**constants, "RELOAD": config.reload, "TRANSPOSED": transposes(config)}
            flags |= {"NEEDS_DK": needs_dk, "NEEDS_DV": needs_dv, **_tiles(config)}
            launch(backward_key_value, groups * tiles, q.device, tensors, sizes, flags)
