"""Busy processes share the machine while something is timed, and end."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest

from bench import timing
from bench.busy import busy_processes
from tests.bench.cases import PLAN, ROOT, measured, problem

#: A process that starts another one and is killed.
KILLED = """
import os, signal
from bench.busy import busy_processes

with busy_processes(1):
    os.kill(os.getpid(), signal.SIGKILL)
"""


class TestBusy:
    """Processes keep the CPU busy as long as something is timed, however that ends."""

    @pytest.fixture
    def started(self, monkeypatch):
        class Popen(subprocess.Popen):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                processes.append(self)

        processes = []
        monkeypatch.setattr(subprocess, "Popen", Popen)
        return processes

    def test_spin(self):
        """In this session, with which they share the processor, whatever Ctrl-C says."""
        before = os.times().children_user
        with busy_processes(2) as processes:
            time.sleep(0.5)
            for process in processes:
                process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert [p.poll() for p in processes] == [None, None]
            assert {os.getsid(p.pid) for p in processes} == {os.getsid(0)}
        assert [p.returncode for p in processes] == [-signal.SIGKILL] * 2
        assert os.times().children_user > before + 0.05

    @pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
    def test_while_something_is_timed(self, error, started, monkeypatch):
        def times(runs, *_):
            running.extend(p.poll() for p in started)
            if error:
                raise error
            return {name: [1.0] for name in runs}

        running = []
        monkeypatch.setattr(timing, "times", times)
        with pytest.raises(KeyboardInterrupt) if error is KeyboardInterrupt else nullcontext():
            rows = measured(PLAN._replace(busy=2), problem("loss"))
            assert {(r.status, r.busy) for r in rows} == {("failed" if error else "measured", 2)}
        assert running == [None, None]
        assert [p.returncode for p in started] == [-signal.SIGKILL] * 2

    def test_none_unless_asked_for(self, started):
        assert {r.busy for r in measured(PLAN, problem("loss"))} == {0}
        assert not started

    def test_end_with_the_process_that_started_them(self):
        """They hold its standard output, which is read to the end."""
        result = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, capture_output=True, timeout=60, check=False)
        assert result.returncode == -signal.SIGKILL
