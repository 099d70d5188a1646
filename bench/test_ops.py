"""A short set under pytest-benchmark, a group for each workload: ``pytest bench``, then ``--benchmark-compare``.

``python -m bench`` measures everything else. A provider that cannot serve here is skipped with a note (``-rs``).
"""

import pytest
import torch

from bench.ops import Problem
from bench.providers import PROVIDERS, Unavailable, differs, timed
from bench.timing import peak_memory
from bench.workloads import BY_NAME

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SET = (
    ("step", "cifar100-lt"),
    ("step", "imagenet-lt-128"),
    ("step", "v2-detr"),
    ("attention", "czsl"),
    ("loss", "imagenet-lt-512"),
    ("add_norm", "vit"),
)
NAMES = ("fastbf", "fastbf-graphed", "fastbf-torch", "paper", "F.linear_cross_entropy", "liger", "cut-cross-entropy")


@pytest.mark.parametrize(
    ("op", "workload", "name"),
    [(op, workload, name) for op, workload in SET for name in NAMES if op in PROVIDERS[name].ops],
)
def test_op(benchmark, op, workload, name):
    problem = Problem(op, BY_NAME[workload], "amp" if GPU else "fp32", DEVICE, 0.5)
    try:
        assert not differs(PROVIDERS[name], PROVIDERS["paper"], problem.reduced())
        run = timed(PROVIDERS[name].case(problem, problem.inputs()), "both").run
    except Unavailable as error:
        pytest.skip(str(error))
    run()
    benchmark.group = f"{op} {workload}"
    benchmark.extra_info["peak MiB"] = round(peak_memory(run, DEVICE) / 2**20, 1)

    def synchronous():
        run()
        if GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(synchronous, warmup_rounds=1, rounds=7)
