"""Pictures of a training step over the batch: speed, share of the limit, peak memory. Each makes one point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench.records import Row, slug

#: A provider's colour and marker, in every picture: Okabe and Ito's colours, distinct to colour-blind readers and, with
#: the markers, in grey. Dashed is a replayed CUDA graph.
STYLES = {
    "fastbf": ("#0072B2", "o"),
    "fastbf-graphed": ("#56B4E9", "D"),
    "fastbf-torch": ("#0072B2", "s"),
    "paper": ("#D55E00", "v"),
    "compile": ("#E69F00", "^"),
    "compile-max": ("#F0E442", "<"),
    "sdpa-math": ("#999999", ">"),
    "sdpa-flash": ("#009E73", "P"),
    "sdpa-efficient": ("#CC79A7", "X"),
    "sdpa-cudnn": ("#000000", "*"),
}


class Quantity(NamedTuple):
    """What a picture shows of every measurement."""

    file: str
    title: str  #: the point that it makes
    name: str
    value: Callable[[Row], float | None]
    level: float | None = None  #: where a line across goes
    providers: tuple[str, ...] = tuple(STYLES)


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """A file for each device, dtype and quantity of which there are measurements at several N; returns them."""
    steps = [
        r for r in rows
        if r["op"] == "step" and r["mode"] == "both" and r["status"] == "measured" and r["positions"] == 1 and r["k"]
    ]  # fmt: skip
    drawn = []
    for device, dtype in sorted({(r["device"], r["dtype"]) for r in steps}):
        here = [r for r in steps if (r["device"], r["dtype"]) == (device, dtype)]
        for quantity in (
            Quantity(
                "speed", "How much faster than the fastest other", "speed-up", _speed_up(here), level=1.0
            ),
            Quantity(
                "share", "How near to what the machine allows", "share of the limit, percent",
                lambda r: r["share"] and 100 * r["share"],
            ),
            Quantity(
                "memory", "How much of the memory that the paper's code takes", "percent of the paper's peak",
                _memory_share(here), level=100.0, providers=("fastbf", "fastbf-torch"),
            ),
        ):  # fmt: skip
            drawn += _picture(folder / f"{quantity.file}-{slug(device)}-{dtype}.png", here, quantity)
    return drawn


def _speed_up(rows: list[Row]) -> Callable[[Row], float | None]:
    """The time of the fastest that is not ours, over a row's."""
    others: dict[tuple, float] = {}
    for r in rows:
        if not r["provider"].startswith("fastbf") and r["p50_ms"] is not None:
            others[_problem(r)] = min(r["p50_ms"], others.get(_problem(r), r["p50_ms"]))
    return lambda r: others[_problem(r)] / r["p50_ms"] if r["p50_ms"] is not None and _problem(r) in others else None


def _memory_share(rows: list[Row]) -> Callable[[Row], float | None]:
    """A row's peak memory in percent of that of the paper's code."""
    paper = {_problem(r): r["peak_mib"] for r in rows if r["provider"] == "paper" and r["peak_mib"]}
    return lambda r: 100 * r["peak_mib"] / paper[_problem(r)] if r["peak_mib"] and _problem(r) in paper else None


def _problem(r: Row) -> tuple:
    return r["run"], r["workload"], r["dropout"]


def _picture(path: Path, rows: list[Row], quantity: Quantity) -> list[Path]:
    """A panel for each C and K measured at several N, a line for each provider; nothing if there is none."""
    panels: dict[tuple, list[tuple[Row, float]]] = {}
    for r in rows:
        if r["provider"] in quantity.providers and (value := quantity.value(r)) is not None:
            panels.setdefault((r["c"], r["k"]), []).append((r, value))
    panels = {sizes: points for sizes, points in sorted(panels.items()) if len({r["n"] for r, _ in points}) > 1}
    if not panels:
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(
        1, len(panels), figsize=(2 + 3.4 * len(panels), 3.5), sharey=True, squeeze=False, layout="constrained"
    )
    handles = {}
    for ax, ((c, k), points) in zip(axes[0], panels.items(), strict=True):
        _panel(ax, points, quantity)
        ax.set_title(f"C = {c:.0f}, K = {k:.0f}", fontsize=10)
        handles |= {text: line for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    axes[0][0].set_ylim(bottom=0)  # of all panels: a limit that is set before all are drawn would cut the rest
    axes[0][0].set_ylabel(quantity.name)
    fig.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=9)
    where = f"A training step, {rows[0]['dtype']}: {rows[0]['device']}, {rows[0]['date']}"
    fig.suptitle(f"{quantity.title}\n{where}", fontsize=10)
    fig.savefig(path, dpi=180)
    plt.close(fig)
    return [path]


def _panel(ax, points: list[tuple[Row, float]], quantity: Quantity) -> None:
    series: dict[tuple[str, str], dict[float, float]] = {}
    for r, value in points:  # where several runs have a point, the first counts
        series.setdefault((r["provider"], r["capture"]), {}).setdefault(r["n"], value)
    for provider, capture in sorted(series, key=lambda s: (list(STYLES).index(s[0]), s[1])):
        colour, marker = STYLES[provider]
        graph = capture == "graph"
        ax.plot(
            *zip(*sorted(series[provider, capture].items()), strict=True), color=colour, marker=marker, ms=6, lw=1.6,
            ls="--" if graph else "-", label=provider + ", graph" * graph,
            zorder=3 if provider.startswith("fastbf") else 2,
        )  # fmt: skip
    batches = sorted({r["n"] for r, _ in points})
    ax.set_xscale("log", base=2)
    ax.set_xticks(batches, [f"{n:.0f}" for n in batches])
    ax.minorticks_off()
    if quantity.level is not None:
        ax.axhline(quantity.level, color="#666666", lw=0.8, zorder=0)
    ax.set_xlabel("batch N")
    ax.grid(color="#DDDDDD", lw=0.5)
