"""Workloads are those of the paper's settings and of the tables."""

import pytest

from bench import workloads
from bench.workloads import BY_NAME, WORKLOADS


class TestWorkloads:
    def test_names_are_unique(self):
        assert len(BY_NAME) == len(WORKLOADS)

    @pytest.mark.parametrize("w", WORKLOADS, ids=lambda w: w.name)
    def test_reduced_ones_take_the_same_path(self, w):
        small = w.reduced()
        assert (small.n <= 32) == (w.n <= 32)
        assert (small.c, small.ops) == (w.c, w.ops)

    def test_tables(self):
        """Of docs/benchmarks.md: (N, L, C, K)."""

        def sizes(names):
            return [(w.n, w.positions, w.c, w.k) for w in map(BY_NAME.get, names)]

        assert sizes(workloads.SMALL) == [
            (16, 1, 64, 10), (64, 1, 64, 10), (128, 1, 64, 100), (128, 1, 128, 100), (256, 1, 64, 100),
            (32, 1, 512, 100), (128, 1, 512, 1000), (512, 1, 64, 100), (1024, 1, 512, 1000), (16, 65, 64, 10),
            (32, 197, 192, 100), (2, 500, 256, 91),
        ]  # fmt: skip
        assert sizes(workloads.LARGE) == [
            (128, 1, 512, 1000), (1024, 1, 512, 1000), (4096, 1, 512, 1000), (512, 1, 512, 8142), (256, 1, 2048, 1000)
        ]  # fmt: skip
        assert set(workloads.BUSY) < set(workloads.SMALL)
