"""What the tests of benchmarks share: small workloads, measurements of them, the emulator, and a program in ASCII."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import runner
from bench.ops import Problem
from bench.providers import Case, Traits
from bench.runner import Plan
from bench.workloads import Workload

CPU = torch.device("cpu")
SMALL = Workload("cifar100-lt", 24, 64, 10)
DENSE = Workload("v2-detr", 2, 64, positions=5)
POOLED = Workload("small-v2-16-65-64", 24, 64, 10, positions=5)
PLAN = Plan(("fastbf-torch", "paper"), ("both",), ("eager",), seconds=0.0)
ROOT = Path(__file__).parents[2]
EMULATOR = ROOT.parent / "shared"

needs_emulator = pytest.mark.skipif(not (EMULATOR / "ptx").is_dir(), reason="no emulator")


def problem(op="step", workload=SMALL, dtype="fp32", dropout=0.5):
    return Problem(op, workload, dtype, CPU, dropout)


def measured(plan=PLAN, *problems):
    return list(runner.measure(runner.cells(list(problems) or [problem()], plan), plan, lambda _: None))


def in_ascii(*arguments):
    """Python, run where neither files nor standard output hold more than ASCII unless asked to, and nothing is set."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


class Stub:
    """A provider of the loss that does what a test says."""

    name, about, ops, traits = "stub", "", ("loss",), Traits()

    def __init__(self, function):
        self.function = function

    def case(self, problem, inputs):
        return Case(lambda: self.function(problem, inputs), inputs.leaves)
