"""Functions that are registered operators while ``torch.compile`` looks on, and plain calls otherwise."""

from __future__ import annotations

from collections.abc import Callable

import torch

#: Tags of an operator that sends something to other ranks, which no CUDA graph may replay.
COMMUNICATES = tuple(tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None)


def operator(schema: str, fake: Callable, tags: tuple[torch.Tag, ...] = ()) -> Callable[[Callable], Callable]:
    """Registers a function by its name and this schema; what replaces it calls the operator only under a compiler.

    Args:
        schema: its arguments and results, as ``torch.library.define`` takes them.
        fake: gives results of the right shapes and dtypes, of the same arguments.
        tags: what else PyTorch should know of it.
    """

    def register(raw: Callable) -> Callable:
        name = f"fastbf::{raw.__name__}"
        torch.library.define(name, schema, tags=tags)
        torch.library.impl(name, ("cpu", "cuda"))(raw)
        torch.library.register_fake(name)(fake)
        registered = getattr(torch.ops.fastbf, raw.__name__).default

        def call(*args: object) -> object:
            return (registered if torch.compiler.is_compiling() else raw)(*args)

        return call

    return register
