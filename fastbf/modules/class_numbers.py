"""Numbers of each class, from whatever holds them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


def numbers(name: str, values: Any, count: int, *, absent: float | None = None) -> array[float]:
    """``count`` finite numbers ≥ 0 from a tensor, an array, a mapping from classes or any other iterable in order.

    Args:
        name: of the argument.
        absent: the number of a class that a mapping lacks; None if a mapping must have all.

    Raises:
        TypeError: not an iterable of numbers, one without an order, or a mapping whose keys are no integers.
        ValueError: another number of them, one that is negative, infinite or NaN, or a key that is no class.
    """
    expected = f"{name} must hold {count} numbers, one for each class in order"
    if hasattr(values, "keys"):  # a dict, a Counter, a pandas.Series, whose order is not that of its index
        values = _in_order(name, values, count, absent)
    if isinstance(values, str | bytes | AbstractSet) or not isinstance(values, Iterable):
        raise TypeError(f"{expected}, got {type(values).__name__}")
    if isinstance(values, Tensor) and values.is_meta:
        raise ValueError(f"{expected}, got a tensor on the meta device, which holds none: give a list")
    if isinstance(values, Tensor) and values.layout is not torch.strided:
        raise TypeError(f"{expected}, got a tensor with the layout {values.layout}: give a dense one")
    items: Any = values if hasattr(values, "shape") else list(values)
    shape = tuple(getattr(items, "shape", (len(items),)))
    if shape != (count,):
        raise ValueError(f"{name} must have shape {(count,)}, got {shape}")
    result = array("d")
    for i, value in enumerate(items.tolist() if hasattr(items, "tolist") else items):
        if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
            raise TypeError(f"{expected}, got {type(value).__name__} for class {i}")
        try:
            number = float(value)
        except OverflowError:  # of a Python integer
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, got {number} for class {i}")
        if number < 0:
            raise ValueError(f"{name} must not be negative, got {number} for class {i}")
        result.append(number)
    return result


def _in_order(name: str, mapping: Any, count: int, absent: float | None) -> list[Any]:
    """The values of a mapping in the order of the classes that are its keys."""
    keys = list(mapping.keys())
    for key in keys:
        if isinstance(key, bool) or not isinstance(key, Integral):
            advice = ": count labels.tolist()" if isinstance(key, Tensor) else ""
            raise TypeError(f"{name} must have the classes 0 to {count - 1} as keys, got {key!r}{advice}")
        if not 0 <= int(key) < count:
            raise ValueError(f"{name} must have the classes 0 to {count - 1} as keys, got {key}")
    if len(set(keys)) < len(keys):
        raise ValueError(f"{name} must have every class as a key once, got one twice")
    missing = [i for i in range(count) if i not in keys]
    if missing and absent is None:
        raise ValueError(f"{name} must have all classes 0 to {count - 1} as keys, got none for {missing[0]}")
    return [absent if i in missing else mapping[i] for i in range(count)]
