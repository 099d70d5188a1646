"""pytest-benchmark of the training step, one group a workload: ``pytest bench/test_step.py``."""

import pytest

from bench.steps import PROVIDERS, WORKLOADS, make_step


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_step(benchmark, provider, workload):
    benchmark.group = str(workload)
    benchmark.pedantic(make_step(provider, workload), warmup_rounds=1, rounds=5)
