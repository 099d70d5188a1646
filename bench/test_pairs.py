"""fastbf against the paper's code, in pairs: the two take turns, so that a noisy machine disturbs both alike.

``pytest bench/test_pairs.py -s`` prints the ratios of medians and holds them to the targets of the torch backend:
1.3 in geometric mean, nowhere under 0.97.
"""

import datetime
import math
import statistics
import time

import pytest
import torch

from bench.steps import WORKLOADS, Workload, make_step
from fastbf.environment import device_name

GEOMETRIC_MEAN, WORST = 1.3, 0.97
SECONDS = 6.0


def medians(w: Workload) -> tuple[float, float]:
    """Median seconds of a step of the paper's code and of ours."""
    steps = [make_step("paper", w), make_step("fastbf", w)]
    times: list[list[float]] = [[], []]
    for step in steps:
        step()
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times[0]) < 3:
        for step, taken in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the torch backend's targets are for CPU")
def test_targets():
    print(
        f"\n{device_name(torch.device('cpu'))}, torch {torch.__version__}, {datetime.date.today()}, dropout 0.5, fp32"
    )
    print(f"{'workload':<24} {'paper ms':>10} {'fastbf ms':>10} {'ratio':>7}")
    ratios = []
    for w in WORKLOADS:
        theirs, ours = medians(w)
        ratios.append(theirs / ours)
        print(f"{w!s:<24} {theirs * 1e3:>10.1f} {ours * 1e3:>10.1f} {ratios[-1]:>7.2f}", flush=True)
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    print(f"{'geometric mean':<46} {mean:>7.2f}")
    assert mean >= GEOMETRIC_MEAN
    assert min(ratios) >= WORST
