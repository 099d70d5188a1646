"""The three ways of the torch backend's attention, at sizes that a test can afford."""

import pytest

from fastbf.torch_backend import attention

_LIMITS = {
    "whole": {"WHOLE": 1 << 40},
    "in pieces": {"WHOLE": 0, "CPU_PIECE": 20},
    "drawn again": {"WHOLE": 0, "CPU_PIECE": 20, "KEPT_BYTES": 0},
}
every_way = pytest.mark.parametrize("way", _LIMITS)


def take(way, monkeypatch):
    """Attention goes this way, whatever the sizes."""
    for name, value in _LIMITS[way].items():
        monkeypatch.setattr(attention, name, value)
