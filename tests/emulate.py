"""``python -m tests.emulate``: executes compiled kernels without a GPU, on all cores.

Runs the quick suite of the emulator (``../shared/ptx``: its README says what it reports) for sm_80 and sm_90, a part of
the cases in each process. The suite reaches inside fastbf through ``tests/emulation.py``. Prints every case; the exit
status is 0 if nothing is wrong, and where the emulator is not there.
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
    parser.add_argument("suite", nargs="*", help="options of the suite, after --; by default --quick")
    arguments = parser.parse_args()
    if not (arguments.emulator / "ptx").is_dir():
        print(f"No emulator in {arguments.emulator}: compiled kernels are not executed.")
        return 0
    passed = [run(arguments.emulator, sm, arguments.suite or ["--quick"]) for sm in arguments.sm]
    return 0 if all(passed) else 1


def run(emulator: Path, sm: int, options: list[str]) -> bool:
    """Whether every part of the suite passes for one compute capability."""
    parts = os.cpu_count() or 1
    environment = {**os.environ, "PYTHONPATH": str(emulator.resolve())}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-u", "-m", "ptx", "--sm", str(sm), *options, "--part"]
    running = [subprocess.Popen([*command, f"{part}/{parts}"], cwd=ROOT, env=environment) for part in range(parts)]
    codes = [process.wait() for process in running]
    return not any(codes)


if __name__ == "__main__":
    sys.exit(main())
