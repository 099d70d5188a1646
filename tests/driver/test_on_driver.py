"""The checks of this folder, each file in a process of its own, whose libcuda does nothing and whose cache is new."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.driver import build, obstacle

FOLDER = Path(__file__).parent

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("libcuda")
    build(folder)
    return folder


FILES = sorted(FOLDER.glob("check_*.py"))
SLOW = {"check_memory": pytest.mark.slow}


@pytest.mark.parametrize("file", [pytest.param(f, id=f.stem, marks=SLOW.get(f.stem, ())) for f in FILES])
def test_on_a_driver_that_does_nothing(file, library, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    environment |= {"TRITON_LIBCUDA_PATH": str(library), "TRITON_CACHE_DIR": str(tmp_path)}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--confcutdir={FOLDER}"]
    command = [sys.executable, "-m", "pytest", *options, str(file)]
    where = {"env": environment, "cwd": FOLDER.parents[1]}
    result = subprocess.run(command, **where, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
