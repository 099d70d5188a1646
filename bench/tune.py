"""Tuning of attention's table of tiles on this GPU: candidates are built, checked and timed, the faster ones proposed.

Worker processes build candidates in order of their value and launch each once, on a small problem, as no length is
compiled into a kernel; Triton's disk cache then holds what this process times, while they build the next. A candidate
is out if it cannot be built, spills registers, leaves asynchronous work unguarded, as its results may be right by luck,
or computes something else than the table's present choice. That one is timed before and after the rest, and its lesser
time counts: a disturbance of it must not look like a gain. ``backward_query`` is timed alone, ``backward_key_value``
together with what computes delta for it, ``backward_query`` without dq and at the table's choice: the same for every
candidate, so that they rank as they would alone.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.records import Environment, environment, output
from bench.tiles import Case, candidates, cases, text
from bench.timing import times
from bench.workloads import HEADS
from fastbf.kernels import attention, launch
from fastbf.kernels.attention_configs import Config
from fastbf.kernels.limits import device_limits
from tests.emulation import attention_tile
from tests.ptx.unguarded import faults

DTYPES = {2: torch.bfloat16, 4: torch.float32}
TOLERANCES = {2: 2e-2, 4: 1e-3}  #: of the relative error in the Euclidean norm
THRESHOLD = 32_768  #: dropout of 0.5, as in training
GAIN = 0.03  #: that a proposal saves more than; two runs differ by less
PATIENCE = 60.0  #: seconds for a build: a worker that died never answers


class Result(NamedTuple):
    """A candidate's time, or the note why there is none; first a ``Case``."""

    kernel: str
    head_dim: int
    itemsize: int
    architecture: int
    n: int
    positions: int
    config: Config
    milliseconds: float | None  #: median
    note: str
    present: bool  #: the table's choice


def problem(case: Case, device: torch.device) -> tuple[Callable[[], None], list[Tensor]]:
    """The call to be timed, and what it writes."""
    torch.manual_seed(0)
    shape = (case.n, case.positions, HEADS, case.head_dim)
    q, k, v, o, do = (torch.randn(shape, device=device, dtype=DTYPES[case.itemsize]) for _ in range(5))
    # About what forward writes: random logits, of unit variance.
    lse = None if case.packed else torch.full((case.positions * HEADS, case.n), math.log2(case.n) + 0.72, device=device)
    options = attention.Options(case.head_dim**-0.5, torch.tensor([1], device=device), THRESHOLD)
    if case.kernel.startswith("forward"):
        written = [o] if lse is None else [o, lse]
        return lambda: attention.forward(q, k, v, options, o=o, lse=lse), written
    grads = attention.Gradients(*(torch.empty_like(q) for _ in range(3)))
    needs = (case.kernel != "backward_key_value", *2 * (case.kernel != "backward_query",))
    saved = attention.Inputs(q, k, v, None if case.packed else o, lse)
    written = [grad for grad, needed in zip(grads, needs, strict=True) if needed]
    return lambda: attention.backward(do, saved, options, grads, needs), written


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the latter for tests


def build(case: Case, config: Config) -> str:
    """In a worker: compiles and launches a candidate once. Why it is out; empty if it is not."""
    launch._compiled.clear()
    try:
        with attention_tile(case.kernel, config):
            problem(case, _device())[0]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:  # whatever Triton, a compiler or the driver raises
        return _first_line(error)
    built = [compiled for (function, *_), (compiled, _) in launch._compiled.items() if function.__name__ == case.kernel]
    for compiled in built:
        if compiled.n_spills:
            return f"spills {compiled.n_spills} registers"
        if unguarded := faults(compiled.asm["ptx"], config[:2]):
            return f"leaves asynchronous work unguarded: {unguarded[0]}"
    return ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


class Trial:
    """Times candidates for a case, if they compute what the present choice does."""

    def __init__(self, case: Case, present: Config) -> None:
        self.case, self.device = case, _device()
        self.run, self.written = problem(case, self.device)
        with attention_tile(case.kernel, present):
            self.run()
        self.expected = [t.clone() for t in self.written]

    def milliseconds(self, config: Config, seconds: float) -> float:
        for t in self.written:
            t.fill_(math.nan)
        with attention_tile(self.case.kernel, config):
            self.run()
            worst = max(relative_error(*pair) for pair in zip(self.written, self.expected, strict=True))
            if not worst <= TOLERANCES[self.case.itemsize]:
                raise ArithmeticError(f"differs from the present choice by {worst:.2g}")
            return 1e3 * statistics.median(times({"": self.run}, self.device, seconds)[""])


