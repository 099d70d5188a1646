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
    ("step", "fp32"): Counts(python=178, c=231, aten=36),
    ("step", "amp"): Counts(python=196, c=266, aten=48),
    ("targets", "fp32"): Counts(python=183, c=242, aten=37),
    ("targets", "amp"): Counts(python=201, c=277, aten=49),
    ("stats", "fp32"): Counts(python=90, c=106, aten=9),
    ("stats", "amp"): Counts(python=99, c=117, aten=12),
    ("layer", "fp32"): Counts(python=97, c=158, aten=30),
    ("layer", "amp"): Counts(python=109, c=185, aten=39),
    ("forked", "fp32"): Counts(python=113, c=182, aten=37),
    ("forked", "amp"): Counts(python=122, c=206, aten=46),
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
