"""Flags as bits, and back."""

import pytest
import torch

from fastbf.torch_backend.bits import pack, unpack


def test_every_byte():
    """Flag i of eight is bit 7 - i."""
    flags = torch.arange(256)[:, None] >> torch.arange(7, -1, -1) & 1
    assert torch.equal(pack(flags.bool()), torch.arange(256, dtype=torch.uint8))
    assert torch.equal(unpack(torch.arange(256, dtype=torch.uint8), (256, 8)), flags.to(torch.int8))


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 3), (2, 5, 13), (2, 8, 4)])
def test_any_number_of_flags(shape):
    flags = torch.rand(shape) < 0.5
    bits = pack(flags)
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-flags.numel() // 8)
    assert torch.equal(unpack(bits, shape), flags.to(torch.int8))
