"""From problems and providers to records: checks, times, counts."""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch._functorch import config as functorch_config

from bench import ceilings, timing
from bench.busy import busy_processes
from bench.ops import OPS, Problem, compulsory_bytes
from bench.providers import PROVIDERS, Provider, Unavailable, captured, differs, timed
from bench.records import Record

MIB = 2**20


class DeviceLost(RuntimeError):
    """Nothing more can be measured in this process."""


class Plan(NamedTuple):
    """What to measure of each problem."""

    providers: tuple[str, ...]
    modes: tuple[str, ...]
    captures: tuple[str, ...]
    seconds: float  #: for each measurement
    timed: bool = True  #: else memory alone
    max_flops: float = float("inf")  #: problems of more are skipped
    busy: int = 0  #: processes that keep the CPU busy while something is timed


class Cell(NamedTuple):
    """One measurement to make."""

    problem: Problem
    mode: str
    capture: str
    provider: str


def cells(problems: list[Problem], plan: Plan) -> list[list[Cell]]:
    """The measurements, those that belong side by side together."""
    groups = []
    for problem, mode, capture in itertools.product(problems, plan.modes, plan.captures):
        group = [
            Cell(problem, mode, capture, name) for name in plan.providers if problem.op in PROVIDERS[name].ops
        ]  # fmt: skip
        if group:
            groups.append(group)
    return groups


def measure(groups: list[list[Cell]], plan: Plan, progress: Callable[[str], None]) -> Iterator[Record]:
    """Makes the measurements; ``progress`` hears of each.

    A CPU's providers are held together, to take turns; a GPU's come one after another, so that each has its memory.
    """
    limits: dict[torch.dtype, ceilings.Ceilings] = {}
    for group in groups:
        problem = group[0].problem
        if plan.timed and problem.compute not in limits:
            limits[problem.compute] = ceilings.measure(problem.device, problem.compute, plan.seconds)
        limit = limits.get(problem.compute)
        for together in [group] if problem.device.type == "cpu" else [[cell] for cell in group]:
            yield from _together(together, plan, limit, progress)


def _together(
    group: list[Cell], plan: Plan, limit: ceilings.Ceilings | None, progress: Callable[[str], None]
) -> Iterator[Record]:
    ready, results = {}, {}
    for cell in group:
        progress(f"{cell.problem.op} {cell.problem.workload.name} {cell.mode} {cell.provider}")
        try:
            ready[cell] = _prepare(cell, plan)
        except Exception as error:
            results[cell] = _reason(error)
    if ready and plan.timed:
        try:
            taken = _times(ready, plan)
        except Exception as error:
            results |= dict.fromkeys(ready, _reason(error))
            ready, taken = {}, {}
    for cell in group:
        if cell in ready:
            record = _record(cell, ready[cell], taken[cell.provider] if plan.timed else [], limit)
        else:
            record = _missing(cell, *results[cell])
        yield record._replace(busy=plan.busy)
    ready.clear()
    _clear(group[0].problem.device, failed=bool(results))


def _clear(device: torch.device, failed: bool) -> None:
    """Frees what a measurement held.

    Raises:
        DeviceLost: after a failure, that the device answers no more: every later measurement would fail too.
    """
    gc.collect()
    if device.type != "cuda":
        return
    try:
        torch.cuda.set_stream(torch.cuda.default_stream())  # a capture that fails leaves another one
        torch.cuda.empty_cache()
        if failed:
            torch.rand(1, device=device)
            torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLost(f"the GPU answers no more after a failure: {error}") from error


class _Ready(NamedTuple):
    run: timing.Run
    peak: int | None
    nbytes: int
    note: str


def _prepare(cell: Cell, plan: Plan) -> _Ready:
    """Compared with fp64, warmed up, memory counted."""
    problem, provider = cell.problem, PROVIDERS[cell.provider]
    if cell.capture == "graph" and problem.device.type != "cuda":
        raise Unavailable("CUDA graphs need a GPU")
    if cell.capture == "graph" and not provider.traits.capturable:
        raise Unavailable("it replays a graph itself, or waits for the device")
    if cell.mode != "both" and provider.traits.both_only:
        raise Unavailable("its forward computes the gradients too")
    if (flops := OPS[problem.op].flops(problem.workload, cell.mode)) > plan.max_flops:
        raise Unavailable(f"{flops:.1e} floating-point operations are more than --max-flops {plan.max_flops:.1e}")
    checked = PROVIDERS[provider.traits.checked_as or cell.provider]
    wrong = "" if provider.traits.unchecked else _differs(checked, problem.reduced(provider.traits.samples))
    if wrong:
        raise Unavailable(f"not the same computation: {wrong}")
    inputs = problem.inputs()
    # What is compiled may use up what it saved, but where backward is run again.
    with functorch_config.patch(donated_buffer=cell.mode != "backward"):
        case = provider.case(problem, inputs)
        run, result_bytes = (captured if cell.capture == "graph" else timed)(case, cell.mode)
        run()
    seen = cell.capture == "eager" and problem.device.type not in provider.traits.memory_unseen_on
    peak = timing.peak_memory(run, problem.device) if seen else None
    return _Ready(run, peak, compulsory_bytes(inputs, result_bytes, cell.mode), case.note)


def _times(ready: dict[Cell, _Ready], plan: Plan) -> dict[str, list[float]]:
    """Of each provider, while processes keep the CPU busy if that is asked for."""
    device = next(iter(ready)).problem.device
    with busy_processes(plan.busy):
        return timing.times({cell.provider: r.run for cell, r in ready.items()}, device, plan.seconds)


@cache
def _differs(provider: Provider, problem: Problem) -> str:
    return differs(provider, PROVIDERS["paper"], problem)


def _reason(error: Exception) -> tuple[str, str]:
    """(status, note)."""
    if isinstance(error, Unavailable):
        return "skipped", str(error)
    if torch.OutOfMemoryError in (type(error), type(error.__cause__)):
        return "failed", "out of memory"
    if re.match("No (available kernel|viable backend)", str(error)):
        return "skipped", "this backend has no kernel for it"
    text = " ".join(str(error).split())
    return "failed", f"{type(error).__name__}: {text[:160]}"


def _record(cell: Cell, ready: _Ready, taken: list[float], limit: ceilings.Ceilings | None) -> Record:
    flops = OPS[cell.problem.op].flops(cell.problem.workload, cell.mode)
    peak = None if ready.peak is None else ready.peak / MIB
    if not taken:
        return Record(*key(cell), "measured", ready.note, None, None, None, 0, peak, flops, ready.nbytes, *[None] * 5)
    p20, p50, p80 = timing.quantiles(taken)
    return Record(
        *key(cell), "measured", ready.note, p20 * 1e3, p50 * 1e3, p80 * 1e3, len(taken), peak, flops, ready.nbytes,
        ready.nbytes / p50 / 1e9, flops / p50 / 1e12, limit.bytes / 1e9, limit.flops / 1e12,
        limit.seconds(ready.nbytes, flops) / p50,
    )  # fmt: skip


def _missing(cell: Cell, status: str, note: str) -> Record:
    flops = OPS[cell.problem.op].flops(cell.problem.workload, cell.mode)
    return Record(*key(cell), status, note, None, None, None, 0, None, flops, 0, *[None] * 5)


def key(cell: Cell) -> tuple[object, ...]:
    """The first fields of its record."""
    problem, w = cell.problem, cell.problem.workload
    return (
        problem.op, w.name, w.n, w.positions, w.c, w.k, problem.dtype, problem.dropout, cell.mode, cell.capture,
        cell.provider,
    )  # fmt: skip
