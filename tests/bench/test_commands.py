"""``python -m bench`` as a user starts it."""

import os
import subprocess
import sys

import pytest

from bench import records
from tests.bench.cases import ROOT, in_ascii

#: Runs ``python -m bench``; the second case to be timed sends the process what Ctrl-C does.
STOPPED = """
import os, runpy, signal
from bench import providers, runner

def timed(case, mode, timed=runner.timed):
    calls.append(mode)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return timed(case, mode)

calls, runner.timed = [], timed
runpy.run_module("bench", run_name="__main__")
"""


#: The same while PyTorch is imported, where exceptions are caught.
IMPORTING = """
import os, runpy, signal, sys, time

class Finder:
    def find_spec(name, *_):
        if name == "torch":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except BaseException:
                pass

sys.meta_path.insert(0, Finder)
runpy.run_module("bench", run_name="__main__")
"""


class TestEntry:
    """What the process does, whatever the command."""

    def test_ctrl_c(self, tmp_path):
        """At the second of two modes: one line, the status of a process that was interrupted, the first's row."""
        path = tmp_path / "a.csv"
        path.write_text("earlier", encoding="utf-8")
        what = ["op", "loss", "--modes", "forward", "both", "--workloads", "cifar100-lt", "--providers", "paper"]
        what += ["--seconds", "0.02", "--device", "cpu", "--out", path]
        result = in_ascii("-c", STOPPED, *what)
        assert result.returncode == 130, result.stderr
        (partial,) = tmp_path.glob("*.partial")
        assert result.stderr == f"\nnot finished: what was measured is in {partial}\n"
        assert [row["mode"] for row in records.read([partial])] == ["forward"]
        assert path.read_text(encoding="utf-8") == "earlier"

    def test_ctrl_c_while_it_is_imported(self):
        result = in_ascii("-c", IMPORTING, "list")
        assert (result.returncode, result.stdout, result.stderr) == (130, "", "")

    @pytest.mark.parametrize("command", [("list",), ("limits", "--workloads", "czsl")])
    def test_escapes_what_standard_output_lacks(self, command):
        result = in_ascii("-m", "bench", *command)
        assert result.returncode == 0, result.stderr
        assert "\\" in result.stdout

    def test_standard_output_may_be_closed(self):
        result = subprocess.run(
            ["sh", "-c", f"{sys.executable} -m bench limits --workloads czsl >&-"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr

    @pytest.mark.skipif(os.name != "posix", reason="a closed pipe is no signal here")
    def test_whoever_reads_may_stop(self):
        command = f'{sys.executable} -m bench list | (read -r line; echo "$line")'
        result = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (result.stderr, len(result.stdout.splitlines())) == ("", 1)

    def test_examples_too(self):
        result = in_ascii("examples/compositional_zero_shot.py", "--help")
        assert result.returncode == 0, result.stderr
        assert "digits \\xd7 attributes" in result.stdout

    def test_setup_reads_utf8(self):
        result = in_ascii("setup.py", "--name")
        assert result.returncode == 0, result.stderr
        assert result.stdout.split()[-1] == "fastbf"
