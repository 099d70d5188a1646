"""Measures fastbf and what it is compared with, and draws what was measured."""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import triton
from tqdm import tqdm

from bench import counted, host, limits, listing, publishing, report, tiles, tune
from bench.ops import DTYPES, MODES, OPS, Problem, default_dtype
from bench.patterns import SMALL
from bench.providers import PROVIDERS
from bench.records import (
    COLUMNS,
    RESULTS,
    ROOT,
    Environment,
    NothingMeasured,
    Record,
    environment,
    file_name,
    output,
    write,
)  # fmt: skip
from bench.runner import DeviceLost, Plan, cells, key, measure
from bench.terminal import show, show_host
from bench.workloads import BY_NAME, WORKLOADS, Workload

#: Products that a CPU of two cores does in a few seconds.
CPU_FLOPS = 3e11
CAPTURES = ("eager", "graph")
#: A shorter measurement is for a look, not for publishing.
SECONDS = 0.5
OUT = Path("out")
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
MEASURED_DTYPES = tuple(d for d in DTYPES if d != "fp64")


def _list(arguments: argparse.Namespace) -> int:
    listing.show(_device(arguments.device))
    return 0


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
        for dtype in arguments.dtypes or [default_dtype(op, device)]
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
    warnings.filterwarnings("ignore", module="torch|bench")  # of backends that were asked for and cannot serve
    groups, where = cells(problems, plan), environment(device)
    if not groups:
        print("nothing to measure: none of these providers and workloads have such an op", file=sys.stderr)
        return 2
    name = file_name(arguments.command + "-busy" * (busy > 0), where.device)
    if arguments.publish:
        if arguments.seconds < SECONDS:
            raise publishing.Refused(f"--seconds {arguments.seconds:g} is less than {SECONDS:g}, for a look only")
        planned = publishing.planned((key(cell) for group in groups for cell in group), busy, where.commit)
        publishing.check(planned, publishing.committed(name))
    path = _path(arguments.out, name)
    _introduce(where)
    failed: list[Record] = []
    with (
        output(path, COLUMNS) as put,
        tqdm(total=sum(map(len, groups)), disable=not sys.stderr.isatty(), leave=False) as bar,
    ):
        records = measure(groups, plan, bar.set_description)
        show(_counted(write(put, where, records), bar, failed), bar.write)
    _finish(path, name, arguments.publish and not failed)
    if failed:
        print(f"{len(failed)} measurements of fastbf failed, the first: {failed[0].note}", file=sys.stderr)
    return 1 if failed else 0


def _path(out: Path, name: str) -> Path:
    """``out`` if it names a CSV file, or something that is there and no folder; else the file of that name in it."""
    return out if out.suffix == ".csv" or (out.exists() and not out.is_dir()) else out / name


def _introduce(where: Environment, gpu: str = "") -> None:
    print(f"{where.device}{gpu}; torch {where.torch}, triton {where.triton}, commit {where.commit}, {where.date}")


def _finish(path: Path, name: str, publish: bool) -> None:
    print(f"\nwritten to {path}; python -m bench report --csv {path} makes tables and pictures of it")
    if publish:
        print(f"published as {publishing.publish(path, name)}")


def _counted(records: Iterator[Record], bar: tqdm, failed: list[Record]) -> Iterator[Record]:
    """Moves the bar, and collects what failed of ours: a peer's failure is a row, ours is an error as well."""
    for record in records:
        bar.update()
        if record.status == "failed" and record.provider.startswith("fastbf"):
            failed.append(record)
        yield record


def _host(arguments: argparse.Namespace) -> int:
    where = environment(_device(None))
    name = file_name("host", where.device)
    if arguments.publish:
        publishing.check(publishing.planned(host.planned(), 0, where.commit), publishing.committed(name))
    path = _path(arguments.out, name)
    _introduce(where, f", {'its own' if torch.cuda.is_available() else 'a stand-in for a'} GPU; {SMALL.size}")
    gc.freeze()  # what is here already need not be looked at while something is timed
    with output(path, COLUMNS) as put:
        show_host(write(put, where, host.measure(arguments.seconds)))
    _finish(path, name, arguments.publish)
    return 0


def _limits(arguments: argparse.Namespace) -> int:
    limits.show(_workloads(arguments.workloads, "step"))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    if arguments.publish:
        paths, pages, pictures = sorted(RESULTS.glob("*.csv")), PAGES, RESULTS
    else:
        paths, pictures = arguments.csv or sorted(RESULTS.glob("*.csv")), arguments.out
        pictures.mkdir(parents=True, exist_ok=True)
        pages = [Path(shutil.copy(page, pictures)) for page in PAGES]
    for path in report.make(paths, pages, pictures):
        print(f"written: {path}")
    return 0


