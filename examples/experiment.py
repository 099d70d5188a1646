"""What the examples share to run: arguments, what they run on, and jobs side by side."""

from __future__ import annotations

import argparse
import io
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from tqdm import tqdm

import fastbf
from fastbf.environment import device_name

Job = TypeVar("Job")
Result = TypeVar("Result")


def arguments(
    doc: str, argv: Sequence[str] | None, seeds: int = 10, options: dict[str, dict[str, object]] | None = None
) -> argparse.Namespace:
    """``--out``, ``--seeds``, ``--device`` and ``--quick``; ``device`` is a ``torch.device``, two seeds if quick.

    Standard output shows from here on what its encoding lacks as escapes, instead of failing.

    Args:
        options: what else there is, as arguments of ``add_argument``.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: no ± is worth a run
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    parser.add_argument("--seeds", type=int, default=seeds, help="at least 2")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="two seeds and little training: proves nothing, for tests")
    for name, settings in (options or {}).items():
        parser.add_argument(name, **settings)
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"--seeds must be at least 2 for an interval, got {args.seeds}")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    args.device = torch.device(name)
    args.seeds = 2 if args.quick else args.seeds
    args.out.mkdir(parents=True, exist_ok=True)
    if args.quick:
        print("--quick: two seeds and little training show that this runs. Its numbers prove nothing.")
    return args


def introduce(module: nn.Module, features: torch.Tensor) -> None:
    """Prints versions, the date, the device, and which backend a module of fastbf takes for such features."""
    device = features.device
    versions = f"fastbf {fastbf.__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{versions}, {date.today()}")
    print(f"device                  {device.type}: {device_name(device)}")
    print(f"backend of {type(module).__name__:<12} {fastbf.explain(module, features)}")


def run_all(
    function: Callable[[Job, torch.device], Result], jobs: Iterable[Job], device: torch.device
) -> dict[Job, Result]:
    """``function(job, device)`` of every job; on CPU two at a time, for small nets cannot share one over cores."""
    jobs = list(jobs)
    results = {}
    with tqdm(total=len(jobs), desc="training", unit="run", ncols=80) as bar:
        if device.type != "cpu":
            for job in jobs:
                results[job] = function(job, device)
                bar.update()
            return results
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            pending = {pool.submit(_one_thread, function, job): job for job in jobs}
            for done in as_completed(pending):
                results[pending[done]] = done.result()
                bar.update()
    return results


def _one_thread(function: Callable[[Job, torch.device], Result], job: Job) -> Result:
    torch.set_num_threads(1)
    return function(job, torch.device("cpu"))
