"""Activation + dropout, forward and backward, with partial sums of the gradient of the bias before it.

u = drop(act(h)). With ReLU backward needs only u: where u > 0 the element was positive and kept. No decision is drawn
again, and h is not saved. With GELU only h is saved. Backward then writes u again, from registers, for the next weight
gradient.

Shapes: rows [R, F], dense, in the order of :class:`fastbf.kernels.rows.Rows`. Offsets are 64-bit.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastbf.kernels.launch import Drop, cdiv, keep_mode, keep_scale, launch, operator, seed_or
from fastbf.kernels.rng import KEEP_ALL, mask_rows
from fastbf.kernels.rows import ACTIVATION_TILE, Rows, place

_RUNTIME = ["rows", "inner", "position_major", "first", "tiles", "threshold", "stride", "site"]


@triton.jit
def _gelu_gate(h):
    """Φ(h), the normal distribution's share below h: gelu(h) = h · Φ(h)."""
    return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))


@triton.jit(do_not_specialize=_RUNTIME)
def activation_forward(
    p_h, p_u, p_seed,
    rows: tl.int32, inner: tl.int32, position_major: tl.int32, first: tl.int32, tiles: tl.int32, site: tl.int32,
    threshold: tl.int32, keep_scale: tl.float32,
    F: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, GELU: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """A tile of u. Grid: ⌈rows / BM⌉ · tiles, tiles = ⌈F / BC⌉."""
    program = tl.program_id(0)
    index = program // tiles * BM + tl.arange(0, BM)
    start = program % tiles * BC
    columns = start + tl.arange(0, BC)
    _, sample, position = place(index, inner, position_major, first)
    mask = (index < rows)[:, None] & (columns < F)[None, :]
    offsets = index.to(tl.int64)[:, None] * F + columns[None, :]
    h = tl.load(p_h + offsets, mask=mask, other=0.0).to(tl.float32)  # [BM, BC]
    u = h * _gelu_gate(h) if GELU else tl.where(h <= 0.0, 0.0, h)
    if KEEP != KEEP_ALL:
        u *= mask_rows(tl.load(p_seed), site, position, sample, start, threshold, keep_scale, BC, KEEP)
    tl.store(p_u + offsets, u.to(p_u.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_RUNTIME)
def activation_backward(
    p_du, p_saved, p_dh, p_u, p_partials, p_seed,
    rows: tl.int32, inner: tl.int32, position_major: tl.int32, first: tl.int32, tiles: tl.int32, stride: tl.int32,
    site: tl.int32, threshold: tl.int32, keep_scale: tl.float32,
    F: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, GELU: tl.constexpr, KEEP: tl.constexpr,
    STORE_U: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """One tile of columns in several row tiles: dh, and a partial sum of it. Grid: partial sums · tiles.

    p_saved is u with ReLU, h with GELU; STORE_U writes u again from h.
    """
    program = tl.program_id(0)
    start = program % tiles * BC
    columns = start + tl.arange(0, BC)
    total = tl.zeros((BM, BC), tl.float32)
    for top in range(program // tiles * BM, rows, tl.num_programs(0) // tiles * BM):
        index = top + tl.arange(0, BM)
        mask = (index < rows)[:, None] & (columns < F)[None, :]
        offsets = index.to(tl.int64)[:, None] * F + columns[None, :]
        dh = tl.load(p_du + offsets, mask=mask, other=0.0).to(tl.float32)  # [BM, BC]
        saved = tl.load(p_saved + offsets, mask=mask, other=0.0).to(tl.float32)
        if GELU:
            gate = _gelu_gate(saved)
            slope = gate + saved * tl.exp(saved * saved * -0.5) * 0.3989422804014327
            if KEEP != KEEP_ALL:
                _, sample, position = place(index, inner, position_major, first)
                keep = mask_rows(tl.load(p_seed), site, position, sample, start, threshold, keep_scale, BC, KEEP)
                dh *= keep
                gate *= keep
            if STORE_U:
                tl.store(p_u + offsets, (saved * gate).to(p_u.dtype.element_ty), mask=mask)
            dh *= slope
        else:
            dh = tl.where(saved <= 0.0, 0.0, dh * keep_scale)
        tl.store(p_dh + offsets, dh.to(p_dh.dtype.element_ty), mask=mask)
        if PARTIALS:
            total += tl.where(mask, dh, 0.0)
    if PARTIALS:
        p_partials += (program // tiles).to(tl.int64) * stride
        tl.store(p_partials + columns, tl.sum(total, 0), mask=columns < F)


def _constants(h: Tensor, activation: str, threshold: int) -> dict[str, Any]:
    tile = ACTIVATION_TILE
    return {
        "F": h.shape[-1], "BM": tile.rows, "BC": tile.channels, "GELU": activation == "gelu",
        "KEEP": keep_mode(threshold), "num_warps": tile.num_warps,
    }  # fmt: skip


@operator("u")
def forward(h: Tensor, rows: Rows, activation: str, *, u: Tensor, drop: Drop) -> None:
    """u = drop(act(h)).

    Args:
        h: [R, F], dense in the order of ``rows``.
        activation: "relu" or "gelu".
        u: [R, F] to write to.
        drop: dropout of act(h).
    """
    tiles = cdiv(h.shape[-1], ACTIVATION_TILE.channels)
    numbers = (
        rows.total(), rows.inner(), int(rows.position_major), rows.first, tiles, drop.site, drop.threshold,
        keep_scale(drop.threshold),
    )  # fmt: skip
    programs = cdiv(rows.total(), ACTIVATION_TILE.rows) * tiles
    tensors = (h, u, seed_or(drop.seed, h))
    launch(activation_forward, programs, h.device, tensors, numbers, _constants(h, activation, drop.threshold))


@operator("dh", "u", "partials")
def backward(
    du: Tensor,
    saved: Tensor,
    rows: Rows,
    activation: str,
    *,
    dh: Tensor,
    u: Tensor | None = None,
    partials: Tensor | None = None,
    drop: Drop,
) -> None:
    """dh, and partial sums of it.

    Args:
        du: [R, F], dense in the order of ``rows``.
        saved: [R, F], u with "relu", h with "gelu".
        dh: [R, F] to write to.
        u: with "gelu", [R, F] to write u to once more, or None.
        partials: (P, F) fp32, any row stride, or None: partial sums of dh.
        drop: as in :func:`forward`.
    """
    tiles = cdiv(du.shape[-1], ACTIVATION_TILE.channels)
    parts = cdiv(rows.total(), ACTIVATION_TILE.rows) if partials is None else partials.shape[0]
    tensors = (du, saved, dh, dh if u is None else u, du if partials is None else partials, seed_or(drop.seed, du))
    numbers = (
        rows.total(), rows.inner(), int(rows.position_major), rows.first, tiles,
        0 if partials is None else partials.stride(0), drop.site, drop.threshold, keep_scale(drop.threshold),
    )  # fmt: skip
    constants = _constants(du, activation, drop.threshold)
    constants.update(STORE_U=u is not None, PARTIALS=partials is not None)
    launch(activation_backward, parts * tiles, du.device, tensors, numbers, constants)
