"""The README's examples run as they stand, and its commands exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"### (.+?)\n.*?```python\n(.+?)```", README, flags=re.DOTALL)


def test_there_are_five_examples():
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example(title, code):
    exec(compile(code, title, "exec"), {"__name__": "example"})


def test_commands_are_make_targets():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for command in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert command in targets
