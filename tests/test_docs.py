"""Links between the pages, and from docstrings and comments to the pages, lead to something that is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
SOURCES = sorted({path.resolve() for folder in ("fastbf", "kernels") for path in (ROOT / folder).rglob("*.py")})
NAMED = [(p, page) for p in SOURCES for page in re.findall(r"docs/[\w-]+\.md", p.read_text(encoding="utf-8"))]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """The targets of links and pictures that lead to no other site."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]+`", "", prose(page)))
    return [target for target in found if not re.match(r"\w+:", target)]


def anchors(page: Path) -> set[str]:
    """Those of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.is_file(), f"{page.name} links to {target}"
        assert other.is_relative_to(ROOT.resolve()), f"{page.name} links to {target}, outside the repository"
        assert not anchor or anchor in anchors(other), f"{page.name} links to {target}, which has no such heading"


@pytest.mark.parametrize("name", [p.stem for p in (ROOT / "docs").glob("*.md") if p.stem != "triton-wgmma"])
def test_the_readme_links_every_page(name):
    assert f"docs/{name}.md" in links(ROOT / "README.md")


def test_pages_that_the_code_names_exist():
    assert NAMED
    for path, page in NAMED:
        assert (ROOT / page).is_file(), f"{path.name} names {page}"


def test_the_citation_is_of_this_version():
    version = re.search(r'"(.+)"', (ROOT / "fastbf" / "version.py").read_text(encoding="utf-8"))[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
