import os
import sys
from collections import Counter

import pytest
import torch

from tests.guard import Guards

# Without a GPU the kernels run in Triton's interpreter. Triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the workers share the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_remembered():
    """Tests exchange kernels, launches and checks; what is known of a signature is known of theirs."""
    yield
    for name in ("fastbf.signatures", "fastbf.repeats"):
        if name in sys.modules:
            sys.modules[name].forget()


@pytest.fixture
def counter_based(monkeypatch):
    """Dropout decides by a drawn seed everywhere, as on kernels and across ranks, to be compared with those."""
    monkeypatch.setattr("fastbf.functional._needs_seed", lambda *_: True)


@pytest.fixture
def plays(monkeypatch):
    """Counts directions of calls that a tape served, and those that none did."""
    from fastbf import joint, tape

    count, play, call = Counter(), tape.play, joint.call

    def counted(*call):
        made = play(*call)
        count["as written" if made is None else "by a tape"] += 1
        return made

    def written(*given):
        count["as written"] += 2
        return call(*given)

    monkeypatch.setattr(tape, "play", counted)
    monkeypatch.setattr(joint, "call", written)
    return count


@pytest.fixture
def guards(monkeypatch):
    """Every buffer that launchers and Functions allocate holds NaN between marks, which must survive."""
    guards = Guards()
    monkeypatch.setattr(torch, "empty", guards)
    monkeypatch.setattr(torch, "empty_like", guards.like)
    yield guards
    monkeypatch.undo()
    guards.assert_untouched()
