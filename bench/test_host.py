"""What a launch and a step cost the host, under pytest-benchmark: ``bench/host.py`` says how."""

import pytest

from bench import host


@pytest.mark.parametrize(
    ("op", "dtype", "provider"), [(*case, provider) for case in host.CASES for provider in host.providers(case[0])]
)
def test_host(benchmark, op, dtype, provider):
    benchmark.group = f"host, {op}, {dtype}"
    with host.device() as on:
        benchmark(host.ready(on, op, dtype)[provider])
