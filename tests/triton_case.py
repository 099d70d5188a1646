"""What the tests of kernels share: the device they run on, and buffers that show stray writes."""

import pytest
import torch

from tests.guard import Guards

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")
SEED = 8589934592 * 1234567 + 89


@pytest.fixture
def guards(monkeypatch):
    """Every buffer that launchers and Functions allocate holds NaN between marks, which must survive."""
    guards = Guards()
    monkeypatch.setattr(torch, "empty", guards)
    monkeypatch.setattr(torch, "empty_like", guards.like)
    yield guards
    monkeypatch.undo()
    guards.assert_untouched()
