"""fastbf against what it replaces, in pairs: the two take turns, so that a noisy machine disturbs both alike.

``pytest bench/test_pairs.py -s`` prints the ratios of medians and holds them to the targets of the torch backend: for a
training step against the paper's code 1.3 in geometric mean, nowhere under 0.97; for the classifier's loss against
plain PyTorch nowhere under 0.97, and no more memory.
"""

import datetime
import math
import statistics
import time
from collections.abc import Callable

import pytest
import torch

from bench import losses, steps
from fastbf.environment import device_name
from tests.memory import PeakMemory

GEOMETRIC_MEAN, WORST = 1.3, 0.97
SECONDS = 6.0
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the torch backend's targets are for CPU")
Step = Callable[[], None]


def medians(theirs: Step, ours: Step) -> tuple[float, float]:
    """Median seconds of each; they swap places every round."""
    times: dict[Step, list[float]] = {theirs: [], ours: []}
    order = [theirs, ours]
    for step in order:
        step()
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times[ours]) < 4:
        for step in order:
            start = time.perf_counter()
            step()
            times[step].append(time.perf_counter() - start)
        order.reverse()
    return statistics.median(times[theirs]), statistics.median(times[ours])


def peak(step: Step) -> float:
    """MiB that the tensors of a step take."""
    with PeakMemory() as memory:
        step()
    return memory.peak / 2**20


def compare(title: str, pairs: dict[str, tuple[Step, Step]]) -> tuple[list[float], list[float]]:
    """Prints a table of other code and ours; returns the ratios of time and of memory, theirs to ours."""
    print(f"\n{title}: {device_name(CPU)}, torch {torch.__version__}, {datetime.date.today()}, fp32")
    print(f"{'workload':<24} {'theirs ms':>10} {'fastbf ms':>10} {'ratio':>7} {'theirs MiB':>11} {'fastbf MiB':>11}")
    ratios, memory = [], []
    for name, (theirs, ours) in pairs.items():
        a, b = medians(theirs, ours)
        x, y = peak(theirs), peak(ours)
        ratios.append(a / b)
        memory.append(x / y)
        print(f"{name:<24} {a * 1e3:>10.1f} {b * 1e3:>10.1f} {a / b:>7.2f} {x:>11.1f} {y:>11.1f}", flush=True)
    return ratios, memory


def test_steps():
    pairs = {str(w): (steps.make_step("paper", w), steps.make_step("fastbf", w)) for w in steps.WORKLOADS}
    ratios, _ = compare("a training step against the paper's code, dropout 0.5", pairs)
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    print(f"{'geometric mean':<46} {mean:>7.2f}")
    assert mean >= GEOMETRIC_MEAN
    assert min(ratios) >= WORST


def test_losses():
    pairs = {
        str(w): tuple(losses.make_step(provider, w, CPU, torch.float32) for provider in ("plain", "fastbf"))
        for w in losses.CPU_WORKLOADS
    }
    ratios, memory = compare("the classifier's loss against plain PyTorch", pairs)
    assert min(ratios) >= WORST
    assert min(memory) >= 1
