"""Ratios of medians hold the floors of speed, in three attempts."""

from itertools import product
from types import SimpleNamespace

import pytest

from bench import targets, workloads
from tests.bench.cases import DENSE, SMALL, problem


class TestTargets:
    @pytest.fixture
    def attempts(self, monkeypatch):
        """Ratios of workloads, by attempt, in the place of measurements; what was measured comes back."""

        def install(*ratios):
            def pairs(problems, plan):
                names = [p.workload.name for p in problems]
                seen.append((names, plan.busy))
                now = ratios[len(seen) - 1]
                return [(SimpleNamespace(p50_ms=1.0), SimpleNamespace(p50_ms=now[name])) for name in names]

            monkeypatch.setattr(targets, "pairs", pairs)
            return seen

        seen = []
        return install

    PROBLEMS = (problem(), problem(workload=DENSE))
    A, B = SMALL.name, DENSE.name

    def test_what_is_slow_is_measured_again(self, attempts):
        seen = attempts({self.A: 0.9, self.B: 2.0}, {self.A: 0.8}, {self.A: 1.0})
        targets.hold(self.PROBLEMS, 1.0, busy=3)
        assert seen == [([self.A, self.B], 3), ([self.A], 3), ([self.A], 3)]

    def test_all_are_where_the_mean_is_too_low(self, attempts):
        """One that was quick enough once may be slow by then."""
        seen = attempts({self.A: 1.1, self.B: 1.2}, {self.A: 0.9, self.B: 3.0})
        targets.hold(self.PROBLEMS, 1.0, 1.4)
        assert seen == [([self.A, self.B], 0)] * 2

    @pytest.mark.parametrize("slow", [{A: 0.9, B: 9.0}, {A: 1.1, B: 1.2}], ids=["worst", "mean"])
    def test_three_times_at_most(self, slow, attempts):
        seen = attempts(slow, slow, slow)
        with pytest.raises(pytest.fail.Exception, match="geometric mean"):
            targets.hold(self.PROBLEMS, 1.0, 1.4)
        assert len(seen) == 3

    def test_every_rate(self):
        found = [(p.workload.name, p.dropout) for p in targets.steps(workloads.SMALL)]
        assert found == list(product(workloads.SMALL, (0.5, 0.1)))

    def test_measures_ours_and_the_papers(self, capsys):
        ((ours, paper),) = targets.pairs([problem()], targets.PLAN._replace(timed=False))
        assert (ours.provider, paper.provider) == ("fastbf-torch", "paper")
        assert ours.peak_mib > 0
        assert paper.peak_mib > 0
