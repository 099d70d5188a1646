"""Communication between ranks as operators in the graphs of ``torch.compile``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch

from fastbf.distributed.process_groups import BATCH

# No CUDA graph may replay them, because the ranks meet at every call.
_TAGS = tuple(tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None)


def communicating(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function as an operator. It writes to its arguments, the last of which are the fields of a batch.

    Args:
        schema: the arguments before the batch, as ``torch.library`` takes them; those written to are ``Tensor(a!)``.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__.lstrip("_")
        if not hasattr(torch.ops.fastbf, name):  # else its module is imported once more
            torch.library.define(f"fastbf::{name}", f"({schema}, {BATCH}) -> ()", tags=_TAGS)
            torch.library.impl(f"fastbf::{name}", ("cpu", "cuda"))(
                partial(_newest, function.__module__, function.__name__)
            )
            torch.library.register_fake(f"fastbf::{name}")(lambda *_: None)
        registered = getattr(torch.ops.fastbf, name).default

        @wraps(function)
        def call(*args: Any) -> None:
            (registered if torch.compiler.is_compiling() else function)(*args)

        call.__dict__["as_operator"] = function
        return call

    return register


def _newest(module: str, function: str, *values: Any) -> None:
    """What an operator does: the function as its module has it, which may have been imported once more."""
    getattr(sys.modules[module], function).as_operator(*values)
