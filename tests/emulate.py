"""``python -m tests.emulate``: executes compiled kernels without a GPU, on all cores.

Runs the quick suite of the emulator (``../shared/ptx``: its README says what it reports) for sm_80 and sm_90, a part of
the cases in each process; with ``--split`` each case for one of the two. The suite reaches inside fastbf through
``tests/emulation.py``. Prints every case; the exit status is 0 if nothing is wrong, and where there is no emulator.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--emulator", type=Path, default=ROOT.parent / "shared", help="the folder with the package ptx")
    parser.add_argument("--sm", nargs="+", type=int, choices=(80, 90), default=(80, 90))
    parser.add_argument("--split", action="store_true", help="each case for one compute capability")
    parser.add_argument("suite", nargs="*", help="options of the suite, after --; by default --quick")
    arguments = parser.parse_args()
    if not (arguments.emulator / "ptx").is_dir():
        print(f"No emulator in {arguments.emulator}: compiled kernels are not executed.")
        return 0
    suite, parts = arguments.suite or ["--quick"], os.cpu_count() or 1
    every = [[(sm, f"{part}/{parts}") for part in range(parts)] for sm in arguments.sm]
    if arguments.split:
        every = [[(sm, f"{part}/{len(arguments.sm)}") for part, sm in enumerate(arguments.sm)]]
    passed = [run(arguments.emulator, suite, some) for some in every]
    return 0 if all(passed) else 1


def run(emulator: Path, suite: list[str], parts: list[tuple[int, str]]) -> bool:
    """Whether parts of the suite pass, each for a compute capability in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(emulator.resolve())}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-u", "-m", "ptx", *suite]
    running = [
        subprocess.Popen([*command, "--sm", str(sm), "--part", part], cwd=ROOT, env=environment) for sm, part in parts
    ]
    codes = [process.wait() for process in running]
    return not any(codes)


if __name__ == "__main__":
    sys.exit(main())