def _publish(arguments: argparse.Namespace) -> int:
    for path in arguments.csv:
        print(f"{path} published as {publishing.publish(path)}")
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("tuning needs a GPU", file=sys.stderr)
        return 2
    path = _path(arguments.out, file_name("tune", environment(_device(None)).device))
    tune.show(tune.sweep(arguments.seconds, arguments.budget), path)
    return 0


def _tiles(arguments: argparse.Namespace) -> int:
    architectures = sorted(set(arguments.sm) & set(counted.RATES)) if arguments.counted else arguments.sm
    entries = tiles.entries(arguments.kernel, architectures, arguments.head_dim, arguments.bytes, arguments.n)
    if not entries:
        print("no entries of these kernels, architectures, head dimensions and bytes", file=sys.stderr)
        return 2
    if not arguments.counted:
        tiles.show(entries)
    elif not (arguments.emulator / "ptx").is_dir():
        print(f"No emulator in {arguments.emulator}: nothing is counted.")
    elif triton.knobs.runtime.interpret:
        print("unset TRITON_INTERPRET: the interpreter takes the place of what is counted", file=sys.stderr)
        return 2
    else:
        counted.show(entries, arguments.emulator.resolve())
    return 0


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _workloads(names: list[str] | None, op: str) -> list[Workload]:
    return [w for w in ([BY_NAME[name] for name in names] if names else WORKLOADS) if op in w.ops]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, about: str, function) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=function)
        return sub

    def results(sub: argparse.ArgumentParser, publish: bool = True) -> None:
        sub.add_argument("--out", type=Path, default=OUT, help="a folder, or a CSV file; default: out")
        if publish:
            about = "also replace what is committed in bench/results, unless sources are changed or rows would be lost"
            sub.add_argument("--publish", action="store_true", help=about)

    sub = command("list", "what can be measured, and with which providers here", _list)
    sub.add_argument("--device", help="default: cuda if there is one")
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
        results(sub)
        sub.add_argument(
            "--max-flops", type=float, help=f"skip problems of more; default: none, {CPU_FLOPS:.0e} on CPU"
        )
        sub.add_argument("--seconds", type=float, default=SECONDS, help=f"for each measurement; default: {SECONDS}")
        if name != "memory":
            sub.add_argument("--modes", nargs="+", choices=MODES, default=["both"])
            sub.add_argument("--capture", nargs="+", choices=CAPTURES, default=["eager"], help="graph: one CUDA graph")
            sub.add_argument(
                "--busy", type=int, default=0, metavar="N", help="other processes that keep the CPU busy; default: none"
            )
    sub = command("host", "what launches and steps cost the host", _host)
    results(sub)
    sub.add_argument("--seconds", type=float, default=2.0, help="for each measurement; default: 2")
    sub = command("limits", "on paper: FLOPs, bytes and launches of a step, and the time an H100 allows", _limits)
    sub.add_argument("--workloads", nargs="+", choices=BY_NAME, metavar="NAME", help="default: all; see list")
    sub = command("tiles", "attention's table of tiles; on paper: what each entry executes and moves", _tiles)
    sub.add_argument("--counted", action="store_true", help="count what an emulator of sm 80 and 90 executes; no GPU")
    sub.add_argument("--emulator", type=Path, default=ROOT.parent / "shared", help="the folder with the package ptx")
    kernels, architectures, itemsizes = (sorted({key[i] for key in tiles.TABLE}) for i in (0, 2, 1))
    sub.add_argument("--kernel", nargs="+", choices=kernels, default=kernels, help="default: all")
    sub.add_argument("--sm", nargs="+", type=int, choices=architectures, default=architectures, help="default: all")
    sub.add_argument("--head-dim", nargs="+", type=int, default=[], help="as in the table; default: all")
    sub.add_argument("--bytes", nargs="+", type=int, choices=itemsizes, default=[2], help="an element; default: 2")
    sub.add_argument("--n", type=int, default=256, help="queries and keys of what streams; default: 256")
    sub = command("report", "the tables of README and docs, and the pictures, from CSV files", _report)
    sub.add_argument("--csv", type=Path, nargs="+", help="default: all in bench/results")
    sub.add_argument(
        "--out", type=Path, default=OUT, help="folder for the pages' copies and the pictures; default: out"
    )
    sub.add_argument("--publish", action="store_true", help="instead of --csv and --out: README, docs, bench/results")
    sub = command("publish", "CSV files of complete runs, to bench/results", _publish)
    sub.add_argument("csv", type=Path, nargs="+")
    sub = command("tune", "times candidates for the table of attention's tiles on this GPU", _tune)
    sub.add_argument("--seconds", type=float, default=0.05, help="for each candidate; default: 0.05")
    sub.add_argument("--budget", type=float, default=120, help="seconds in all; default: 120")
    results(sub, publish=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except NothingMeasured:  # ``records.output`` has said so
        return 1
    except DeviceLost as error:
        print(error, file=sys.stderr)
    except publishing.Refused as error:
        print(f"not published: {error}", file=sys.stderr)
    return 1
