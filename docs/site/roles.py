"""Cross-references of docstrings, ``:class:`Name```, as links of the site."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Writes each role as the cross-reference that mkdocstrings understands."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"[`\1`][\1]", obj.docstring.value)
