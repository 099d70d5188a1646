"""Numbers of each class that a module holds beside its parameters and buffers.

Casts, ``to_empty``, averages of buffers and ``state_dict`` do not reach them. They stay exact, and tensors of them are
made where they are needed.
"""

from __future__ import annotations

import math
import uuid
from array import array
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastbf.torch_state import has_values, is_fake, traced_as_constant, transformed, version
from fastbf.warned import warn


class ClassValues:
    """A number for each class, and a tensor of them for each device and dtype that asked.

    Args:
        source: the numbers, or a tensor of them. A tensor stays the caller's: what is written to it in place counts,
            and it gets a gradient if it requires one.
    """

    def __init__(self, source: array[float] | Tensor) -> None:
        self.source: array[float] | Tensor = source
        self.tensors: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.versions: list[int] = []
        self.traced: Any = None
        self.name: str = uuid.uuid4().hex
        _alive[self.name] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the numbers alone."""
        return ClassValues, (self._newest(),)

    def __repr__(self) -> str:
        return _short(self.source)

    def on(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The values in ``dtype`` on x's device, without a wait for it but at the first call there."""
        source = self.source
        if isinstance(source, Tensor) and (source.requires_grad or (source.device, source.dtype) == (x.device, dtype)):
            return source.to(x.device, dtype)
        if torch.compiler.is_compiling():
            _prepare(self.name, x.device, dtype)
            return self.traced
        if is_fake(x):
            return self._made(x.device, dtype)
        return self.held(x.device, dtype)

    def held(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """As :meth:`on`, of a source without gradient: the tensor that is kept for the device, or a new one."""
        found = self.tensors.get((device, dtype))
        if found is not None and len(self.tensors) == 1 and not isinstance(self.source, Tensor):
            return found
        if [version(t) for t in self._all()] != self.versions:
            self.source, self.tensors, found = self._newest(), {}, None
        if found is None:
            found = self._made(device, dtype)
            lasting = type(found) is Tensor and not transformed()  # not one of a mode or transform, which ends
            if lasting and device.type != "meta":
                self.tensors[device, dtype] = found
            self.versions = [version(t) for t in self._all()]
        return found

    def _all(self) -> list[Tensor]:
        return [*([self.source] if isinstance(self.source, Tensor) else []), *self.tensors.values()]

    def _newest(self) -> array[float] | Tensor:
        """The source, or the tensor that was written to in place since it was made."""
        for t, before in zip(self._all(), self.versions, strict=False):
            if version(t) != before:
                return t
        return self.source

    def _made(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False):
            source = self.source
            exact = source if isinstance(source, Tensor) else torch.tensor(source, dtype=torch.float64, device="cpu")
            return exact.detach().to(device, dtype, copy=True)


class LogCounts(ClassValues):
    """The logarithms of class counts, -inf for a count of 0; not all are 0."""

    def __init__(self, counts: array[float]) -> None:
        if not any(counts):
            raise ValueError("class_counts must not be 0 for every class")
        super().__init__(array("d", [math.log(n) if n else -math.inf for n in counts]))
        self.counts = counts
        self.empty: list[int] = [c for c, n in enumerate(counts) if not n]
        self.warned: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        newest = self._newest()
        return (LogCounts, (self.counts,)) if newest is self.source else (ClassValues, (newest,))

    def __repr__(self) -> str:
        return _short(self.counts)

    def check_smoothing(self, label_smoothing: float) -> None:
        """Raises ValueError where a count of 0 makes the loss of every row infinite."""
        if self.empty and label_smoothing:
            raise ValueError(
                f"class_counts must be positive with label_smoothing, got 0 for class {self.empty[0]}: "
                "the loss of every row would be infinite"
            )

    def check(self, target: Tensor, ignore_index: int) -> None:
        """Warns once, on a CPU, of a row whose loss is infinite; ValueError for targets that make every loss NaN."""
        if not self.empty:
            return
        if target.is_floating_point():
            raise ValueError(
                f"class_counts must be positive where targets are probabilities, got 0 for class {self.empty[0]}: "
                "the loss of every row would be NaN"
            )
        if self.warned or not target.is_cpu or not has_values(target):
            return
        found = target[torch.isin(target, torch.tensor(self.empty, device=target.device)) & (target != ignore_index)]
        if len(found):
            self.warned = True
            warn(f"class_counts is 0 for class {found[0].item()}, which occurs in target: the loss is infinite")


def _short(values: array[float] | Tensor) -> str:
    """A list of at most six numbers, the rest left out."""
    if isinstance(values, Tensor):
        return f"tensor of shape {tuple(values.shape)}"
    shown = [f"{value:g}" for value in (values if len(values) <= 6 else [*values[:3], *values[-2:]])]
    return f"[{', '.join(shown if len(values) <= 6 else [*shown[:3], '…', *shown[3:]])}]"


_alive: WeakValueDictionary[str, ClassValues] = WeakValueDictionary()


@traced_as_constant
def _prepare(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Puts a tensor where a graph reads it. A compiler runs this while it traces; it is no part of the graph."""
    values = _alive[name]
    values.traced = values.held(device, dtype)
