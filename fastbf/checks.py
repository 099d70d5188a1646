"""Argument checks: each raises an error that names the argument, what was given and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import TypeVar

import torch
from torch import Tensor

from fastbf.reference import LayerWeights
from fastbf.torch_state import autocast_dtype, has_values, jit_traced

T = TypeVar("T")


def either(name: str, value: T | None, alias: str, other: T | None) -> T:
    """Returns an argument that has two names, of which one must be given."""
    if value is not None and other is None:
        return value
    if other is not None and value is None:
        return other
    given = "neither" if value is None else "both"
    raise TypeError(f"{name} must be given, as {name} or as {alias}, got {given}")


def tensor(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}{as_tensor(x)}")
    return x


def as_tensor(x: object) -> str:
    """Advice for what is no tensor, if torch makes one of it."""
    is_array = hasattr(x, "__array__") or (isinstance(x, list | tuple) and not any(isinstance(t, Tensor) for t in x))
    return ": torch.as_tensor makes one of it" if is_array else ""


def floating(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        x = tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {x.dtype}")
    return x


def dense(name: str, x: Tensor) -> Tensor:
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one: pad it, torch.nested.to_padded_tensor")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {x.layout}: convert it, {name}.to_dense()")
    return x


def min_rank(name: str, x: Tensor, rank: int, layout: str) -> None:
    if x.dim() < rank:
        raise ValueError(f"{name} must be {layout} with at least {rank} dimensions, got shape {tuple(x.shape)}")


def shape(name: str, x: Tensor | None, expected: tuple[int, ...]) -> None:
    if x is not None and tuple(tensor(name, x).shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")


def same_device(name: str, x: Tensor, others: Mapping[str, Tensor | None]) -> None:
    for other, y in others.items():
        if y is not None and y.device != x.device:
            raise ValueError(f"{other} must be on the device of {name}, {x.device}, got {y.device}")


def same_dtype(name: str, x: Tensor, others: Mapping[str, Tensor | None]) -> None:
    for other, y in others.items():
        if y is not None and y.dtype != x.dtype:
            raise TypeError(f"{other} must have the dtype of {name}, {x.dtype}, got {y.dtype}")


def dtype_of_weights(name: str, x: Tensor, weights: Mapping[str, Tensor | None]) -> None:
    """Checks that x and the weights have one dtype, as they must where autocast is off."""
    dtypes = {w.dtype for w in weights.values() if w is not None}
    if len(dtypes) > 1:
        same_dtype(name, x, weights)
    elif dtypes and x.dtype not in dtypes:
        dtype = dtypes.pop()
        raise TypeError(
            f"{name} must have the dtype of the weights, {dtype}, got {x.dtype}: use torch.autocast, or cast one of "
            f"them, {name}.to({dtype})"
        )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def probability(name: str, p: object) -> float:
    if type(p) is float and 0 <= p <= 1:
        return p
    number = _number(name, p)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {p}")
    return number


def finite(name: str, value: object) -> float:
    if type(value) is float and -math.inf < value < math.inf:  # isinstance with an abstract class costs more
        return value
    number = _number(name, value)
    if not -math.inf < number < math.inf:  # not math.isfinite, which torch.compile does not trace for every number
        raise ValueError(f"{name} must be finite, got {value}")
    return number


def integer(name: str, value: object) -> int:
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]  # a size that a tracer leaves open counts as a number
    if isinstance(value, Tensor) and jit_traced():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return int(value)


def choice(name: str, value: object, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def positive(name: str, value: object) -> int:
    number = integer(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return number


def heads(width_name: str, width: int, heads_name: str, num_heads: int) -> None:
    positive(width_name, width)
    positive(heads_name, num_heads)
    if width % num_heads:
        fits = next(heads for heads in range(num_heads, 0, -1) if width % heads == 0)
        raise ValueError(
            f"{heads_name} must divide {width_name}, got {num_heads} for {width_name}={width}; {fits} does"
        )


def seed(value: int | Tensor | None, device: torch.device) -> None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        if value is not None and not -(2**63) <= value < 2**63:
            raise ValueError(f"seed must fit in 64 bits, got {value}")
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"seed must be an int, an int64 tensor of one element or None, got {type(value).__name__}")
    if value.dtype != torch.int64 or value.numel() != 1:
        raise TypeError(f"seed must be an int64 tensor of one element, got {value.dtype} of shape {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"seed must be on the device of the input, {device}, got {value.device}")


def target(target: object, rows: tuple[int, ...], num_classes: int, device: torch.device, ignore_index: int) -> bool:
    """Checks a target for logits of shape (*rows, num_classes); returns whether the input is a fork.

    Class indices are integers of the rows' shape, probabilities floats with the classes last. A fork has twice as
    many rows as targets along the first dimension. Index ranges are checked on CPU only, because the check would wait
    for a GPU.
    """
    target = tensor("target", target)
    if target.device != device:
        raise ValueError(f"target must be on the device of the input, {device}, got {target.device}")
    tail = (num_classes,) if target.is_floating_point() else ()
    if tail and ignore_index >= 0:
        raise ValueError(f"ignore_index must be negative where targets are probabilities, got {ignore_index}")
    forked = (rows[0] // 2, *rows[1:], *tail)
    if target.is_floating_point():
        if target.dim() != len(rows) + 1:
            raise TypeError(
                f"target must hold class indices as int64, or probabilities of shape {(*rows, num_classes)}; got "
                f"{target.dtype} of shape {tuple(target.shape)}: target.long() makes class indices of it"
            )
        if target.shape[-1] != num_classes:
            indices = ": target.long().squeeze(-1) makes class indices of it" if target.shape[-1] == 1 else ""
            raise ValueError(
                f"target must give a probability for each of the {num_classes} classes, got {target.shape[-1]}{indices}"
            )
    elif target.dtype != torch.int64:
        raise TypeError(
            f"target must hold class indices as int64, or probabilities as floats; got {target.dtype}: target.long() "
            "makes class indices of it"
        )
    if tuple(target.shape) != (*rows, *tail) and (rows[0] % 2 or tuple(target.shape) != forked):
        raise ValueError(
            f"target must have shape {(*rows, *tail)}" + ("" if rows[0] % 2 else f", or {forked} for a fork,") +
            f" for an input of {rows[0]} rows; got {tuple(target.shape)}{_fitting(target, rows, num_classes)}"
        )  # fmt: skip
    index_range(target, num_classes, ignore_index)
    return target.shape[0] != rows[0]


def _fitting(target: Tensor, rows: tuple[int, ...], num_classes: int) -> str:
    """Advice for a target of another shape than the rows of an input have."""
    if not target.is_floating_point() and target.dim() == len(rows) + 1:
        if target.shape[-1] == num_classes:
            return ": target.argmax(-1) makes class indices of one-hot targets"
        if target.shape[-1] == 1:
            return ": target.squeeze(-1) drops the last dimension"
    if target.dim() and target.shape[0] == 2 * rows[0]:
        return ": these are two a row, so give each once, or call train() if the BatchFormer is in evaluation mode"
    return ""


def index_range(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Checks class indices where that waits for nothing: on CPU."""
    if target.is_cpu and not target.is_floating_point() and has_values(target):
        class_indices(target, num_classes, ignore_index)


