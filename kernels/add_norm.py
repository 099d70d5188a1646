"""Dropout + residual + LayerNorm, forward and backward, with the plain half of a fork.

A program holds whole rows of C channels: s = residual + drop(x), y = LayerNorm(s). Forward takes statistics in fp32, of
s before it is rounded. Backward takes them again from the stored s, which costs two sums over registers. A bounded
number of backward programs walk over the rows. Each writes one partial sum, in fp32, of the gradients of the norm's
weight and bias and of the bias before x, so that the order of additions is fixed.

By flags the two kernels serve every place between two matrix products of an encoder layer, post-norm or pre-norm.

Shapes: rows [R, C], dense, in the order of :class:`fastbf.kernels.rows.Rows`; y and its gradient may be the mixed half
of a fork, and plain its plain half. Offsets are 64-bit.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastbf.kernels.launch import NO_DROP, Drop, cdiv, keep_mode, keep_scale, launch, operator, seed_or
from fastbf.kernels.rng import KEEP_ALL, mask_rows
from fastbf.kernels.rows import Rows, norm_tile, place

_RUNTIME = ["rows", "inner", "position_major", "first", "skipped", "half", "stride", "site", "threshold"]


@triton.jit
def _offsets(index, outer, skipped, half, columns, FORKED: tl.constexpr, C: tl.constexpr):
    """Offsets [BM, BC] of rows. If FORKED, of rows of a fork's mixed half, or with ``half`` = 0 of its plain half."""
    row = index.to(tl.int64)
    if FORKED:
        row += outer.to(tl.int64) * skipped + half
    return row[:, None] * C + columns[None, :]


@triton.jit
def _normalised(s, mask, eps, C: tl.constexpr):
    """s [BM, BC] fp32 → (s - mean) / std, zeros outside the mask, and 1 / std [BM]."""
    mean = tl.sum(s, 1) * (1.0 / C)
    centred = tl.where(mask, s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) * (1.0 / C) + eps)
    return tl.where(mask, centred * rstd[:, None], 0.0), rstd


