"""The part of packaging that needs Python; the rest of the metadata is in pyproject.toml.

``kernels/`` is installed as ``fastbf.kernels``. In a checkout the link ``fastbf/kernels`` leads there too. Where git
makes no links it is a text file, so the folder is named here.

The README's links are relative, which is right in a checkout and nowhere on PyPI. Where the repository's address is
known, the metadata has them absolute, and links to the repository, its documentation, changes and issues.
"""

import os
import re
import subprocess
import warnings
from contextlib import suppress
from email import message_from_string
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
HOST, PATH = r"[\w-]+(?:\.[\w-]+)+", r"/?([\w.~/-]+?)(?:\.git)?/?"
REMOTES = (  # what is no group is not for the address: names of users, tokens, ports of ssh
    rf"https?://(?:[^@/]*@)?({HOST}(?::\d+)?)/{PATH}",
    rf"ssh://(?:[^@/]*@)?({HOST})(?::\d+)?/{PATH}",
    rf"(?:[\w.-]+@)?({HOST}):{PATH}",
)
#: Code, where nothing is a link; else the end of a link or a whole picture, and where it leads inside the repository.
LINK = re.compile(r"```.*?```|`[^`]+`|(!\[[^\]]*)?\]\((?![\w+.-]+:|[#/])([^)\s]+)\)", re.DOTALL)


def remote():
    """Where the repository is: by FASTBF_REPOSITORY, else in an sdist as it says itself, else git's "origin"."""
    if "FASTBF_REPOSITORY" in os.environ:
        return os.environ["FASTBF_REPOSITORY"]
    if (ROOT / "PKG-INFO").is_file():
        urls = message_from_string((ROOT / "PKG-INFO").read_text(encoding="utf-8")).get_all("Project-URL", [])
        return next((url.partition(", ")[2] for url in urls if url.startswith("Repository, ")), "")
    if (ROOT / ".git").exists():  # else git would answer for a repository around this folder
        with suppress(OSError):
            command = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def address():
    """https://host/owner/name; None where that is unknown, or leads to a folder."""
    where = remote()
    found = next(filter(None, (re.fullmatch(pattern, where) for pattern in REMOTES)), None)
    return f"https://{found[1]}/{found[2]}" if found else None


def absolute(page, repository):
    """A page with its relative links and pictures as addresses of the repository's default branch."""

    def link(found):
        picture, target = found.groups()
        kind = "raw" if picture else "blob"
        return f"{picture or ''}]({repository}/{kind}/HEAD/{target})" if target else found[0]

    return LINK.sub(link, page)


class SdistWithLink(sdist):
    """An sdist with the link ``fastbf/kernels``, so that fastbf can be imported where the sdist is unpacked."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        link = Path(base_dir, "fastbf", "kernels")
        with suppress(OSError):  # some systems make no links; what is installed from the sdist is the same
            link.symlink_to(Path("..", "kernels"), target_is_directory=True)


readme, repository = (ROOT / "README.md").read_text(encoding="utf-8"), address()
urls = {  # a comma would end a name
    "Paper: BatchFormer": "https://arxiv.org/abs/2203.01522",
    "Paper: BatchFormerV2": "https://arxiv.org/abs/2204.01254",
    "The authors' code": "https://github.com/zhihou7/BatchFormer",
}
if repository:
    readme = absolute(readme, repository)
    pages = {"Documentation": "blob/HEAD/docs/usage.md", "Changelog": "blob/HEAD/CHANGELOG.md", "Issues": "issues"}
    urls = {"Repository": repository, **{name: f"{repository}/{page}" for name, page in pages.items()}, **urls}
else:
    warnings.warn(
        "the repository's address is unknown, so the README's links stay relative, which PyPI does not follow: set "
        "FASTBF_REPOSITORY, or git's remote origin (CONTRIBUTING.md)",
        stacklevel=1,
    )

setup(
    packages=sorted({*find_packages(include=["fastbf", "fastbf.*"]), "fastbf.kernels"}),
    package_dir={"fastbf.kernels": "kernels"},
    cmdclass={"sdist": SdistWithLink},
    long_description=readme,
    long_description_content_type="text/markdown",
    project_urls=urls,
)
