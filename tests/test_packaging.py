"""fastbf and its kernels can be imported however they are installed, or not installed; nothing else is installed.

Nothing is fetched: builds are not isolated. The interpreter that imports sees PyTorch and Triton, but no fastbf other
than the one under test.
"""

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("bench", "docs", "examples", "fastbf", "kernels", "tests")
pytestmark = pytest.mark.slow

# What names no repository: a hook of git names its own.
OTHERS = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "FASTBF_"))}
# A locale in which a text file that is read without an encoding fails at the first letter that is not ASCII.
ASCII = {**OTHERS, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "gbk", "PYTHONUTF8": "0"}

# Run with -S: packages that are editable in the environment of the tests are not found, one in the given folder is.
SHOW = """
import site, sys
site.addsitedir(sys.argv[1])
import importlib.util, json, fastbf, fastbf.kernels.launch
print(json.dumps({
    "fastbf": fastbf.__file__,
    "launch": fastbf.kernels.launch.__file__,
    "kernels": importlib.util.find_spec("kernels") is not None,
}))
"""


def run(*args, **options):
    result = subprocess.run([sys.executable, "-m", *map(str, args)], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def install(*what, site, cwd):
    run("pip", "install", "--no-deps", "--no-build-isolation", "--target", site, *what, cwd=cwd, env=ASCII)


def imported(folder, *, cwd):
    """The files of fastbf and its kernels with ``folder`` on the path, and whether there is a top-level ``kernels``."""
    packages = [path for path in sys.path if path.endswith("-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *packages])}
    command = [sys.executable, "-S", "-c", SHOW, str(folder)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def assert_within(found, folder):
    for name in ("fastbf", "launch"):
        assert Path(found[name]).resolve().is_relative_to(Path(folder).resolve()), found[name]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The checkout as git lays it: links are links, and nothing is built yet. Changes not yet committed are in it."""
    clone = tmp_path_factory.mktemp("clone") / "clone"
    clone.mkdir()
    for file in ROOT.iterdir():
        if file.is_file() and file.name != ".git":  # which is a file in a worktree, and leads to its repository
            shutil.copy(file, clone)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, clone / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return clone


@pytest.fixture(scope="module")
def built(clone, tmp_path_factory):
    """The wheel, built from the unpacked sdist, and the sdist."""
    out = tmp_path_factory.mktemp("dist")
    source = out / "source"
    shutil.copytree(clone, source, symlinks=True)
    run("build", "--no-isolation", "--outdir", out, source, cwd=out, env=ASCII)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def wheel_site(built, tmp_path_factory):
    site = tmp_path_factory.mktemp("wheel")
    install(built[0], site=site, cwd=site)
    return site


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    """The folder of the unpacked sdist."""
    out = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(built[1]) as archive:
        archive.extractall(out, filter="data")
    (folder,) = out.iterdir()
    return folder


def test_git_stores_the_link():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout of git")
    stored = subprocess.check_output(["git", "ls-files", "--stage", "fastbf/kernels"], cwd=ROOT, text=True)
    assert stored.startswith("120000")
    assert subprocess.check_output(["git", "cat-file", "-p", stored.split()[1]], cwd=ROOT, text=True) == "../kernels"


def test_wheel_installs_one_top_level_package(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fastbf"}


def test_wheel_holds_every_module_once(built):
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / "fastbf").rglob("*.py") if "kernels" not in file.parts}
    expected |= {f"fastbf/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")}
    names = [name for name in zipfile.ZipFile(built[0]).namelist() if ".dist-info" not in name]
    assert sorted(names) == sorted(expected | {"fastbf/py.typed"})


def test_metadata(built):
    wheel = zipfile.ZipFile(built[0])
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(wheel.read(name))
    version = (ROOT / "fastbf" / "version.py").read_text(encoding="utf-8").split('"')[1]
    assert metadata["Version"] == version
    assert metadata["License-Expression"] == "MIT"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata.get_payload(decode=True).decode("utf-8").strip() == readme.strip()
    assert not readme.isascii()


@pytest.mark.parametrize("again", [False, True])
def test_the_address_of_the_repository_reaches_the_wheel(clone, tmp_path, again):
    """Through the sdist, in which there is no repository, and through an sdist that is made of that one."""
    source, address = tmp_path / "source", "https://example.org/someone/fastbf"
    shutil.copytree(clone, source, symlinks=True)
    assert not (source / ".git").exists()
    for command in (["init", "--quiet"], ["remote", "add", "origin", "git@example.org:someone/fastbf.git"]):
        subprocess.run(["git", "-C", source, *command], env=OTHERS, check=True)
    for _ in range(1 + again):
        run("build", "--no-isolation", "--sdist", "--outdir", tmp_path / "dist", source, cwd=tmp_path, env=ASCII)
        (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
        shutil.rmtree(source)
        shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
        (unpacked,) = (tmp_path / "unpacked").iterdir()
        source = unpacked.rename(source)
        shutil.rmtree(tmp_path / "unpacked")
    run("build", "--no-isolation", "--wheel", "--outdir", tmp_path, source, cwd=tmp_path, env=ASCII)
    (wheel,) = tmp_path.glob("*.whl")
    (name,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(zipfile.ZipFile(wheel).read(name))
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL"))
    assert len(urls) == 7
    assert urls["Repository"] == address
    assert urls["Issues"] == f"{address}/issues"
    assert metadata["Description-Content-Type"] == "text/markdown"
    readme = metadata.get_payload(decode=True).decode("utf-8")
    assert "![Points gained" in readme
    assert f"]({address}/raw/HEAD/examples/pictures/" in readme
    assert f"]({address}/blob/HEAD/docs/usage.md)" in readme
    assert (source / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()


def requirements(wheel):
    """What an installation takes besides: the names without and with an extra."""
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    required = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist")
    plain = {r for r in required if "extra ==" not in r}
    return plain, {r.split(";")[0] for r in required if "extra == 'triton'" in r.replace('"', "'")}


def test_requires_pytorch_alone(built):
    """Its builds for CUDA and ROCm bring their own Triton, which must not be replaced."""
    assert requirements(built[0]) == ({"torch>=2.10"}, {"triton>=3.6"})


# What a user without Triton runs. The GPU is one in name only: no kernel is reached.
WITHOUT_TRITON = """
import importlib.util, warnings, torch, fastbf
from fastbf import backend
assert importlib.util.find_spec("triton") is None
with warnings.catch_warnings():
    warnings.simplefilter("error")
    former, classifier = fastbf.BatchFormer(16), fastbf.SharedClassifier(16, 3)
    x, y = torch.randn(4, 16), torch.arange(4) % 3
    for _ in range(3):
        classifier.loss(former(x), y).backward()
obstacle = backend._obstacle
backend._obstacle = lambda *args, interpreter: obstacle(*args, interpreter=True)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for size in (5, 6):
        classifier.loss(former(torch.randn(size, 16)), torch.arange(size) % 3).backward()
print(len(seen), seen[0].message)
try:
    fastbf.BatchFormer(16, backend="triton")(x)
except ValueError as error:
    print(error)
"""


def test_without_triton(wheel_site, tmp_path):
    """Everything is served by PyTorch. One warning says so where kernels could serve."""
    for folder in (Path(path) for path in sys.path if path.endswith("-packages")):
        for package in (p for p in folder.iterdir() if not p.name.startswith("triton") and p.suffix != ".pth"):
            if not (tmp_path / package.name).exists():
                (tmp_path / package.name).symlink_to(package)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(wheel_site), str(tmp_path)])}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    found = subprocess.run([sys.executable, "-S", "-c", WITHOUT_TRITON], **options, check=False)
    assert found.returncode == 0, found.stderr
    warned, refused = found.stdout.splitlines()
    assert warned.startswith("1 fastbf uses PyTorch: triton is not installed")
    assert refused.startswith("backend='triton' cannot serve this call: triton is not installed")
    checked = subprocess.run([sys.executable, "-S", "-m", "fastbf"], **options, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.splitlines()[-1].startswith("everything is in order")


def test_sdist_can_be_tested(unpacked):
    for name in ("kernels/__init__.py", "fastbf/py.typed", "tests/modules/test_layer.py", "Makefile", "README.md"):
        assert (unpacked / name).is_file()
    link = unpacked / "fastbf" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", "kernels")


def test_import_from_wheel(wheel_site, tmp_path):
    found = imported(wheel_site, cwd=tmp_path)
    assert_within(found, wheel_site)
    assert not found["kernels"]


def test_import_from_installed_sdist(built, tmp_path):
    install(built[1], site=tmp_path / "site", cwd=tmp_path)
    found = imported(tmp_path / "site", cwd=tmp_path)
    assert_within(found, tmp_path / "site")
    assert not found["kernels"]


def test_import_from_unpacked_sdist(unpacked, tmp_path):
    assert_within(imported(unpacked, cwd=tmp_path), unpacked)


def test_import_from_editable_install(clone, tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(clone, source, symlinks=True)
    install("--editable", source, site=site, cwd=tmp_path)
    found = imported(site, cwd=tmp_path)
    assert_within(found, source)
    assert not found["kernels"]


def test_import_from_clone_where_nothing_is_installed(clone, tmp_path):
    assert_within(imported(clone, cwd=tmp_path), clone)


def test_import_inside_the_clone_after_an_install(clone, tmp_path):
    """There ``./fastbf`` comes before the installed one."""
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(clone, source, symlinks=True)
    install(".", site=site, cwd=source)
    assert_within(imported(site, cwd=source), source)
    assert_within(imported(site, cwd=tmp_path), site)


def test_import_from_copied_clone(clone, tmp_path):
    shutil.copytree(clone, tmp_path / "copy")  # links are followed
    assert_within(imported(tmp_path / "copy", cwd=tmp_path), tmp_path / "copy")


def test_import_from_copied_package(clone, tmp_path):
    shutil.copytree(clone / "fastbf", tmp_path / "copy" / "fastbf")  # links are followed
    assert_within(imported(tmp_path / "copy", cwd=tmp_path), tmp_path / "copy")


def test_install_where_git_makes_no_links(clone, tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(clone, source, symlinks=True)
    (source / "fastbf" / "kernels").unlink()
    (source / "fastbf" / "kernels").write_text("../kernels", encoding="utf-8")
    install(source, site=site, cwd=tmp_path)
    found = imported(site, cwd=tmp_path)
    assert_within(found, site)
    assert not found["kernels"]


def test_installed_wheel_passes_the_tests(wheel_site, tmp_path):
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(wheel_site)}
    where = subprocess.check_output(
        [sys.executable, "-c", "import fastbf; print(fastbf.__file__)"], cwd=tmp_path, env=environment, text=True
    )
    assert where.startswith(str(wheel_site))
    files = ("backend", "errors", "paper", "surgery")
    tests = [*(f"tests/test_{name}.py" for name in files), "tests/modules/test_batchformer.py"]
    run("pytest", "-q", *tests, cwd=tmp_path, env=environment)
