"""What is meant to be in compiled kernels and no result shows."""

from tests.ptx.test_unguarded import compiling

BARRIERS = """
from tests.aot import compiled_kernel
from tests.aot_jobs import jobs

for job in jobs(["add_norm_backward"], [80, 90], False):
    if job.constants["PARTIALS"] and job.constants["C"] == 8192:
        print(job.constants["IN_REGISTERS"], "barrier" in compiled_kernel(job).asm["ttgir"])
"""


def test_sums_that_are_read_back_from_memory_have_a_barrier():
    """Of its own: those that reductions bring happen to order the same loads and stores."""
    lines = compiling("-c", BARRIERS)
    assert "False True" in lines
    assert "False False" not in lines
