"""The three ways of the torch backend's attention, at sizes that a test can afford."""

import pytest

from fastbf.torch_backend import attention

_LIMITS = {
    "whole": {},
    "in pieces": {"CPU_PIECE": 20},
    "computed again": {"CPU_PIECE": 20, "KEPT_BYTES": 0},
}
every_way = pytest.mark.parametrize("way", _LIMITS)


def take(way, monkeypatch):
    """Attention goes this way, at the sizes of a test."""
    for name, value in _LIMITS[way].items():
        monkeypatch.setattr(attention, name, value)
