"""What a launch and a step cost the host, under pytest-benchmark: ``bench/host.py`` says how."""

import pytest

from bench import host

CASES = [("launch", "triton", "fp32"), ("launch", "fastbf", "fp32")]
CASES += [("step", provider, dtype) for dtype in host.DTYPES for provider in host.PROVIDERS_OF_STEP]


@pytest.mark.parametrize(("op", "provider", "dtype"), CASES)
def test_host(benchmark, op, provider, dtype):
    benchmark.group = f"host, {op}, {dtype}"
    with host.device() as on, host.ready(on, op, provider, dtype) as run:
        benchmark(run)
