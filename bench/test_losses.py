"""pytest-benchmark of the shared classifier's loss, one group a workload: ``pytest bench/test_losses.py``.

On a GPU in bf16, on a CPU in fp32. A provider that is not there is skipped with a note (``-rs`` shows it).
"""

import pytest
import torch

from bench.losses import CPU_WORKLOADS, GPU_WORKLOADS, PROVIDERS, Unavailable, make_step
from tests.memory import PeakMemory

GPU = torch.cuda.is_available()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("workload", GPU_WORKLOADS if GPU else CPU_WORKLOADS, ids=str)
def test_loss(benchmark, provider, workload):
    device, dtype = (torch.device("cuda"), torch.bfloat16) if GPU else (torch.device("cpu"), torch.float32)
    try:
        step = make_step(provider, workload, device, dtype)
    except Unavailable as error:
        pytest.skip(str(error))
    step()
    benchmark.group = str(workload)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        benchmark.extra_info["peak MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    elif provider != "torch.compile":  # which runs eagerly where operators are watched
        with PeakMemory() as memory:
            step()
        benchmark.extra_info["peak MiB"] = round(memory.peak / 2**20, 1)

    def run() -> None:
        step()
        if GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(run, warmup_rounds=1, rounds=5)
