"""What ranks send each other, as operators of the graphs that ``torch.compile`` traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import custom_op

from fastbf.distributed.process_groups import BATCH

# No CUDA graph may replay them: the ranks meet at every call.
_TAGS = tuple(tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None)


def communicating(schema: str, *writes: str) -> Callable[[Callable[..., None]], Callable[..., Any]]:
    """Registers a function that writes into tensors that it is given, and whose last arguments are those of a batch.

    Args:
        schema: the arguments before those, as ``torch.library`` takes them; what is written to is ``Tensor(a!)``.
        writes: the names of these.
    """

    def register(function: Callable[..., None]) -> Callable[..., Any]:
        name, whole = f"fastbf::{function.__name__.lstrip('_')}", f"({schema}, {BATCH}) -> ()"
        return custom_op(name, function, mutates_args=writes, schema=whole, tags=_TAGS)

    return register
