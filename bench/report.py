"""The tables of the README and of docs/benchmarks.md, and the pictures, from the CSV files and nothing else."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

from bench import pictures
from bench.providers import OURS, PROVIDERS
from bench.records import Row, read
from bench.workloads import BUSY, LARGE, SMALL

OUR_NAMES = tuple(p.name for p in OURS)
#: The workloads whose steps on a CPU are in the tables of every device.
_ON_A_CPU = ("cifar100-lt", *LARGE)
#: The blocks about the PyTorch fallback on a CPU, and their workloads; "busy" is beside busy processes.
FALLBACK = {"small": SMALL, "large": LARGE, "busy": BUSY}
#: The host's times without a GPU: where launches go, by mode.
LAUNCHED = {"host": "on the stand-in", "host-launcher": "by Triton's launcher"}
Table = Callable[[list[Row]], str]
_UTF8 = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  #: what is read is written, byte for byte


def make(paths: Iterable[Path], pages: Sequence[Path], folder: Path) -> list[Path]:
    """Fills the pages' marked blocks and draws the pictures; returns what was written.

    A block stands between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``; NAME is step, loss or another op,
    latest, memory, host, pictures, or a key of ``FALLBACK``. What was not measured is not mentioned. Pages are UTF-8
    whatever the locale says.
    """
    rows = [r for r in read(paths) if "op" in r]  # tuning has other columns
    drawn = pictures.draw([r for r in rows if _ordinary(r)], folder)
    for page in pages:
        _fill(page, rows, drawn)
    return [*pages, *drawn]


def _ordinary(r: Row) -> bool:
    """Whether it is of a whole computation on an idle machine, at the paper's rate of dropout; the loss has none."""
    known = PROVIDERS.get(r["provider"])
    whole = known is None or not known.traits.unchecked
    return whole and (r["dropout"] == 0.5 or r["op"] == "loss") and not r["busy"]


def _headline(r: Row) -> bool:
    """Whether it belongs to the tables of every device: not small either, and of a CPU's steps a few."""
    if r["op"] == "step" and r["device_type"] == "cpu" and r["workload"] not in _ON_A_CPU:
        return False
    return _ordinary(r) and not r["workload"].startswith("small-")


def _fill(page: Path, rows: list[Row], drawn: list[Path]) -> None:
    with page.open(**_UTF8) as file:
        text = file.read()

    def fill(match: re.Match) -> str:
        block = _block(match["name"], rows, [os.path.relpath(path, page.parent) for path in drawn])
        filled = f"<!-- bench:{match['name']} -->\n\n{block}\n\n<!-- /bench:{match['name']} -->"
        return filled.replace("\n", match["newline"])

    pattern = re.compile(r"<!-- bench:(?P<name>\w+) -->(?P<newline>\r?\n).*?<!-- /bench:(?P=name) -->", re.DOTALL)
    _rewrite(page.resolve(), pattern.sub(fill, text))


def _rewrite(path: Path, text: str) -> None:
    """Through a file beside it that takes its place, so that the text is there at any time, the old or the new."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with new.open("w", **_UTF8) as file:
            file.write(text)
        shutil.copymode(path, new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _block(name: str, rows: list[Row], drawn: list[str]) -> str:
    if name == "pictures":
        return "\n".join(f"![{Path(path).stem.replace('-', ' ')}]({path})" for path in drawn)
    if name == "host":
        return _on_every_device([r for r in rows if r["mode"] in LAUNCHED and r["status"] == "measured"], _host)
    rows = [r for r in rows if r["mode"] == "both" and r["status"] == "measured"]
    if name in FALLBACK:
        return _by_machine([r for r in rows if _of_fallback(r, name)], _fallback) or "Not measured yet."
    rows = [r for r in rows if _headline(r)]
    if name == "latest":
        return _on_every_device(_latest([r for r in rows if r["op"] == "step" and r["p50_ms"] is not None]), _times)
    if name == "memory":
        return _on_every_device([r for r in rows if r["op"] == "step" and r["peak_mib"] is not None], _memory)
    return _on_every_device([r for r in rows if r["op"] == name and r["p50_ms"] is not None], _times)


def _latest(rows: list[Row]) -> list[Row]:
    """Those of one machine of each type, that which was measured last."""

    def key(r: Row) -> tuple[object, ...]:
        return r["date"], r["device"]

    last = {r["device_type"]: key(r) for r in sorted(rows, key=key)}
    return [r for r in rows if key(r) == last[r["device_type"]]]


def _on_every_device(rows: list[Row], table: Table) -> str:
    gpu = any(r["device_type"] == "cuda" for r in rows)
    return "\n\n".join(filter(None, [_by_machine(rows, table), "Not measured on a GPU yet." * (not gpu)]))


def _by_machine(rows: list[Row], table: Table) -> str:
    """A table for each run, with a line that says where and when; GPUs first."""

    def machine(r: Row) -> tuple[object, ...]:
        return r["device_type"] != "cuda", r["device"], r["busy"], r["torch"], r["triton"], r["commit"], r["date"]

    parts = []
    for (_, device, busy, torch, triton, commit, date), group in groupby(sorted(rows, key=machine), key=machine):
        beside = f", beside {busy:.0f} busy processes" * (busy > 0)
        parts += [table(list(group)), f"{device}{beside}, torch {torch}, triton {triton}, commit {commit}, {date}."]
    return "\n\n".join(parts)


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def _problems(rows: list[Row]) -> Iterable[list[Row]]:
    """The rows of each problem in each run, in the order in which they were measured."""
    problems: dict[tuple, list[Row]] = {}
    for r in rows:
        problems.setdefault((r["run"], r["workload"], r["dtype"], r["dropout"]), []).append(r)
    return problems.values()


def label(r: Row) -> str:
    """A provider, and whether its graph was replayed."""
    return r["provider"] + (", graph" if r["capture"] == "graph" else "")


def size(r: Row) -> str:
    """A workload and its sizes."""
    parts = [f"N={r['n']:.0f}", f"L={r['positions']:.0f}" * (r["positions"] > 1), f"C={r['c']:.0f}"]
    return f"{r['workload']}: " + " ".join(filter(None, [*parts, f"K={r['k']:.0f}" * (r["k"] > 0)]))


def fastest(rows: list[Row], ours: bool) -> Row | None:
    """Of ours, or of the others."""
    return min((r for r in rows if (r["provider"] in OUR_NAMES) == ours), key=lambda r: r["p50_ms"], default=None)


def _times(rows: list[Row]) -> str:
    """The paper's code beside ours, both as they are; then the fastest of the others beside the fastest of ours."""
    lines, over_paper, over_best = [], [], []
    for group in _problems(rows):
        paper = next((r for r in group if label(r) == "paper"), None)
        eager = fastest([r for r in group if r["capture"] == "eager" and r["provider"] != "fastbf-graphed"], True)
        ours, peer = fastest(group, True), fastest(group, False)
        if eager is None or paper is None:
            continue
        over_paper.append(paper["p50_ms"] / eager["p50_ms"])
        over_best.append(peer["p50_ms"] / ours["p50_ms"])
        plain = [_short(paper["p50_ms"]), _short(eager["p50_ms"]), f"{over_paper[-1]:.2f}"]
        best = [*(f"{_short(r['p50_ms'])} ({label(r)})" for r in (peer, ours)), f"{over_best[-1]:.2f}"]
        lines.append([size(ours), ours["dtype"], *plain, *best, f"{ours['share']:.0%}"])
    if len(lines) > 1:
        lines.append(["geometric mean", "", "", "", f"{_mean(over_paper):.2f}", "", "", f"{_mean(over_best):.2f}", ""])
    head = [
        "workload",
        "dtype",
        "paper's code, ms",
        "fastbf, ms",
        "ratio",
        "best other, ms",
        "best fastbf, ms",
        "ratio",
    ]
    return _markdown([*head, "share of the limit"], lines)


