"""The examples as their tests use them: run as a user runs them, or imported."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_quick(name: str, out: Path) -> list[str]:
    """The lines that an example prints in its quick form on the CPU, where it must not fail and shows its progress."""
    result = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--quick", "--device", "cpu", "--out", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "training: 100%" in result.stderr
    warning, *lines = result.stdout.splitlines()
    assert warning.endswith("Its numbers prove nothing.")
    assert lines[0].startswith("fastbf ")
    return lines


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An example's module; the examples' folder is found by imports until the test ends."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(name)
