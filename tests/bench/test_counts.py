"""Launches, FLOPs and bytes of a step are counted on fake tensors."""

import pytest

from bench import counts, limits
from bench.ops import OPS
from bench.workloads import BY_NAME, WORKLOADS


class TestCounts:
    def test_launches_of_a_step(self):
        """As many as ``test_launches.py`` counts, and two for the casts of autocast."""
        step = counts.step("fastbf", BY_NAME["imagenet-lt-256"])
        assert len(step.forward) == 12 + 2
        assert len(step.backward) == 20 - 1  # but for the first gradient

    @pytest.mark.parametrize("provider", ["fastbf", "paper"])
    @pytest.mark.parametrize(
        "name", ["imagenet-lt-256", "v2-deit-s", "v2-detr", "large-32768-2048", "small-v2-32-197-192"]
    )
    def test_flops(self, provider, name):
        """Those of the formula; our backward computes the scores twice, in one kernel for dq and one for dk and dv."""
        w = BY_NAME[name]
        step = counts.step(provider, w)
        again = 4.0 * w.n**2 * w.c * w.positions if provider == "fastbf" and w.n > 32 else 0.0
        assert sum(i.flops for i in step.forward) == OPS["step"].flops(w, "forward")
        assert sum(i.flops for i in step.backward) == OPS["step"].flops(w, "backward") + again

    def test_fewer_bytes_than_the_papers(self):
        for w in WORKLOADS:
            if "step" in w.ops:
                ours, theirs = (counts.step(name, w) for name in ("fastbf", "paper"))
                assert sum(i.bytes for i in ours.all) < sum(i.bytes for i in theirs.all)

    def test_no_step_is_under_the_floor(self, capsys):
        for w in WORKLOADS:
            if "step" in w.ops:
                assert limits.floor(w, limits.H100) <= limits.seconds(counts.step("fastbf", w).all, limits.H100)
        limits.show([BY_NAME["czsl"]])
        assert "COMPUTED, NOT MEASURED" in capsys.readouterr().out
