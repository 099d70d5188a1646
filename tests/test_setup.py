"""What setup.py makes of the README and of the repository's address. Nothing is built, and nothing is fetched."""

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HERE = "https://example.org/someone/fastbf"
UNKNOWN = "the repository's address is unknown, so the README's links stay relative"


def git(folder, *args):
    subprocess.run(["git", "-C", folder, *args], check=True, capture_output=True)


def repository(folder, remote):
    git(folder, "init", "--quiet")
    git(folder, "remote", "add", "origin", remote)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with setup.py and a README, inside a repository that is not its own."""
    for name in os.environ:
        if name.startswith(("GIT_", "FASTBF_")):  # a hook of git names its own repository
            monkeypatch.delenv(name)
    repository(tmp_path, "https://example.org/others/around")
    (tmp_path / "project").mkdir()
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def metadata(project, monkeypatch):
    """A function that runs setup.py, and returns the README and the addresses that setuptools is given."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))

    def run():
        runpy.run_path(str(project / "setup.py"))
        return given["long_description"], given["project_urls"]

    return run


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://example.org/someone/fastbf.git", HERE),
        ("https://example.org/someone/fastbf/", HERE),
        ("https://user:token@example.org/someone/fastbf.git", HERE),
        ("http://example.org:8080/someone/fastbf", "https://example.org:8080/someone/fastbf"),
        ("git@example.org:someone/fastbf.git", HERE),
        ("example.org:/someone/fastbf", HERE),
        ("ssh://git@example.org:22/someone/fastbf.git", HERE),
        ("https://git.example.org/a/group/fast-bf.git", "https://git.example.org/a/group/fast-bf"),
    ],
)
@pytest.mark.parametrize("by", ["origin", "variable"])
def test_the_address(remote, address, by, project, metadata, monkeypatch):
    if by == "origin":
        repository(project, remote)
    else:
        repository(project, "https://example.org/a/fork")
        monkeypatch.setenv("FASTBF_REPOSITORY", remote)
    readme, urls = metadata()
    assert urls["Repository"] == address
    assert f"]({address}/blob/HEAD/docs/usage.md)" in readme
    assert "token" not in readme + str(urls)


@pytest.mark.parametrize("remote", ["../fastbf.git", "/srv/fastbf.git", "file:///srv/fastbf", "C:/fastbf", "repos.d/x"])
def test_a_folder_is_no_address(remote, project, metadata):
    repository(project, remote)
    with pytest.warns(UserWarning, match=UNKNOWN):
        assert "Repository" not in metadata()[1]


def test_where_the_address_is_unknown_the_readme_stays(metadata):
    with pytest.warns(UserWarning, match=f"{UNKNOWN}.* set FASTBF_REPOSITORY"):
        readme, urls = metadata()
    assert readme == README
    assert len(urls) == 3
    assert all(url.startswith("https://") and "," not in name for name, url in urls.items())


def test_without_git_the_address_is_unknown(project, metadata, monkeypatch):
    repository(project, HERE)
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match=UNKNOWN):
        metadata()


def test_an_sdist_says_where_it_comes_from(project, metadata):
    """Also where it lies in a repository."""
    repository(project, "https://example.org/packagers/fastbf")
    info = f"Name: fastbf\nProject-URL: Issues, {HERE}/issues\nProject-URL: Repository, {HERE}\n\n# fastbf"
    (project / "PKG-INFO").write_text(info, encoding="utf-8")
    assert metadata()[1]["Repository"] == HERE
    (project / "PKG-INFO").write_text("Name: fastbf\n\nProject-URL: Repository, in the text", encoding="utf-8")
    with pytest.warns(UserWarning, match=UNKNOWN):
        metadata()


def test_every_link_of_the_readme_is_absolute(metadata, monkeypatch):
    monkeypatch.setenv("FASTBF_REPOSITORY", HERE)
    readme, urls = metadata()
    code = re.compile(r"```.*?```", re.DOTALL)
    assert code.findall(readme) == code.findall(README)
    found = re.findall(r"(!?)\[[^\[\]]*\]\(([^)]+)\)", code.sub("", readme))
    assert len(found) > 15
    for picture, target in found:
        assert target.startswith("https://")
        if target.startswith(HERE):
            kind, path = re.fullmatch(rf"{HERE}/(raw|blob)/HEAD/([^#]+)(?:#.*)?", target).groups()
            assert kind == ("raw" if picture else "blob")
            assert (ROOT / path).is_file()
    assert "](" not in re.sub(r"\]\(https://", "", code.sub("", readme))
    assert "<img" not in README
    for name in ("Documentation", "Changelog"):
        assert (ROOT / urls[name].removeprefix(f"{HERE}/blob/HEAD/")).is_file()
    assert urls["Issues"] == f"{HERE}/issues"


def test_what_is_made_absolute(project, metadata, monkeypatch):
    monkeypatch.setenv("FASTBF_REPOSITORY", HERE)
    page = "[![a b](c.png)](d.md) `[e](f.md)` [`g`\nh](i.md#j) [k](#l) [m](https://n.org) [o](mailto:p@q.org)"
    page += "\n```\n[r](s.md)\n```\n"
    (project / "README.md").write_text(page, encoding="utf-8")
    blob, raw = f"{HERE}/blob/HEAD", f"{HERE}/raw/HEAD"
    expected = page.replace("c.png", f"{raw}/c.png").replace("d.md", f"{blob}/d.md").replace("i.md", f"{blob}/i.md")
    assert metadata()[0] == expected