def class_indices(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Checks that every target is a class or ignored, which waits for the device."""
    if target.numel() == 0:
        return
    least, greatest = torch.aminmax(target)
    if least.item() >= 0 and greatest.item() < num_classes:
        return
    bad = target[((target < 0) | (target >= num_classes)) & (target != ignore_index)]
    if bad.numel():
        raise ValueError(
            f"target must hold class indices in [0, {num_classes - 1}] or ignore_index={ignore_index}, "
            f"got {bad.flatten()[0].item()}"
        )


def layer(x: Tensor, weights: LayerWeights, num_heads: int) -> None:
    """Checks that the tensors of an encoder layer fit each other."""
    dense("x", floating("x", x))
    min_rank("x", x, 2, "(N, …, C)")
    channels, fields = x.shape[-1], weights._asdict()
    heads("the width of x", channels, "num_heads", num_heads)
    min_rank("linear1_weight", tensor("linear1_weight", weights.linear1_weight), 2, "(F, C)")
    width = weights.linear1_weight.shape[0]
    for name, rows in zip(
        ("in_proj", "out_proj", "linear1", "linear2", "norm1", "norm2"),
        (3 * channels, channels, width, channels, channels, channels),
        strict=True,
    ):
        columns = () if name.startswith("norm") else (width if name == "linear2" else channels,)
        weight, bias = f"{name}_weight", f"{name}_bias"
        shape(weight, floating(weight, fields[weight]), (rows, *columns))
        shape(bias, fields[bias], (rows,))
    same_device("x", x, fields)
    if autocast_dtype(x) is None:
        dtype_of_weights("x", x, {name: w for name, w in fields.items() if not name.startswith("norm")})


def classifier(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, weight: Tensor | None, logit_bias: Tensor | None
) -> None:
    """Checks that the tensors of a classifier fit its input and each other."""
    dense("input", floating("input", input))
    min_rank("input", input, 2, "(M, …, C)")
    min_rank("linear_weight", floating("linear_weight", linear_weight), 2, "(K, C)")
    num_classes = linear_weight.shape[0]
    shape("linear_weight", linear_weight, (num_classes, input.shape[-1]))
    per_class = {"linear_bias": linear_bias, "weight": weight, "logit_bias": logit_bias}
    for name, t in per_class.items():
        if t is not None:
            shape(name, floating(name, t), (num_classes,))
    same_device("input", input, {"linear_weight": linear_weight, **per_class})
    if autocast_dtype(input) is None:
        dtype_of_weights("input", input, {"linear_weight": linear_weight, "linear_bias": linear_bias})
    positive("the number of classes, linear_weight.shape[0],", num_classes)
