"""sdist and wheel hold the package and nothing else, and the installed wheel passes the tests."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*args, **options):
    result = subprocess.run([sys.executable, "-m", *map(str, args)], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, built from the unpacked sdist, and the sdist."""
    out = tmp_path_factory.mktemp("dist")
    run("build", "--outdir", out, ROOT, cwd=out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_wheel_installs_one_top_level_package(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fastbf"}
    assert "fastbf/kernels/__init__.py" in names
    assert "fastbf/py.typed" in names


def test_sdist_can_be_tested(built):
    with tarfile.open(built[1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"kernels/__init__.py", "fastbf/modules.py", "tests/modules/test_layer.py", "Makefile", "README.md"} <= names


def test_installed_wheel_passes_the_tests(built, tmp_path):
    site, copy = tmp_path / "site", tmp_path / "copy"
    run("pip", "install", "--no-deps", "--target", site, built[0])
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = subprocess.check_output(
        [sys.executable, "-c", "import fastbf; print(fastbf.__file__)"], cwd=copy, env=environment, text=True
    )
    assert where.startswith(str(site))
    files = ("attention", "backend", "batchformer", "classifier", "errors", "layer", "paper", "surgery")
    run("pytest", "-q", *(f"tests/test_{name}.py" for name in files), cwd=copy, env=environment)
