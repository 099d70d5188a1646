"""The code of the README and of pages runs as it stands; the README is one page, and its commands exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = ("usage", "distributed", "troubleshooting")
PAGES = [(ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in NAMES]


def examples(page: str) -> list[tuple[str, str]]:
    """(the heading that it stands under, its code) of every block of Python."""
    found, title = [], ""
    for heading, code in re.findall(r"^#+ ([^\n]+)$|^```python\n(.+?)^```", page, flags=re.DOTALL | re.MULTILINE):
        title = heading or title
        if code:
            found.append((title, code))
    return found


EXAMPLES = [example for page in (README, *PAGES) for example in examples(page)]


def test_every_example_is_found():
    assert len(EXAMPLES) == "".join((README, *PAGES)).count("```python") >= 15
    assert all(title for title, _ in EXAMPLES)


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example(title, code):
    exec(compile(code, title, "exec"), {"__name__": "example"})


def test_the_readme_is_one_page():
    assert len(README.split()) <= 1200


def test_commands_are_make_targets():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    commands = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    assert commands == ["demo", "test"]
    assert set(commands) <= set(targets)
