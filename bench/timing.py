"""Times: on a GPU by Triton's ``do_bench``, on a CPU in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from triton.testing import do_bench

from tests.memory import PeakMemory

Run = Callable[[], object]


def times(runs: dict[str, Run], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds of many calls of each, warmed up. ``seconds`` is how long each is measured, about.

    On a GPU each has its time between two events, with the L2 cache flushed before. A CPU disturbs what it times, and
    not evenly: there they take turns, so that all suffer alike, and quotients of their medians mean something.
    """
    if device.type == "cuda":
        milliseconds = 1e3 * seconds
        every = {
            name: do_bench(run, warmup=milliseconds / 4, rep=milliseconds, return_mode="all")
            for name, run in runs.items()
        }
        return {name: [t / 1e3 for t in taken] for name, taken in every.items()}
    order = list(runs)
    taken = {name: [] for name in order}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds * len(order)
    while time.perf_counter() < end or len(taken[order[0]]) < 5:
        for name in order:
            start = time.perf_counter()
            runs[name]()
            taken[name].append(time.perf_counter() - start)
        order.reverse()
    return taken


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(seconds) == 1:
        return seconds[0], seconds[0], seconds[0]
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return fifths[0], statistics.median(seconds), fifths[3]


def peak_memory(run: Run, device: torch.device) -> int:
    """Bytes that tensors take at most during a call, on top of those that were there before.

    On a GPU the allocator counts them, on a CPU ``PeakMemory``, which does not see what libraries take inside.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with PeakMemory() as memory:
        run()
    return memory.peak
