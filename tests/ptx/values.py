"""Integer arithmetic of PTX on the values that all threads of a program have in a register, where they are known.

A value is an array of uint64, one number for each thread or one for all of them; None is not known: it comes from
memory, from a kernel's arguments, or by an instruction that is not listed here.
"""

from __future__ import annotations

import functools
import re

import numpy as np

from tests.ptx.text import Instruction

U64 = np.uint64
WARP = 32

Value = np.ndarray | None


def special(name: str, threads: int) -> Value:
    """A register that the machine sets, for all of a program's threads."""
    lanes = np.arange(threads, dtype=U64)
    return {"%tid.x": lanes, "%laneid": lanes % U64(WARP), "%ntid.x": constant(threads)}.get(name)


def constant(number: int) -> np.ndarray:
    return np.array([number & (1 << 64) - 1], dtype=U64)


def literal(text: str) -> Value:
    """An integer as it is written; a pattern of bits of a float."""
    if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
        return constant(int(match[1], 16))
    return constant(int(text.rstrip("U"), 0)) if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text) else None


def bits_of(kind: str) -> int:
    return 1 if kind == "pred" else int(re.sub(r"\D", "", kind) or 32)


def _cut(x: np.ndarray, bits: int) -> np.ndarray:
    return x & U64((1 << bits) - 1)


def _signed(x: np.ndarray, bits: int) -> np.ndarray:
    """Two's complement of so many bits → int64."""
    return (x << U64(64 - bits)).view(np.int64) >> np.int64(64 - bits)


def _extract(x: np.ndarray, at: np.ndarray, length: np.ndarray, kind: str) -> Value:
    """bfe of at least one bit, none of them beyond the last."""
    bits = bits_of(kind)
    if not ((length > 0) & (at + length <= U64(bits))).all():
        return None
    found = (x >> at) & ((U64(1) << length) - U64(1))
    if kind[0] == "u":
        return found
    left = U64(64) - length
    return _cut(((found << left).view(np.int64) >> left.view(np.int64)).view(U64), bits)


def _permuted_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: every byte is one of the eight of a and b, or only its sign."""
    eight, found = a | b << U64(32), U64(0)
    for i in range(4):
        chosen = selector >> U64(4 * i)
        byte = eight >> (chosen & U64(7)) * U64(8) & U64(255)
        sign = np.where(byte >= U64(128), U64(255), U64(0))
        found = found | np.where(chosen & U64(8), sign, byte) << U64(8 * i)
    return found


def _lane_of_warp(x: np.ndarray, lane: np.ndarray, threads: int) -> Value:
    """What one lane has, in every thread of its warp."""
    if lane.size != 1:
        return None
    return np.repeat(np.broadcast_to(x, threads).reshape(-1, WARP)[:, int(lane[0]) % WARP], WARP)


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def evaluate(instruction: Instruction, sources: list[Value], threads: int) -> Value:
    """The result, if it follows from what is known of the operands after the first; a vector's elements one by one."""
    name, *_, kind = mods = instruction.parts
    bits = bits_of(kind)
    if bits > 64:
        return None
    # A literal of -1 is all ones, of whatever width.
    widths = [bits // len(sources) if name == "mov" else bits] * len(sources)
    if name == "mad" and "wide" in mods:
        widths[2] = 2 * bits
    sources = [None if x is None else _cut(x, width) for x, width in zip(sources, widths, strict=True)]
    if name in ("and", "mul") and any(x is not None and not x.any() for x in sources):
        return constant(0)
    if name == "selp" and sources[2] is not None:
        if sources[2].all():
            return sources[0]
        if not sources[2].any():
            return sources[1]
    if any(x is None for x in sources) or kind[0] == "f" or kind.startswith("bf"):
        return None
    with np.errstate(over="ignore"):
        return _known(name, mods, kind, bits, sources, threads)


def parts(value: Value, count: int, instruction: Instruction) -> list[Value]:
    """What ``count`` registers get of a mov into all of them, the lowest bits first."""
    bits = bits_of(instruction.parts[-1]) // count
    return [None if value is None else _cut(value >> U64(i * bits), bits) for i in range(count)]


def _known(name: str, mods: list[str], kind: str, bits: int, s: list[np.ndarray], threads: int) -> Value:
    if name in ("mov", "cvta"):
        return functools.reduce(np.bitwise_or, (x << U64(i * bits // len(s)) for i, x in enumerate(s)))
    if name == "cvt":
        to, source = mods[-2], mods[-1]
        if source[0] not in "us" or to[0] not in "usb":
            return None
        wide = _signed(s[0], bits).view(U64) if source[0] == "s" else _cut(s[0], bits)
        return _cut(wide, bits_of(to))
    if name in ("add", "sub"):
        return _cut(s[0] + s[1] if name == "add" else s[0] - s[1], bits)
    if name in ("mul", "mad"):
        if "hi" in mods:
            return None
        wide = "wide" in mods
        a, b = (_signed(x, bits).view(U64) if wide and kind[0] == "s" else x for x in s[:2])
        product = a * b + (s[2] if name == "mad" else U64(0))
        return _cut(product, 2 * bits if wide else bits)
    if name in _LOGIC:
        return _LOGIC[name](s[0], s[1])
    if name == "not":
        return _cut(~s[0], bits)
    if name == "neg":
        return _cut(U64(0) - s[0], bits)
    if name == "shl":
        return np.where(s[1] >= U64(bits), U64(0), _cut(s[0] << s[1], bits))
    if name == "shr":
        if kind[0] == "s":
            by = np.minimum(s[1], U64(bits - 1)).astype(np.int64)
            return _cut((_signed(s[0], bits) >> by).view(U64), bits)
        return np.where(s[1] >= U64(bits), U64(0), s[0] >> s[1])
    if name == "bfe":
        return _extract(s[0], s[1], s[2], kind)
    if name == "bfi":
        mask = ((U64(1) << s[3]) - U64(1)) << s[2]
        return (s[1] & ~mask) | ((s[0] << s[2]) & mask)
    if name in ("min", "max"):
        a, b = (_signed(x, bits) if kind[0] == "s" else x for x in s)
        return _cut((np.minimum if name == "min" else np.maximum)(a, b).view(U64), bits)
    if name == "selp":
        return np.where(s[2] != 0, s[0], s[1])
    if name == "setp":
        if mods[1] not in _COMPARE or len(s) != 2:
            return None
        a, b = (_signed(x, bits) if kind[0] == "s" else x for x in s)
        return _COMPARE[mods[1]](a, b).astype(U64)
    if name == "lop3":
        table, out = int(s[3][0]), U64(0)
        for i in range(8):
            if table >> i & 1:
                a, b, c = (x if i >> shift & 1 else ~x for x, shift in zip(s[:3], (2, 1, 0), strict=True))
                out = out | (a & b & c)
        return _cut(out, bits)
    if name == "prmt" and len(mods) == 2:
        return _permuted_bytes(*s)
    if name == "shfl" and mods[2] == "idx":
        return _lane_of_warp(s[0], s[1], threads)
    return None
