"""Who computes an op: fastbf in ``ours.py``, others in ``peers.py``; matrix products alone in ``products.py``."""

from bench.providers.base import Case, Provider, Traits, Unavailable, captured, differs, timed
from bench.providers.ours import OURS
from bench.providers.peers import PEERS
from bench.providers.products import Products

PROVIDERS: dict[str, Provider] = {p.name: p for p in (*OURS, *PEERS, Products())}

__all__ = ["OURS", "PEERS", "PROVIDERS", "Case", "Provider", "Traits", "Unavailable", "captured", "differs", "timed"]
