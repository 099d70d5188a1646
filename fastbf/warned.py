"""Warnings that point at the line of a user's code."""

from __future__ import annotations

import warnings
from inspect import currentframe

from fastbf.torch_state import traced_as_constant

#: Packages whose frames stand between a user's line and a warning.
_BETWEEN = ("fastbf", "torch")


@traced_as_constant  # a compiler does not trace frames
def warn(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warns at the nearest line that neither fastbf nor torch holds: modules are called by torch's own code."""
    level, frame = 1, currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
