"""Measurements as tables on a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from bench.records import Record
from bench.workloads import BY_NAME


def _problem(r: Record) -> tuple[str, str, str, float, str, str, int]:
    return r.op, r.workload, r.dtype, r.dropout, r.mode, r.capture, r.busy


def show(records: Iterable[Record], put: Callable[[str], None] = print) -> None:
    """A table for each group of measurements that belong side by side."""
    for key, group in itertools.groupby(records, key=_problem):
        rows = list(group)
        op, name, dtype, dropout, mode, capture, busy = key
        beside = f", beside {busy} busy processes" * (busy > 0)
        put(f"\n{op}, {name} ({BY_NAME[name].size}), {dtype}, dropout {dropout:g}, {mode}, {capture}{beside}")
        put(f"  {'provider':<22}{'p50 ms':>10}{'p20':>10}{'p80':>10}{'paper ÷':>9}{'peak MiB':>10}{'share':>8}")
        paper = next((r.p50_ms for r in rows if r.provider == "paper"), None)
        for r in rows:
            what = _numbers(r, paper) if r.status == "measured" else f"  {r.status}: {r.note}"
            put(f"  {r.provider:<22}{what}")


def _numbers(r: Record, paper: float | None) -> str:
    ratio = None if r.p50_ms is None or paper is None else paper / r.p50_ms
    columns = [(r.p50_ms, 10, ".3f"), (r.p20_ms, 10, ".3f"), (r.p80_ms, 10, ".3f"), (ratio, 9, ".2f")]
    columns += [(r.peak_mib, 10, ".1f"), (r.share, 8, ".1%")]
    text = "".join(f"{'-':>{width}}" if value is None else f"{value:>{width}{form}}" for value, width, form in columns)
    return text + (f"  {r.note}" if r.note else "")


def show_host(records: Iterable[Record]) -> None:
    """A line for each case, with the quotient of the host's times; first, which way launches go."""
    for mode, of_mode in itertools.groupby(records, key=lambda r: r.mode):
        print(f"\n{mode}\n  {'op':<10}{'dtype':<6}{'other, µs':>20}{'fastbf, µs':>12}{'fastbf ÷':>10}{'calls':>8}")
        for (op, dtype), pair in itertools.groupby(of_mode, key=lambda r: (r.op, r.dtype)):
            other, ours = pair
            if ours.status != "measured":
                print(f"  {op:<10}{dtype:<6}{ours.status}: {ours.note}", flush=True)
                continue
            theirs = f"{other.provider} {other.p50_ms * 1e3:9.1f}"
            quotient = ours.p50_ms / other.p50_ms
            print(
                f"  {op:<10}{dtype:<6}{theirs:>20}{ours.p50_ms * 1e3:>12.1f}{quotient:>10.2f}{ours.calls:>8}",
                flush=True,
            )
