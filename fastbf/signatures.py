"""What was found out about calls of one signature. Checks and choices of a call take as long as several launches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from fastbf.torch_state import autocast_dtype, transformed

Signature = tuple[Any, ...]

#: How many signatures are remembered; the oldest go.
MOST = 4096
_found: dict[Signature, Any] = {}


def signature(x: Tensor, tensors: Sequence[Tensor | None], *others: Any) -> Signature | None:
    """All that checks and the choice of a backend read; None under a compiler, or if one is no tensor.

    Another batch length is another signature only where it is 0.

    Args:
        x: the input.
        tensors: the others.
        others: the rest of the call. Of numbers also the types, because 1 == True.
    """
    if torch.compiler.is_compiling():
        return None
    try:
        size, of_tensors = x.shape, [None if t is None else (t.shape, t.dtype, t.device, type(t)) for t in tensors]
        of_x = len(size), 0 in size, size[-1], x.dtype, x.device, x.layout, type(x)
    except (AttributeError, IndexError, RuntimeError):  # not all of them are tensors, or one is nested
        return None
    return (of_x, autocast_dtype(x), transformed(), *others, *of_tensors)


def recall(key: Signature | None) -> Any:
    """What was remembered; None if nothing was."""
    if key is None:  # a compiler would guard the dict, which grows
        return None
    try:
        return _found.get(key)
    except TypeError:  # an argument that has no hash, which the checks name
        return None


def remember(key: Signature | None, value: Any) -> None:
    """Remembers what holds for every call of a signature."""
    if key is None:
        return
    with suppress(TypeError):  # a size that a tracer leaves open has no hash
        _found[key] = value
    if len(_found) > MOST:
        with suppress(StopIteration, RuntimeError):  # another thread was quicker
            _found.pop(next(iter(_found)), None)


def forget() -> None:
    """Forgets everything, where a choice changes: a kernel that could not be built."""
    _found.clear()
