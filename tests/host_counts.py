"""``python -m tests.host_counts``: what a warm step asks of the host, counted and not timed, a line for each pattern.

A step is forward and backward of a pattern of ``bench/patterns.py``, on the stand-in of ``bench/stub.py``. Counted are
calls of Python functions, calls from Python into C, and calls of ATen's operators by Python and by autograd's engine;
those that an operator makes in turn are not.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.autograd.profiler import profile

from bench import host
from bench.patterns import PATTERNS, Call, given


class Counts(NamedTuple):
    """Of one step."""

    python: int
    c: int
    aten: int


def _step(call: Call, autocast: torch.autocast) -> Callable[[], None]:
    """Forward and backward, as a loop has them; then gradients are where they were before."""

    def step() -> None:
        with autocast:
            out = call.forward()
        out.backward(torch.ones_like(out) if out.dim() else None)
        for leaf in call.leaves:
            leaf.grad = None

    return step


def _warm(call: Call, step: Callable[[], None]) -> None:
    """Several steps, with a look at the thread in which backward runs: only this thread's calls are counted."""
    threads = set()
    hook = call.leaves[0].register_hook(lambda _: threads.add(threading.get_ident()))
    step()
    hook.remove()
    assert threads == {threading.get_ident()}
    for _ in range(5):
        step()


def _calls(step: Callable[[], None]) -> Counter[str]:
    """By the events of ``sys.setprofile``, that of the step itself and the one that ends counting aside."""
    seen: Counter[str] = Counter({"call": -1, "c_call": -1})

    def count(frame: object, event: str, argument: object) -> None:
        seen[event] += 1

    gc.collect()
    gc.disable()  # what is freed meanwhile may call Python
    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
        gc.enable()
    return seen


def _operators(step: Callable[[], None]) -> int:
    """By the profiler: under a mode, which sees operators too, fastbf takes another path."""
    with profile() as profiled:
        step()
    operators = [event for event in profiled.function_events if event.name.startswith("aten::")]
    return sum(e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::") for e in operators)


def counts() -> Iterator[tuple[str, str, str, Counts]]:
    """Of each pattern in each dtype: by the paper's code, by fastbf."""
    with host.stand_in() as on:
        for name, dtype in ((name, dtype) for name in PATTERNS for dtype in host.DTYPES):
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "amp")
            for provider in host.providers(name):
                tensors = given(on, torch.bfloat16 if dtype == "amp" else torch.float32)
                call = getattr(PATTERNS[name], provider)(tensors)
                step = _step(call, autocast)
                _warm(call, step)
                seen = _calls(step)
                yield name, dtype, provider, Counts(seen["call"], seen["c_call"], _operators(step))


def main() -> None:
    print(f"{'pattern':<10}{'dtype':<7}{'by':<8}{'Python':>7}{'C':>7}{'ATen':>7}")
    for name, dtype, provider, counted in counts():
        print(f"{name:<10}{dtype:<7}{provider:<8}{counted.python:>7}{counted.c:>7}{counted.aten:>7}")


if __name__ == "__main__":
    main()
