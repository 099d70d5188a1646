"""Other processes that keep the CPU busy while something is timed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: Spins until its parent is gone, however that ended; Ctrl-C at the terminal does nothing to it.
SPIN = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.SIG_IGN)
while os.getppid() == int(sys.argv[1]):
    for i in range(100_000):
        i * i
"""


@contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen]]:
    """Within the context so many processes spin, one thread each.

    They stay in this process's session: Linux shares the processor among sessions first, and what is timed should have
    as much of it as any of them.
    """
    command = [sys.executable, "-I", "-S", "-c", SPIN, str(os.getpid())]
    started: list[subprocess.Popen] = []
    try:
        for _ in range(count):
            started.append(subprocess.Popen(command))
        yield started
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()
