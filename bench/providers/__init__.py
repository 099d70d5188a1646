"""Who computes an op: fastbf in ``ours.py``, everything else in ``peers.py``."""

from bench.providers.base import Case, Provider, Traits, Unavailable, captured, differs, timed
from bench.providers.ours import OURS
from bench.providers.peers import PEERS

PROVIDERS: dict[str, Provider] = {p.name: p for p in (*OURS, *PEERS)}

__all__ = ["OURS", "PEERS", "PROVIDERS", "Case", "Provider", "Traits", "Unavailable", "captured", "differs", "timed"]
