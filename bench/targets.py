"""What the torch backend promises on a CPU, held to: ``pytest bench/targets.py -s``, a few minutes on an idle machine.

A training step is 1.3 times as fast as the paper's code in geometric mean, nowhere under 0.97; the classifier's loss is
nowhere under 0.97 of plain PyTorch, and takes no more memory.
"""

import math
import statistics

import pytest
import torch

from bench.ops import Problem
from bench.records import Record
from bench.runner import Plan, cells, measure
from bench.terminal import show
from bench.workloads import BY_NAME, Workload

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the torch backend's targets are for CPU")

GEOMETRIC_MEAN, WORST = 1.3, 0.97
STEPS = ("cifar100-lt", "imagenet-lt-128", "imagenet-lt-256", "czsl", "vit", "large-1024-512", "large-4096-512")
LOSSES = (BY_NAME["imagenet-lt-128"], BY_NAME["classes-8142"], BY_NAME["classes-50000"])
PLAN = Plan(("fastbf-torch", "paper"), ("both",), ("eager",), seconds=3.0)


def pairs(op: str, workloads: tuple[Workload, ...]) -> list[tuple[Record, Record]]:
    """Ours and the paper's code, for each workload."""
    problems = [Problem(op, w, "fp32", torch.device("cpu"), 0.5) for w in workloads]
    records = list(measure(cells(problems, PLAN), PLAN, lambda _: None))
    show(records)
    return list(zip(records[::2], records[1::2], strict=True))


def test_steps():
    ratios = [paper.p50_ms / ours.p50_ms for ours, paper in pairs("step", tuple(BY_NAME[name] for name in STEPS))]
    assert math.exp(statistics.fmean(map(math.log, ratios))) >= GEOMETRIC_MEAN
    assert min(ratios) >= WORST


def test_losses():
    both = pairs("loss", LOSSES)
    assert min(paper.p50_ms / ours.p50_ms for ours, paper in both) >= WORST
    assert all(ours.peak_mib <= paper.peak_mib for ours, paper in both)
