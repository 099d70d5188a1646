"""Integer instructions of PTX as the guard computes them, against their definitions in the PTX manual."""

import numpy as np
import pytest

from tests.ptx.text import Instruction
from tests.ptx.values import constant, evaluate, literal, parts, special

MINUS = (1 << 32) - 1


def result(opcode, *sources, threads=64):
    """Of an instruction on numbers that all threads have."""
    values = [s if s is None or isinstance(s, np.ndarray) else constant(s) for s in sources]
    value = evaluate(Instruction(opcode, ["%r1"], "", False, 0, ""), values, threads)
    return None if value is None else int(value[0]) if value.size == 1 else value.tolist()


@pytest.mark.parametrize(
    ("opcode", "sources", "expected"),
    [
        ("add.s32", (MINUS, 2), 1),
        ("sub.s32", (1, 2), MINUS),
        ("mul.lo.s32", (MINUS, 3), MINUS - 2),
        ("mul.wide.u32", (MINUS, 2), 2 * MINUS),
        ("mul.wide.s32", (MINUS, 2), (1 << 64) - 2),
        ("mad.lo.s32", (3, 4, 5), 17),
        ("and.b32", (12, 10), 8),
        ("or.b32", (12, 10), 14),
        ("xor.b32", (12, 10), 6),
        ("not.b32", (0,), MINUS),
        ("neg.s32", (1,), MINUS),
        ("shl.b32", (MINUS, 4), MINUS - 15),
        ("shl.b32", (1, 32), 0),
        ("shr.u32", (MINUS, 28), 15),
        ("shr.u32", (MINUS, 40), 0),
        ("shr.s32", (MINUS - 15, 2), MINUS - 3),
        ("shr.s32", (MINUS, 40), MINUS),
        ("bfe.u32", (0xABCD, 4, 8), 0xBC),
        ("bfe.s32", (0xF0, 4, 4), MINUS),
        ("bfi.b32", (0xF, 0xABCD, 4, 4), 0xABFD),
        ("prmt.b32", (0x44332211, 0x88776655, 0x7012), 0x88112233),
        ("prmt.b32", (0x80, 0, 0x1118), 0x000000FF),
        ("min.s32", (MINUS, 1), MINUS),
        ("min.u32", (MINUS, 1), 1),
        ("selp.b32", (5, 6, 1), 5),
        ("selp.b32", (5, None, 1), 5),
        ("selp.b32", (None, 6, 0), 6),
        ("selp.b32", (None, 6, 1), None),
        ("setp.lt.s32", (MINUS, 0), 1),
        ("setp.lt.u32", (MINUS, 0), 0),
        ("setp.ge.s32", (3, 3), 1),
        ("and.pred", (1, 0), 0),
        ("and.pred", (None, 0), 0),
        ("not.pred", (1,), 0),
        ("cvt.u64.u32", (MINUS,), MINUS),
        ("cvt.s64.s32", (MINUS,), (1 << 64) - 1),
        ("cvt.u32.u64", ((1 << 40) + 7,), 7),
        ("lop3.b32", (0b1100, 0b1010, 0b0110, 0x96), 0b1100 ^ 0b1010 ^ 0b0110),
        ("mov.b64", (7,), 7),
        ("mov.b64", (7, 1), (1 << 32) + 7),
        ("mov.b32", (7, 1), (1 << 16) + 7),
        ("mov.b32", (-1,), MINUS),
        ("mov.pred", (-1,), 1),
        ("xor.b32", (5, -1), MINUS - 5),
        ("setp.eq.b32", (MINUS, -1), 1),
        ("setp.gt.u32", (MINUS, -2), 1),
        ("max.u32", (5, -1), MINUS),
        ("selp.b32", (-1, 3, 1), MINUS),
        ("mad.wide.s32", (MINUS, 2, 1 << 40), (1 << 40) - 2),
        ("shl.b64", (1, 40), 1 << 40),
        ("bfe.s32", (0x80000000, 30, 4), None),
        ("mov.b128", (7, 1), None),
        ("add.s32", (None, 2), None),
        ("mul.f32", (1, 2), None),
        ("elect.sync", (MINUS,), None),
    ],
)
def test_instruction(opcode, sources, expected):
    assert result(opcode, *sources) == expected


def test_threads_have_numbers_of_their_own():
    tid = special("%tid.x", 64)
    assert result("shl.b32", tid, 2) == [4 * t for t in range(64)]
    assert result("shfl.sync.idx.b32", tid, 0, 31, MINUS) == [t // 32 * 32 for t in range(64)]
    assert special("%ctaid.x", 64) is None


def test_a_number_is_taken_apart():
    move = Instruction("mov.b64", ["{%r1, %r2}"], "", False, 0, "")
    assert [int(part[0]) for part in parts(constant((3 << 32) + 4), 2, move)] == [4, 3]
    assert parts(None, 2, move) == [None, None]


@pytest.mark.parametrize(
    ("text", "expected"), [("-1", (1 << 64) - 1), ("0x10", 16), ("0x7701U", 0x7701), ("0f3F800000", 0x3F800000)]
)
def test_literal(text, expected):
    assert int(literal(text)[0]) == expected


def test_what_is_no_number_is_not_known():
    assert literal("kernel_param_0") is None
