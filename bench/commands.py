"""Measures fastbf and what it is compared with, and draws what was measured."""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import triton
from tqdm import tqdm

from bench import host, limits, report, tune
from bench.ops import DTYPES, MODES, OPS, Problem
from bench.providers import PROVIDERS
from bench.records import COLUMNS, RESULTS, Record, environment, file_name, output, write
from bench.runner import DeviceLost, Plan, cells, measure
from bench.terminal import show
from bench.workloads import BY_NAME, WORKLOADS, Workload
from fastbf.environment import device_name

#: Products that a CPU of two cores does in a few seconds.
CPU_FLOPS = 3e11
CAPTURES = ("eager", "graph")
MEASURED_DTYPES = tuple(d for d in DTYPES if d != "fp64")


def _list(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    print("ops")
    for name, op in OPS.items():
        print(f"  {name:<22} {op.about}")
    print("\nworkloads")
    for w in WORKLOADS:
        print(f"  {w.name:<22} {w.size:<28} {', '.join(w.ops)}")
    print(f"\nproviders on {device_name(device)}")
    for name, provider in PROVIDERS.items():
        print(f"  {name:<22} {provider.about}{_obstacle(name, device)}\n{'':<25}{', '.join(provider.ops)}")
    return 0


def _obstacle(name: str, device: torch.device) -> str:
    """Why a provider cannot serve any problem like those that are measured by default."""
    op = PROVIDERS[name].ops[0]
    problem = Problem(op, BY_NAME["imagenet-lt-128"].reduced(), _default_dtype(op, device), device, 0.0)
    try:
        PROVIDERS[name].case(problem, problem.inputs())
    except Exception as error:  # whatever a package raises where it is imported
        return f" [not here: {error}]"
    return ""


def _measure(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    if triton.knobs.runtime.interpret:
        print("unset TRITON_INTERPRET: the interpreter takes the place of what is measured", file=sys.stderr)
        return 2
    ops = arguments.ops if arguments.command == "op" else ["step"]
    problems = [
        Problem(op, w, dtype, device, rate)
        for op in ops
        for w in _workloads(arguments.workloads, op)
        for dtype in arguments.dtypes or [_default_dtype(op, device)]
        for rate in ([0.0] if op == "loss" else arguments.dropout)
    ]
    memory = arguments.command == "memory"
    busy = 0 if memory else arguments.busy
    plan = Plan(
        tuple(arguments.providers or PROVIDERS), ("both",) if memory else tuple(arguments.modes),
        ("eager",) if memory else tuple(arguments.capture), arguments.seconds, not memory,
        arguments.max_flops or (CPU_FLOPS if device.type == "cpu" else float("inf")), busy,
    )  # fmt: skip
    gc.freeze()  # each measurement collects, which takes longer the more there is
    warnings.filterwarnings("ignore", module="torch")  # of backends that were asked for and cannot serve
    groups, where = cells(problems, plan), environment(device)
    if not groups:
        print("nothing to measure: none of these providers and workloads have such an op", file=sys.stderr)
        return 2
    path = arguments.csv or RESULTS / file_name(arguments.command + "-busy" * (busy > 0), where)
    print(f"{where.device}; torch {where.torch}, triton {where.triton}, commit {where.commit}, {where.date}")
    failed = []
    try:
        with (
            output(path, COLUMNS) as put,
            tqdm(total=sum(map(len, groups)), disable=not sys.stderr.isatty(), leave=False) as bar,
        ):
            records = measure(groups, plan, bar.set_description)
            show(_counted(write(put, where, records), bar, failed), bar.write)
    except DeviceLost as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\nwritten to {path}; python -m bench report makes tables and pictures of it")
    if failed:
        print(f"{len(failed)} measurements of fastbf failed, the first: {failed[0].note}", file=sys.stderr)
    return 1 if failed else 0


def _counted(records: Iterator[Record], bar: tqdm, failed: list[Record]) -> Iterator[Record]:
    """Moves the bar, and collects what failed of ours: a peer's failure is a row, ours is an error as well."""
    for record in records:
        bar.update()
        if record.status == "failed" and record.provider.startswith("fastbf"):
            failed.append(record)
        yield record


def _host(arguments: argparse.Namespace) -> int:
    gpu = torch.cuda.is_available()
    where = environment(_device(None))
    path = arguments.csv or RESULTS / file_name("host", where)
    print(f"{where.device}, {'its own' if gpu else 'a stand-in for a'} GPU; {host.SMALL.size}")
    print(f"torch {where.torch}, triton {where.triton}, commit {where.commit}, {where.date}")
    with output(path, COLUMNS) as put:
        for r in write(put, where, host.measure(arguments.seconds)):
            what = f"{r.op:<8}{r.dtype:<6}{r.provider:<10}"
            print(f"  {what}{r.p50_ms * 1e3:>9.1f} µs, median of {r.calls} calls", flush=True)
    print(f"\nwritten to {path}")
    return 0


def _limits(arguments: argparse.Namespace) -> int:
    limits.show(_workloads(arguments.workloads, "step"))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    paths, pages = arguments.csv or sorted(RESULTS.glob("*.csv")), (arguments.readme, arguments.docs)
    for path in report.make(paths, pages, arguments.pictures):
        print(f"written: {path}")
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("tuning needs a GPU", file=sys.stderr)
        return 2
    path = arguments.csv or RESULTS / file_name("tune", environment(_device(None)))
    tune.show(tune.sweep(arguments.seconds, arguments.budget), path)
    return 0


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _default_dtype(op: str, device: torch.device) -> str:
    """What people train in."""
    return "fp32" if device.type == "cpu" else "bf16" if op == "attention" else "amp"


def _workloads(names: list[str] | None, op: str) -> list[Workload]:
    return [w for w in ([BY_NAME[name] for name in names] if names else WORKLOADS) if op in w.ops]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, about: str, function) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=function)
        return sub

    listing = command("list", "what can be measured, and with which providers here", _list)
    listing.add_argument("--device")
    for name, about in {
        "op": "time of single ops",
        "step": "time of a training step: layer, fork, classifier and loss",
        "memory": "peak memory of a training step, forward and backward",
    }.items():
        sub = command(name, about, _measure)
        if name == "op":
            sub.add_argument("ops", nargs="+", choices=[op for op in OPS if op != "step"])
        sub.add_argument("--workloads", nargs="+", choices=BY_NAME, metavar="NAME", help="default: all; see list")
        sub.add_argument("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help="default: all; see list")
        sub.add_argument(
            "--dtypes", nargs="+", choices=MEASURED_DTYPES, help="default: fp32 on CPU; amp, attention bf16, on a GPU"
        )
        sub.add_argument(
            "--dropout", nargs="+", type=float, default=[0.5], metavar="RATE", help="default: 0.5, the paper's"
        )
        sub.add_argument("--device", help="default: cuda if there is one")
        sub.add_argument(
            "--csv", type=Path, help="default: bench/results/COMMAND-DEVICE.csv, COMMAND-busy-DEVICE.csv with --busy"
        )
        sub.add_argument(
            "--max-flops", type=float, help=f"skip problems of more; default: none, {CPU_FLOPS:.0e} on CPU"
        )
        sub.add_argument("--seconds", type=float, default=0.5, help="for each measurement; default: 0.5")
        if name != "memory":
            sub.add_argument("--modes", nargs="+", choices=MODES, default=["both"])
            sub.add_argument("--capture", nargs="+", choices=CAPTURES, default=["eager"], help="graph: one CUDA graph")
            sub.add_argument(
                "--busy", type=int, default=0, metavar="N", help="other processes that keep the CPU busy; default: none"
            )
    sub = command("host", "what launches and steps cost the host", _host)
    sub.add_argument("--csv", type=Path, help="default: bench/results/host-DEVICE.csv")
    sub.add_argument("--seconds", type=float, default=2.0, help="for each measurement; default: 2")
    sub = command("limits", "on paper: FLOPs, bytes and launches of a step, and the time an H100 allows", _limits)
    sub.add_argument("--workloads", nargs="+", choices=BY_NAME, metavar="NAME", help="default: all; see list")
    sub = command("report", "the tables of README and docs, and the pictures, from CSV files", _report)
    sub.add_argument("--csv", type=Path, nargs="+", help="default: all in bench/results")
    sub.add_argument("--readme", type=Path, default=Path("README.md"), help="default: README.md")
    sub.add_argument("--docs", type=Path, default=Path("docs/benchmarks.md"), help="default: docs/benchmarks.md")
    sub.add_argument("--pictures", type=Path, default=RESULTS, help="folder; default: bench/results")
    sub = command("tune", "times candidates for the table of attention's tiles on this GPU", _tune)
    sub.add_argument("--seconds", type=float, default=0.05, help="for each candidate; default: 0.05")
    sub.add_argument("--budget", type=float, default=120, help="seconds in all; default: 120")
    sub.add_argument("--csv", type=Path, help="default: bench/results/tune-DEVICE.csv")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name; returns the exit status."""
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments)