def relative_error(result: Tensor, expected: Tensor) -> float:
    """In the Euclidean norm; NaN where either is."""
    return float((result.float() - expected.float()).norm() / expected.float().norm())


def _pool() -> Pool:
    """Processes of their own CUDA contexts, a core each; leaving it ends them."""
    return multiprocessing.get_context("spawn").Pool(min(8, len(os.sched_getaffinity(0))))


def sweep(seconds: float, budget: float) -> Iterator[Result]:
    """Measures candidates for about ``seconds`` each, the most valuable first, until ``budget`` seconds are over."""
    start = time.monotonic()
    limits = device_limits(_device())
    work = {case: candidates(case, limits) for case in cases(limits)}
    with _pool() as pool:
        builds: dict[tuple, AsyncResult] = {}
        for case, configs in work.items():
            for config in configs:
                if (*case[:4], config) not in builds:
                    small = case._replace(n=min(case.n, 64), positions=1)
                    builds[(*case[:4], config)] = pool.apply_async(build, (small, config))
        for case, configs in work.items():
            measured = set()
            for result in _measured(case, configs, builds, seconds, start + budget):
                if result.milliseconds is not None:
                    measured.add(result.config)
                yield result
            spent = time.monotonic() - start
            print(f"{case}: {len(measured)} of {len(configs)} measured, {spent:.0f} s of {budget:g}", flush=True)
            if spent >= budget:
                return


def _measured(
    case: Case, configs: list[Config], builds: dict[tuple, AsyncResult], seconds: float, end: float
) -> Iterator[Result]:
    """All candidates of a case, the present choice first and again last, until the clock says ``end``."""
    trial = None
    for config in (*configs, configs[0]):
        present, milliseconds = config == configs[0], None
        left = end - time.monotonic()
        if left <= 0:
            return
        try:
            note = builds[(*case[:4], config)].get(min(left, PATIENCE))
            if present or not note:
                trial = trial or Trial(case, config)
                milliseconds = trial.milliseconds(config, seconds)
        except multiprocessing.TimeoutError:
            if time.monotonic() >= end:
                return
            note = f"not built in {PATIENCE:g} s"
        except Exception as error:  # as in build; a result that differs; no memory
            note = _first_line(error)
        yield Result(*case, config, milliseconds, note, present)
        if trial is None:  # nothing to compare with
            return


def compared(results: Iterable[Result]) -> list[tuple[Result, Result]]:
    """The present choice and the fastest candidate, which may be the same, for each case that has a time of both."""
    by_case: dict[Case, list[Result]] = {}
    for r in results:
        if r.milliseconds is not None:
            by_case.setdefault(Case(*r[:6]), []).append(r)

    def fastest(group: Iterable[Result]) -> Result:
        return min(group, key=lambda r: r.milliseconds)

    with_present = (group for group in by_case.values() if any(r.present for r in group))
    return [(fastest(r for r in group if r.present), fastest(group)) for group in with_present]


def proposal(present: Result, best: Result) -> str:
    """A line for the table, empty where the gain is none or may be noise."""
    if 1 - best.milliseconds / present.milliseconds <= GAIN:
        return ""
    key = f'("{best.kernel}", {best.itemsize}, {best.architecture})'
    now = f"now {text(present.config)} {present.milliseconds:.4g} ms"
    return f"{key} {Case(*best[:6]).shape}: {text(best.config)}  # {best.milliseconds:.4g} ms, {now}"


def show(results: Iterable[Result], path: Path) -> None:
    """Writes results to a CSV as they come; in the end prints what is best, and what the table might say instead."""
    where, seen = environment(_device()), []
    try:
        with output(path, [*Environment._fields, *Result._fields]) as put:
            for r in results:
                seen.append(r)
                shown = "" if r.milliseconds is None else f"{r.milliseconds:.5g}"
                put([*where, *r._replace(config=text(r.config), milliseconds=shown)])
    finally:  # a sweep that is cut short has found something too
        _summarise(seen)
    print(f"\nwritten to {path}")


def _summarise(seen: list[Result]) -> None:
    pairs = compared(seen)
    for present, best in pairs:
        gain = 1 - best.milliseconds / present.milliseconds
        print(f"\n{Case(*present[:6])}\n  now  {text(present.config):<36} {present.milliseconds:.4g} ms")
        print(f"  best {text(best.config):<36} {best.milliseconds:.4g} ms, {gain:.1%} less")
    lines = [line for line in itertools.starmap(proposal, pairs) if line]
    print(f"\nsave more than {GAIN:.0%}:" if lines else f"\nnothing saves more than {GAIN:.0%}", *lines, sep="\n")