def _short(value: float) -> str:
    """Three digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _of_fallback(r: Row, name: str) -> bool:
    """Whether a row belongs to that block."""
    step = r["op"] == "step" and r["p50_ms"] is not None and r["workload"] in FALLBACK[name]
    plain = r["device_type"] == "cpu" and r["dtype"] == "fp32" and r["capture"] == "eager"
    return step and plain and (r["busy"] > 0) == (name == "busy")


def _fallback(rows: list[Row]) -> str:
    """The fallback beside the paper's code, as it is and compiled, and beside the matrix products alone."""
    order, lines, ratios = [*SMALL, *LARGE], [], []
    for group in sorted(_problems(rows), key=lambda g: (order.index(g[0]["workload"]), -g[0]["dropout"])):
        ms = {r["provider"]: r["p50_ms"] for r in group}
        if not {"paper", "fastbf-torch"} <= ms.keys():
            continue
        rate, paper, ours = f"{group[0]['dropout']:g}", ms["paper"], ms["fastbf-torch"]
        ratios.append((rate, paper / ours))
        others = [_short(ms[name]) if name in ms else "" for name in ("compile", "products")]
        share = f"{ours / ms['products']:.2f}" if "products" in ms else ""
        lines.append([size(group[0]), rate, _short(paper), _short(ours), f"{paper / ours:.2f}", *others, share])
    rates = sorted({rate for rate, _ in ratios}, reverse=True)
    for rate in rates + ["all"] * (len(rates) > 1):
        some = [ratio for r, ratio in ratios if rate in (r, "all")]
        lines.append(["geometric mean; worst", rate, "", "", f"{_mean(some):.2f}; {min(some):.2f}", "", "", ""])
    head = ["workload", "dropout", "paper's code, ms", "fastbf, ms", "ratio", "compiled paper's code, ms"]
    return _markdown([*head, "products alone, ms", "fastbf ÷ products"], lines)


def _memory(rows: list[Row]) -> str:
    """Peak memory of ours and of the paper's code."""
    lines = []
    for group in _problems(rows):
        ours = min((r["peak_mib"] for r in group if r["provider"] in OUR_NAMES), default=None)
        paper = next((r["peak_mib"] for r in group if label(r) == "paper"), None)
        if ours is not None and paper is not None:
            lines.append([size(group[0]), group[0]["dtype"], _short(paper), _short(ours), f"{ours / paper:.2f}"])
    return _markdown(["workload", "dtype", "paper's code, peak MiB", "fastbf, peak MiB", "quotient"], lines)


def _host(rows: list[Row]) -> str:
    """What launches and steps cost the host, ours beside the others."""
    lines, cases = [], {}
    for r in rows:
        cases.setdefault((r["op"], r["dtype"], r["mode"]), {})[r["provider"]] = r
    for (op, dtype, mode), case in cases.items():
        ours = case.pop("fastbf", None)
        for other in case.values() if ours else ():
            times = [f"{_short(1e3 * other['p50_ms'])} ({other['provider']})", _short(1e3 * ours["p50_ms"])]
            where = "on the GPU" if ours["device_type"] == "cuda" else LAUNCHED[mode]
            lines.append([f"{op}, {dtype}", where, *times, f"{ours['p50_ms'] / other['p50_ms']:.2f}"])
    return _markdown(["what", "launches", "other, µs", "fastbf, µs", "fastbf ÷ other"], lines)