@triton.jit(do_not_specialize=_RUNTIME)
def add_norm_forward(
    p_x, p_residual, p_weight, p_bias, p_plain, p_sum, p_y, p_copy, p_seed,
    rows: tl.int32, inner: tl.int32, position_major: tl.int32, first: tl.int32, skipped: tl.int32, half: tl.int32,
    site: tl.int32, threshold: tl.int32, keep_scale: tl.float32, eps: tl.float32,
    C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, KEEP: tl.constexpr,
    HAS_X: tl.constexpr, NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
    STORE_SUM: tl.constexpr, COPY: tl.constexpr, FORK: tl.constexpr, PLAIN_FORKED: tl.constexpr,
):  # fmt: skip
    """BM rows: s, y, y again in another dtype, and the plain half of the fork, each if its flag is set."""
    index = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.arange(0, BC)
    outer, sample, position = place(index, inner, position_major, first)
    mask = (index < rows)[:, None] & (columns < C)[None, :]
    offsets = _offsets(index, outer, skipped, half, columns, False, C)
    o_y = _offsets(index, outer, skipped, half, columns, FORK, C)

    s = tl.load(p_residual + offsets, mask=mask, other=0.0).to(tl.float32)  # [BM, BC]
    if HAS_X:
        x = tl.load(p_x + offsets, mask=mask, other=0.0).to(tl.float32)
        if KEEP != KEEP_ALL:
            x *= mask_rows(tl.load(p_seed), site, position, sample, 0, threshold, keep_scale, BC, KEEP)
        s += x
    if STORE_SUM:
        tl.store(p_sum + offsets, s.to(p_sum.dtype.element_ty), mask=mask)
    if FORK:
        o_plain = _offsets(index, outer, skipped, 0, columns, PLAIN_FORKED, C)
        plain = tl.load(p_plain + o_plain, mask=mask, other=0.0)
        o_plain = _offsets(index, outer, skipped, 0, columns, True, C)
        tl.store(p_y + o_plain, plain.to(p_y.dtype.element_ty), mask=mask)
    y = s
    if NORM:
        y, _ = _normalised(s, mask, eps, C)
        y *= tl.load(p_weight + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            y += tl.load(p_bias + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + o_y, y.to(p_y.dtype.element_ty), mask=mask)
    if COPY:
        tl.store(p_copy + offsets, y.to(p_copy.dtype.element_ty), mask=mask)


@triton.jit
def _add_to(p_total, x, columns, first, C: tl.constexpr):
    """Adds a row x [1, BC] to memory, or writes it if it is the first.

    A thread may load what another one stored, so two calls for the same memory need a barrier between them.
    """
    mask = (columns < C)[None, :]
    p_total += columns[None, :]
    x += tl.load(p_total, mask=mask & (first == 0), other=0.0)
    tl.store(p_total, x, mask=mask)


@triton.jit(do_not_specialize=_RUNTIME)
def add_norm_backward(
    p_dy, p_dy2, p_skip, p_d_plain, p_sum, p_weight, p_ds, p_dx, p_partials, p_seed,
    rows: tl.int32, inner: tl.int32, position_major: tl.int32, first: tl.int32, skipped: tl.int32, half: tl.int32,
    stride: tl.int32, site: tl.int32, threshold: tl.int32, keep_scale: tl.float32, eps: tl.float32,
    C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, KEEP: tl.constexpr,
    HAS_X: tl.constexpr, NORM: tl.constexpr, HAS_DY2: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_PLAIN: tl.constexpr,
    STORE_DS: tl.constexpr, PARTIALS: tl.constexpr, IN_REGISTERS: tl.constexpr,
    DY_FORKED: tl.constexpr, SKIP_FORKED: tl.constexpr, DS_FORKED: tl.constexpr,
):  # fmt: skip
    """Several row tiles: ds and dx, and one partial sum of each gradient. Grid: the number of partial sums.

    dy + dy2 is the gradient of y, and skip is added to the gradient of s. d_plain is the gradient of a fork. Its plain
    half is added to ds or, if ds is a fork too, written to the plain half of that. A program's partial sums are a row
    of ``stride`` numbers: those of x, then of the norm's weight and bias, C each.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BC)
    if IN_REGISTERS:
        d_weight = tl.zeros((BM, BC), tl.float32)
        d_bias = tl.zeros((BM, BC), tl.float32)
        d_x = tl.zeros((BM, BC), tl.float32)
    elif PARTIALS:
        p_partials += program.to(tl.int64) * stride
    if NORM and (IN_REGISTERS or not PARTIALS):
        weight = tl.load(p_weight + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    # Invariant code stays in the loop. Outside it, its values would fill the registers and spill.
    for start in tl.range(program * BM, rows, tl.num_programs(0) * BM, disable_licm=True):
        if PARTIALS and not IN_REGISTERS:
            tl.debug_barrier()  # the sums of the row before are in memory
        index = start + tl.arange(0, BM)
        outer, sample, position = place(index, inner, position_major, first)
        mask = (index < rows)[:, None] & (columns < C)[None, :]
        offsets = _offsets(index, outer, skipped, half, columns, False, C)
        o_dy = _offsets(index, outer, skipped, half, columns, DY_FORKED, C)
        ds = tl.load(p_dy + o_dy, mask=mask, other=0.0).to(tl.float32)
        if HAS_DY2:
            ds += tl.load(p_dy2 + offsets, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            s = tl.load(p_sum + offsets, mask=mask, other=0.0).to(tl.float32)
            s, rstd = _normalised(s, mask, eps, C)  # [BM, BC], [BM]
            if IN_REGISTERS:
                d_weight += ds * s
                d_bias += ds
            elif PARTIALS:
                weight = tl.load(p_weight + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
                _add_to(p_partials + HAS_X * C, ds * s, columns, start == program, C)
                _add_to(p_partials + HAS_X * C + C, ds, columns, start == program, C)
            ds *= weight
            mean, along = tl.sum(ds, 1) * (1.0 / C), tl.sum(ds * s, 1) * (1.0 / C)
            ds = (ds - mean[:, None] - s * along[:, None]) * rstd[:, None]
            if HAS_SKIP:
                o_skip = _offsets(index, outer, skipped, half, columns, SKIP_FORKED, C)
                ds += tl.load(p_skip + o_skip, mask=mask, other=0.0).to(tl.float32)
        if HAS_X:
            dx = ds
            if KEEP != KEEP_ALL:
                dx *= mask_rows(tl.load(p_seed), site, position, sample, 0, threshold, keep_scale, BC, KEEP)
            tl.store(p_dx + offsets, dx.to(p_dx.dtype.element_ty), mask=mask)
            if IN_REGISTERS:
                d_x += tl.where(mask, dx, 0.0)
            elif PARTIALS:
                _add_to(p_partials, dx, columns, start == program, C)
        if STORE_DS:
            if HAS_PLAIN:
                o_plain = _offsets(index, outer, skipped, 0, columns, True, C)
                plain = tl.load(p_d_plain + o_plain, mask=mask, other=0.0).to(tl.float32)
                if DS_FORKED:
                    tl.store(p_ds + o_plain, plain.to(p_ds.dtype.element_ty), mask=mask)
                else:
                    ds += plain
            o_ds = _offsets(index, outer, skipped, half, columns, DS_FORKED, C)
            tl.store(p_ds + o_ds, ds.to(p_ds.dtype.element_ty), mask=mask)

    if IN_REGISTERS:
        p_partials += program.to(tl.int64) * stride
        if HAS_X:
            tl.store(p_partials + columns, tl.sum(d_x, 0), mask=columns < C)
            p_partials += C
        if NORM:
            tl.store(p_partials + columns, tl.sum(d_weight, 0), mask=columns < C)
            tl.store(p_partials + C + columns, tl.sum(d_bias, 0), mask=columns < C)


def sums_in_registers(has_x: bool, norm: bool, channels: int) -> bool:
    """Whether a program keeps its sums over rows in registers; else it adds them up in memory."""
    return (has_x + 2 * norm) * channels <= 16384


class Norm(NamedTuple):
    """A LayerNorm; none if ``weight`` is None."""

    weight: Tensor | None = None  #: (C,)
    bias: Tensor | None = None  #: (C,)
    eps: float = 0.0
    input: Tensor | None = None  #: [R, C], what it normalised; for backward


#: No norm.
NO_NORM = Norm()


@operator("y", "residual_out", "copy")
def forward(
    residual: Tensor,
    rows: Rows,
    *,
    y: Tensor,
    x: Tensor | None = None,
    norm: Norm = NO_NORM,
    residual_out: Tensor | None = None,
    copy: Tensor | None = None,
    plain: Tensor | None = None,
    drop: Drop = NO_DROP,
) -> None:
    """y = LayerNorm(residual + drop(x)).

    All tensors are dense in the order of ``rows``, R = N · L, and may differ in dtype.

    Args:
        residual: [R, C], C ≤ 8192.
        y: [R, C] to write to; with ``plain`` the fork [2R, C], of which the mixed half is written.
        x: [R, C]; None is zero.
        norm: without one y is the sum.
        residual_out: [R, C] to write residual + drop(x) to.
        copy: [R, C] to write y to once more.
        plain: [R, C], or a fork [2R, C] whose plain half is used: copied to the plain half of y.
        drop: dropout of x.
    """
    channels = residual.shape[-1]
    tile = norm_tile("add_norm_forward", channels)
    optional = (x, residual, norm.weight, norm.bias, plain, residual_out, y, copy, drop.seed)
    tensors = tuple([residual if t is None else t for t in optional])
    numbers = (
        rows.total(), rows.inner(), int(rows.position_major), rows.first, *rows.fork(),
        drop.site, drop.threshold, keep_scale(drop.threshold), norm.eps,
    )  # fmt: skip
    flags = {
        "C": channels, "BM": tile.rows, "BC": tile.channels, "KEEP": keep_mode(drop.threshold),
        "HAS_X": x is not None, "NORM": norm.weight is not None, "HAS_BIAS": norm.bias is not None,
        "STORE_SUM": residual_out is not None, "COPY": copy is not None, "FORK": plain is not None,
        "PLAIN_FORKED": plain is not None and len(plain) > rows.total(),
        "num_warps": tile.num_warps,
    }  # fmt: skip
    launch(add_norm_forward, cdiv(rows.total(), tile.rows), residual.device, tensors, numbers, flags)


@operator("ds", "dx", "partials")
def backward(
    dy: Tensor,
    rows: Rows,
    *,
    dy2: Tensor | None = None,
    skip: Tensor | None = None,
    d_plain: Tensor | None = None,
    norm: Norm = NO_NORM,
    ds: Tensor | None = None,
    dx: Tensor | None = None,
    partials: Tensor | None = None,
    drop: Drop = NO_DROP,
) -> None:
    """The gradients of s = residual + drop(x) and of x, and partial sums of those of the norm and of x.

    All tensors are dense in the order of ``rows``, R = N · L, and may differ in dtype. Of a fork [2R, C] the mixed half
    is used, unless stated otherwise.

    Args:
        dy: gradient of y: [R, C] or a fork [2R, C].
        dy2: [R, C], a second part of y's gradient, only where there is a norm.
        skip: another part of the gradient of s, only where there is a norm: [R, C] or a fork [2R, C].
        d_plain: gradient of a fork [2R, C], whose plain half is added to ds; only with ``ds``.
        norm: with s as its ``input``; its bias is not used.
        ds: [R, C] to write the gradient of s to, or a fork [2R, C], whose plain half becomes that of d_plain.
        dx: [R, C] to write the gradient of x to; None if there was no x.
        partials: (P, W) fp32, any row stride, or None. P programs run, and each writes a row: sums of the gradients of
            x, if there is one, and of the norm's weight and bias, if there is one; C each.
        drop: as in :func:`forward`.
    """
    channels = dy.shape[-1]
    tile = norm_tile("add_norm_backward", channels)
    has_norm = norm.weight is not None
    optional = (dy, dy2, skip, d_plain, norm.input, norm.weight, ds, dx, partials)
    programs = cdiv(rows.total(), tile.rows) if partials is None else partials.shape[0]
    tensors = (*[dy if t is None else t for t in optional], seed_or(drop.seed, dy))
    numbers = (
        rows.total(), rows.inner(), int(rows.position_major), rows.first, *rows.fork(),
        0 if partials is None else partials.stride(0), drop.site, drop.threshold,
        keep_scale(drop.threshold), norm.eps,
    )  # fmt: skip
    forked = [t is not None and len(t) > rows.total() for t in (dy, skip, ds)]
    flags = {
        "C": channels, "BM": tile.rows, "BC": tile.channels, "KEEP": keep_mode(drop.threshold),
        "HAS_X": dx is not None, "NORM": has_norm, "HAS_DY2": dy2 is not None, "HAS_SKIP": skip is not None,
        "HAS_PLAIN": d_plain is not None, "STORE_DS": ds is not None, "PARTIALS": partials is not None,
        "IN_REGISTERS": partials is not None and sums_in_registers(dx is not None, has_norm, tile.channels),
        "DY_FORKED": forked[0], "SKIP_FORKED": forked[1], "DS_FORKED": forked[2],
        "num_warps": tile.num_warps, "maxnreg": tile.maxnreg(),
    }  # fmt: skip
    launch(add_norm_backward, programs, dy.device, tensors, numbers, flags)
