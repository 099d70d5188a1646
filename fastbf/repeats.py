"""Calls that were made before and run from code that was made of them (``triton_backend/tape.py``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbf.torch_state import autocast_dtype, transformed, watched

#: All that a call depends on besides its tensors' geometry.
What = tuple[Any, ...]
Results = Sequence[Tensor | None]


class Tape(NamedTuple):
    """A call as straight-line code."""

    fits: Callable[..., bool]  #: whether tensors, of which any may be something else, have the geometry of the call's
    run: Callable[..., Results | None]  #: of a stream, a seed and tensors that fit; None if an address is not aligned
    draws: bool  #: whether it takes a seed
    of: Any  #: what the call's autograd Function was given besides tensors
    source: str  #: of both functions


#: Every tape by what it is of.
tapes: dict[What, tuple[Tape, ...]] = {}


def forget() -> None:
    """Forgets every call, where a choice changes: a kernel that could not be built."""
    tapes.clear()


def what(op: str, x: object, backend: object, *others: Any) -> What | None:
    """What a call of ``op`` on x depends on besides tensors; None where it must run as written, or by PyTorch.

    Args:
        op: the function.
        x: its first tensor.
        backend: what the caller asks for.
        others: the rest of the call. Of numbers also the types, because 1 == True.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not (x.is_cuda or backend == "triton"):
        return None
    if x.is_nested or transformed():
        return None
    return (op, x.shape, autocast_dtype(x), backend, *others)


def find(what: What | None, tensors: Sequence[object]) -> Tape | None:
    """The tape of a call; None if there is none, or if something sees every operator."""
    if what is None or torch.compiler.is_compiling() or watched():  # a compiler would guard the dict, which grows
        return None
    try:
        found = tapes.get(what, ())
    except TypeError:  # an argument that has no hash, which the checks name
        return None
    for tape in found:
        if tape.fits(*tensors):
            return tape
    return None
