"""What a step costs the host: the time in which nothing but Python, PyTorch and the launches is at work.

On a GPU, with tensors so small that it waits for the host. Without one, on a stand-in that does nothing
(``bench/stub.py``), one thread, matrix products done by the CPU and small; there the paper's code has its kernels' work
in its time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from bench.ops import Problem
from bench.providers import PROVIDERS, timed
from bench.records import Record
from bench.stub import stub_gpu
from bench.timing import quantiles
from bench.workloads import Workload
from fastbf import checks
from fastbf.kernels import add_norm
from fastbf.kernels.rows import Rows

SMALL = Workload("small", 16, 32, 10)
DTYPES = ("fp32", "amp")
PROVIDERS_OF_STEP = ("paper", "fastbf")


def _unchecked(*_) -> None:
    """In the place of a check that a GPU does not wait for."""


@contextmanager
def device() -> Iterator[torch.device]:
    """The GPU, or the stand-in, on which kernels launch from one thread."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        stack.enter_context(stub_gpu())
        stack.enter_context(mock.patch.object(checks, "class_indices", _unchecked))
        yield torch.device("cpu")
    torch.set_num_threads(threads)


@contextmanager
def ready(on: torch.device, op: str, provider: str, dtype: str) -> Iterator[Callable[[], object]]:
    """What is timed, warmed up: a launch by Triton's dispatcher or ours, a step by the paper's code or ours."""
    with ExitStack() as stack:
        if op == "launch":
            run = _launch(on)
            if provider == "triton":
                stack.enter_context(mock.patch.object(add_norm, "launch", _through_triton))
        else:
            problem = Problem("step", SMALL, dtype, on, 0.5)
            run = timed(PROVIDERS[provider].case(problem, problem.inputs()), "both").run
        run()
        yield run


def _launch(on: torch.device) -> Callable[[], object]:
    """The kernel with the most arguments among the elementwise ones."""
    x, w = torch.randn(SMALL.shape, device=on), torch.ones(SMALL.c, device=on)
    y, rows = torch.empty_like(x), Rows(SMALL.n, 1, False)
    return lambda: add_norm.forward(x, rows, y=y, norm=add_norm.Norm(w, w, 1e-5))


def _through_triton(kernel, programs, device, tensors, numbers, constants) -> None:
    kernel[(programs,)](*tensors, *numbers, **constants)


def measure(seconds: float) -> Iterator[Record]:
    """Launches and training steps, forward and backward."""
    cases = [("launch", provider, "fp32") for provider in ("triton", "fastbf")]
    cases += [("step", provider, dtype) for dtype in DTYPES for provider in PROVIDERS_OF_STEP]
    with device() as on:
        for op, provider, dtype in cases:
            with ready(on, op, provider, dtype) as run:
                yield _measured(op, provider, dtype, run, seconds)


def _measured(op: str, provider: str, dtype: str, run: Callable[[], object], seconds: float) -> Record:
    """The host's time for a call, in blocks of several; what a GPU has to do is waited for outside of it."""
    calls = 200 if op == "launch" else 10
    taken, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 5:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        taken.append((time.perf_counter() - start) / calls)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    milliseconds = [t * 1e3 for t in quantiles(taken)]
    return Record(
        op, SMALL.name, SMALL.n, 1, SMALL.c, SMALL.k, dtype, 0.5 if op == "step" else 0.0, "host", "eager", provider,
        "measured", "", *milliseconds, len(taken) * calls, None, 0, 0, *[None] * 5,
    )  # fmt: skip
