"""The demo, in its quick form, run as a user runs it."""

import subprocess
import sys

from tests.examples.running import EXAMPLES, run_quick


def test_demo(tmp_path):
    lines = run_quick("long_tailed", tmp_path)
    assert lines[2].startswith("backend of BatchFormer  torch: ")
    for group in ("all (120 to 2)", "many (120 to 50)", "medium (33 to 9)", "few (6 to 2)"):
        rows = [line for line in lines if line.strip().startswith(group)]
        assert len(rows) == 3
        assert all(row.endswith(("gain", "LOSS")) for row in rows)
        assert all(len(row) <= 100 for row in rows)
    everything = next(line for line in lines if line.strip().startswith("all "))
    assert float(everything.split()[4]) > 40  # it learns: chance is 10
    assert any("the same 500 test predictions" in line for line in lines)
    assert (tmp_path / "accuracy_per_class.png").stat().st_size > 10_000


def test_one_seed_is_refused(tmp_path):
    result = subprocess.run(
        [sys.executable, EXAMPLES / "long_tailed.py", "--seeds", "1", "--out", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "--seeds must be at least 2" in result.stderr
