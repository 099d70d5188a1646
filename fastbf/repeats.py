"""Calls that were made before and run from code that was made of them (``tape.py``)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from threading import Lock
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
    dtypes: tuple[torch.dtype | None, ...]  #: of the tensors
    of: Any  #: what the call's autograd Function was given besides tensors
    again: Any  #: makes a call that it fits, of a public function: of the tape and what ``again`` there takes
    source: str  #: of both functions
    stream_for: Any = None  #: gives the stream that kernels are launched on; None where launches take the long way


#: How many tapes are held, and signatures of calls without one; the oldest go. A tape takes about 16 KB.
MOST_TAPES, MOST_SEEN = 512, 4096

#: Every tape by what it is of.
tapes: dict[What, tuple[Tape, ...]] = {}
_held: deque[tuple[What, Tape]] = deque()
_seen: dict[What, int] = {}
_lock = Lock()


def forget() -> None:
    """Forgets every call, where a choice changes: a kernel that could not be built, or that is exchanged."""
    with _lock:
        tapes.clear()
        _held.clear()
        _seen.clear()


def is_second(what: What, geometry: Callable[[], What], nth: int = 2) -> bool:
    """Whether a call of ``what`` comes for the n-th time, or later one of this geometry of tensors for the second."""
    before = _count(what)
    return before == nth - 1 if before < nth else _count((*what, *geometry())) == 1


def _count(signature: What) -> int:
    """How often the signature came before."""
    with _lock:
        try:
            before = _seen.get(signature, 0)
        except TypeError:  # an argument that has no hash
            return 0
        _seen[signature] = before + 1
        while len(_seen) > MOST_SEEN:
            del _seen[next(iter(_seen))]
    return before


def hold(what: What, tape: Tape) -> None:
    """Holds a tape for calls of ``what``."""
    with _lock:
        tapes[what] = *tapes.get(what, ()), tape
        _held.append((what, tape))
        if len(_held) > MOST_TAPES:
            oldest, gone = _held.popleft()
            if others := tuple(t for t in tapes.pop(oldest, ()) if t is not gone):
                tapes[oldest] = others


def what(op: str, x: object, backend: object, *others: Any) -> What | None:
    """What a call of ``op`` on x depends on besides tensors; None where it must run as written.

    Args:
        op: the function.
        x: its first tensor.
        backend: what the caller asks for.
        others: the rest of the call. Of numbers also the types, because 1 == True.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return None
    if x.is_nested or x.layout is not torch.strided or transformed():
        return None
    return (op, x.shape, autocast_dtype(x), torch.is_grad_enabled(), backend, *others)


def find(what: What | None, tensors: Sequence[object]) -> Tape | None:
    """The tape of a call; None if there is none, or if something sees every operator.

    Under a compiler ``what`` is None: it would guard the dictionary, which grows.
    """
    if what is None or watched():
        return None
    try:
        for tape in tapes.get(what, ()):
            if tape.fits(*tensors):
                return tape
    except (TypeError, RuntimeError):  # an argument that has no hash, a tensor without strides: checks name both
        pass
    return None
