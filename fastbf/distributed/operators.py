"""Communication between ranks as operators in the graphs of ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
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
        if not hasattr(torch.ops.fastbf, name):  # a module that is imported once more finds its operators
            torch.library.define(f"fastbf::{name}", f"({schema}, {BATCH}) -> ()", tags=_TAGS)
            torch.library.impl(f"fastbf::{name}", ("cpu", "cuda"))(function)
            torch.library.register_fake(f"fastbf::{name}")(lambda *_: None)
        registered = getattr(torch.ops.fastbf, name).default

        @wraps(function)
        def call(*args: Any) -> None:
            (registered if torch.compiler.is_compiling() else function)(*args)

        return call

    return register
