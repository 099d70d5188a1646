"""A warm step asks no more of the host than it did: counted, not timed (``tests/host_counts.py`` says of what).

``pytest -s`` and ``python -m tests.host_counts`` print the counts, those of the paper's code beside them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import host
from bench.patterns import PATTERNS
from tests.host_counts import Counts

ROOT = Path(__file__).parents[1]

#: The counts of fastbf; a step may have 3% more. Lower them when they fall.
LIMITS = {
    ("step", "fp32"): Counts(python=209, c=262, aten=41),
    ("step", "amp"): Counts(python=217, c=295, aten=53),
    ("targets", "fp32"): Counts(python=214, c=273, aten=42),
    ("targets", "amp"): Counts(python=222, c=306, aten=54),
    ("stats", "fp32"): Counts(python=107, c=117, aten=10),
    ("stats", "amp"): Counts(python=111, c=124, aten=13),
    ("layer", "fp32"): Counts(python=111, c=176, aten=34),
    ("layer", "amp"): Counts(python=118, c=204, aten=43),
    ("forked", "fp32"): Counts(python=125, c=200, aten=41),
    ("forked", "amp"): Counts(python=129, c=226, aten=50),
}
SLACK = 1.03

PINNED = next(line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split() if "torch==" in line)


@pytest.fixture(scope="module")
def counted():
    """By pattern and dtype, in a process of its own: kernels are compiled here, which the interpreter replaces."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.host_counts"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    print("\n" + result.stdout)
    lines = [line.split() for line in result.stdout.splitlines()[1:]]
    return {(name, dtype): Counts(*map(int, numbers)) for name, dtype, by, *numbers in lines if by == "fastbf"}


@pytest.mark.skipif(torch.__version__.partition("+")[0] != PINNED.partition("==")[2], reason=f"counted with {PINNED}")
@pytest.mark.parametrize(("name", "dtype"), LIMITS)
def test_a_step_has_no_more_calls(name, dtype, counted):
    found, limit = counted[name, dtype], LIMITS[name, dtype]
    assert not [
        f"{kind}: {count}, more than {most} and 3%"
        for kind, count, most in zip(Counts._fields, found, limit, strict=True)
        if count > SLACK * most
    ]


def test_every_pattern_has_its_limit(counted):
    assert set(LIMITS) == set(counted) == {(name, dtype) for name in PATTERNS for dtype in host.DTYPES}
