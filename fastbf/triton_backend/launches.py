"""Tapes (``fastbf/tape.py``) of calls that launch kernels: a launch's pointers are addresses plus numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor

from fastbf import tape
from fastbf.kernels.launch import Launched, noted, stream_for
from fastbf.recorder import Recorder, Step, Unrecordable
from fastbf.repeats import What


def noting(
    what: What | None, tensors: Sequence[Tensor | None], seed: Tensor | None = None, of: Any = None,
    again: Callable[..., Any] | None = None,
) -> AbstractContextManager[list[Any]]:  # fmt: skip
    """As :func:`fastbf.tape.noting`, launches included, whose tape is played on the current stream."""
    listen = lambda recorder: noted(partial(_note, recorder))  # noqa: E731
    return tape.noting(what, tensors, seed, of, again, listen, stream_for)


def _note(recorder: Recorder, launch: Launched) -> None:
    """Notes a launch; makes it in Triton's interpreter, whose own work with PyTorch is not noted."""
    if launch.interpret is not None:
        recorder.paused = True
        try:
            launch.interpret(*launch.tensors)
        finally:
            recorder.paused = False
    if not recorder.failure:
        try:
            recorder.steps.append(Step(_code(recorder, launch)))
        except Unrecordable as error:
            recorder.failure = str(error)


def _code(recorder: Recorder, launch: Launched) -> str:
    constant = recorder.constant
    if launch.compiled is None:
        return f"{constant(launch.interpret)}({', '.join(map(recorder.read, launch.tensors))})"
    compiled, pointers = launch.compiled, ", ".join(map(recorder.pointer, launch.tensors))
    run, function = constant(compiled.run), constant(compiled.function)
    metadata, values = constant(compiled.packed_metadata), constant(launch.values)
    return f"{run}({launch.programs}, 1, 1, stream, {function}, {metadata}, None, None, None, {pointers}, *{values})"
