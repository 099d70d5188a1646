"""What the reference shows of the code otherwise than it stands there: cross-references, and unknown keywords."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Writes each role, ``:class:`Name```, as the cross-reference that mkdocstrings understands."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"[`\1`][\1]", obj.docstring.value)


class Unknown(griffe.Extension):
    """Hides ``**unknown`` and the default NOTHING, as ``suggestions.hiding_unknown`` does in ``help``."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        for parameter in list(func.parameters):
            if parameter.name == "unknown":
                del func.parameters["unknown"]
            elif str(parameter.default) == "NOTHING":
                parameter.default = None
