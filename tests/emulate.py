"""``python -m tests.emulate``: executes compiled kernels without a GPU, on all cores.

Runs the quick suite of the emulator (``../shared/ptx``: its README says what it reports) for sm_80 and sm_90, a part of
the cases in each process; with ``--split`` each case for one of the two. The suite reaches inside fastbf through
``tests/emulation.py``. Prints every case; the exit status is 0 if nothing is wrong, and where there is no emulator.

The suite's limits are wide for gradients of queries and keys: at 512 channels a fifth of the keys may be missing. So
their errors are held against PyTorch's own here as well, unless that is 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
#: How many times the error of PyTorch's operators in the same dtype ours may be. In entries of the table it is at most
#: 1.25 times that.
MOST = 2.0


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
    with TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{i}.jsonl" for i in range(len(parts))]
        running = [
            subprocess.Popen([*command, "--sm", str(sm), "--part", part, "--log", log], cwd=ROOT, env=environment)
            for (sm, part), log in zip(parts, logs, strict=True)
        ]
        codes = [process.wait() for process in running]
        worse = [line for log in logs for line in _worse_than_eager(log)]
    print(*worse, sep="\n", end="\n" if worse else "")
    return not any(codes) and not worse


def _worse_than_eager(log: Path) -> Iterator[str]:
    """A line for each gradient of queries or keys whose error is too many times that of PyTorch's operators."""
    for case in map(json.loads, log.read_text(encoding="utf-8").splitlines() if log.exists() else ()):
        for result in case["outcomes"]:
            if result["name"] in ("dq", "dk") and 0 < MOST * result["eager"] < result["error"]:
                ratio = result["error"] / result["eager"]
                where = f"sm_{case['sm']} {case['group']} {case['name']}: {result['name']}"
                yield f"FAIL {where} has {ratio:.2f} times the error of PyTorch's operators"


if __name__ == "__main__":
    sys.exit(main())
