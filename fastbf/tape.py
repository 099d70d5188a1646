"""The operators of a call, noted once and then run as straight-line code.

What a direction of an autograd Function does between its tensors (strides, flags, which operators) follows from shapes,
strides, dtypes and numbers alone: its signature. The second call of a signature runs as written, under a dispatch mode
that notes every operator of PyTorch. From the third on the same operators run from generated code, in which all else is
a constant, and a view exists only where an operator reads it. The results are the same to the last bit, for less than
half the host's time. ``triton_backend/launches.py`` adds the launches of kernels.

A call that a tape cannot hold, or does not fit, runs as written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from fastbf import repeats
from fastbf.recorder import Recorder, Unrecordable
from fastbf.repeats import Tape, What, find, hold
from fastbf.torch_state import autocasts, device_type, no_autocast, watched

_matmul: Any = torch.backends.cuda.matmul


def play(
    what: What | None, tensors: Sequence[Tensor | None], seed: Tensor | None = None, tape: Tape | None = None
) -> Any:  # fmt: skip
    """The results of a call, by a tape of it; None if there is none.

    Args:
        what: besides the tensors' geometry, all that the call depends on; None for one that no tape holds.
        tensors: all that it reads, on the device of the first, which is not None. A list is emptied, so that what is
            read for the last time frees its memory.
        seed: that of the call, which no tape looks at.
        tape: the one that fits, if it was found already.
    """
    if tape is None and not torch.compiler.is_compiling():
        tape = find(what, tensors)
    if tape is None:
        return None
    first: Any = tensors[0]
    stream = None
    if tape.stream_for is not None and (stream := tape.stream_for(first.device)) is None:
        return None
    if not autocasts(device_type(first)):  # then without a context, which would take two calls
        return tape.run(stream, seed, tensors)
    with no_autocast(first):
        return tape.run(stream, seed, tensors)


@contextmanager
def noting(
    what: What | None, tensors: Sequence[Tensor | None], seed: Tensor | None = None, of: Any = None,
    again: Callable[..., Any] | None = None, listen: Callable[[Recorder], AbstractContextManager[object]] | None = None,
    stream_for: Callable[[torch.device], int | None] | None = None,
) -> Iterator[list[Any]]:  # fmt: skip
    """The context of a call for which :func:`play` has no tape. Its results, tensors or None, go into the list.

    The second call of a signature is noted. A batch of another size often comes once. Arguments as in :func:`play`;
    ``of``, ``again`` and ``stream_for`` are those of the tape, and in the context ``listen`` notes what is no operator.
    """
    results: list[Any] = []
    if what is None or torch.compiler.is_compiling() or watched() or not is_second(what, tensors, stream_for):
        yield results
        return
    recorder = Recorder(tensors, seed)
    with recorder, nullcontext() if listen is None else listen(recorder):
        yield results
    with suppress(Unrecordable):
        hold(what, recorder.tape(results, of, again)._replace(stream_for=stream_for))


def is_second(
    what: What, tensors: Sequence[Tensor | None], stream_for: Callable[[torch.device], int | None] | None = None,
    nth: int = 2,
) -> bool:  # fmt: skip
    """Whether the call comes for the second time, and is one that a tape may hold. A size that comes once costs little.

    Arguments as in :func:`noting`; ``nth`` may ask for a later time.
    """
    first: Any = tensors[0]
    given = [t for t in tensors if t is not None]
    if stream_for is not None and stream_for(first.device) is None:
        return False
    if not repeats.is_second(what, lambda: (first.device, _matmul.fp32_precision, *map(_geometry, tensors)), nth):
        return False
    aligned = stream_for is None or not any(t.data_ptr() % 16 for t in given)  # as kernels that were noted may assume
    return aligned and len({id(t) for t in given}) == len(given)


def _geometry(t: Tensor | None) -> tuple[Any, ...] | None:
    return None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16, t.requires_grad)
