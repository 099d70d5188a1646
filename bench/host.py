"""What a step costs the host: the time in which nothing but Python, PyTorch and the launches is at work.

On a GPU, with tensors so small that it waits for the host. Without one, in one thread and in two ways: on a stand-in
for Triton's launcher that does nothing (``bench/stub.py``), and through that launcher on a driver that does nothing
(``bench/driver.py``). There matrix products are the CPU's, and the paper's code has its kernels' work in its time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch

from bench import driver
from bench.patterns import DROPOUT, PATTERNS, SMALL, Call, given
from bench.records import ROOT, Record
from bench.stub import stub_gpu
from bench.timing import quantiles
from fastbf import checks
from fastbf.kernels import add_norm
from fastbf.kernels.launch import launch
from fastbf.kernels.rows import Rows

Run = Callable[[], object]

DTYPES = ("fp32", "amp")
#: What is measured: a launch, each pattern of ``bench/patterns.py`` forward and backward, and a step's forward alone.
CASES = [("launch", "fp32"), *((op, dtype) for op in (*PATTERNS, "forward") for dtype in DTYPES)]
#: The modes of records: launches go to a GPU or the stand-in, or through Triton's launcher to the driver.
HOST, LAUNCHER = "host", "host-launcher"


def _unchecked(*_) -> None:
    """In the place of a check that a GPU does not wait for."""


@contextmanager
def _instead_of_a_gpu(launches: AbstractContextManager[object]) -> Iterator[torch.device]:
    """The CPU, where launches go as the context says, in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with launches, mock.patch.object(checks, "index_range", _unchecked):
        yield torch.device("cpu")
    torch.set_num_threads(threads)


def stand_in() -> AbstractContextManager[torch.device]:
    """The CPU, where launches go to the stand-in."""
    return _instead_of_a_gpu(stub_gpu())


def device() -> AbstractContextManager[torch.device]:
    """The GPU, or the stand-in."""
    return nullcontext(torch.device("cuda")) if torch.cuda.is_available() else stand_in()


def providers(op: str) -> tuple[str, str]:
    """What fastbf is compared with, and fastbf."""
    return ("triton" if op == "launch" else "paper"), "fastbf"


def ready(on: torch.device, op: str, dtype: str) -> dict[str, Run]:
    """What is timed of each provider, warmed up."""
    if op == "launch":
        runs = _launch(on)
    else:
        pattern = PATTERNS["step" if op == "forward" else op]
        tensors = given(on, torch.bfloat16 if dtype == "amp" else torch.float32)
        autocast = torch.autocast(on.type, torch.bfloat16, enabled=dtype == "amp")
        calls = {name: getattr(pattern, name)(tensors) for name in providers(op)}
        runs = {name: _run(call, autocast, op != "forward") for name, call in calls.items()}
    for run in runs.values():
        for _ in range(5):  # fastbf notes what a second call does
            run()
    return runs


def _run(call: Call, autocast: torch.autocast, backward: bool) -> Run:
    def forward() -> torch.Tensor:
        with autocast:
            return call.forward()

    if not backward:
        return forward
    out = forward()
    grad = torch.ones_like(out)
    return lambda: torch.autograd.grad(forward(), call.leaves, grad)


def _launch(on: torch.device) -> dict[str, Run]:
    """A launch of the kernel with the most arguments among the elementwise ones, by Triton's dispatcher and ours."""
    x, w = torch.randn(SMALL.shape, device=on), torch.ones(SMALL.c, device=on)
    y, rows = torch.empty_like(x), Rows(SMALL.n, 1, False)
    with mock.patch.object(add_norm, "launch") as launched:
        add_norm.forward(x, rows, y=y, norm=add_norm.Norm(w, w, 1e-5))
    kernel, programs, _, tensors, numbers, constants = arguments = launched.call_args.args
    return {
        "triton": lambda: kernel[(programs,)](*tensors, *numbers, **constants),
        "fastbf": lambda: launch(*arguments),
    }


def measure(seconds: float) -> Iterator[Record]:
    """Every case, ``seconds`` for each provider; without a GPU, both ways."""
    with device() as on:
        yield from _measured(on, HOST, seconds)
    if not torch.cuda.is_available():
        yield from _through_launcher(seconds)


def _measured(on: torch.device, mode: str, seconds: float) -> Iterator[Record]:
    for op, dtype in CASES:
        calls = 200 if op == "launch" else 10
        for name, taken in _in_turns(ready(on, op, dtype), seconds, calls).items():
            milliseconds = [t * 1e3 for t in quantiles(taken)]
            key = _key(mode, op, dtype, name)
            yield Record(*key, "measured", "", *milliseconds, len(taken) * calls, None, 0, 0, *[None] * 5)


def _in_turns(runs: dict[str, Run], seconds: float, calls: int) -> dict[str, list[float]]:
    """The host's time for a call, in blocks of several; what a GPU has to do is waited for outside of it.

    Without a GPU all happens in this thread, whose own time leaves out what other processes take meanwhile. With one,
    backward is another thread's.
    """
    gpu, order = torch.cuda.is_available(), list(runs)
    clock = time.perf_counter if gpu else time.thread_time
    taken: dict[str, list[float]] = {name: [] for name in order}
    end = time.perf_counter() + seconds * len(order)
    while time.perf_counter() < end or len(taken[order[0]]) < 5:
        for name in order:
            run, start = runs[name], clock()
            for _ in range(calls):
                run()
            taken[name].append((clock() - start) / calls)
            if gpu:
                torch.cuda.synchronize()
        order.reverse()
    return {name: taken[name] for name in runs}


def planned() -> Iterator[tuple[object, ...]]:
    """The first fields of the records of a run in which nothing is skipped."""
    for mode in (HOST,) if torch.cuda.is_available() else (HOST, LAUNCHER):
        for op, dtype in CASES:
            yield from (_key(mode, op, dtype, name) for name in providers(op))


def _key(mode: str, op: str, dtype: str, provider: str) -> tuple[object, ...]:
    dropout = 0.0 if op == "launch" else DROPOUT
    return op, SMALL.name, SMALL.n, 1, SMALL.c, SMALL.k, dtype, dropout, mode, "eager", provider


def _through_launcher(seconds: float) -> Iterator[Record]:
    """The same in a process of its own, whose libcuda does nothing; rows that say why not where it cannot be built."""
    if (reason := driver.obstacle()) is not None:
        for key in planned():
            if LAUNCHER in key:
                yield Record(*key, "skipped", reason, *[None] * 3, 0, None, 0, 0, *[None] * 5)
        return
    with TemporaryDirectory() as folder:
        driver.build(Path(folder))
        command = [sys.executable, "-m", "bench.host", folder, str(seconds)]
        environment = {**os.environ, "TRITON_LIBCUDA_PATH": folder}
        with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                yield Record(*json.loads(line))
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)


def _main(folder: str, seconds: str) -> None:
    """What that process does: a record a line."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever started it says what is left
    driver.Library(Path(folder)).be_quiet()
    with _instead_of_a_gpu(driver.device()) as on:
        for record in _measured(on, LAUNCHER, float(seconds)):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
