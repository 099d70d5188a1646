"""What the examples say of a difference: Student's t, no verdict on few seeds, and intervals in the table."""

import numpy as np
import pytest
from scipy import stats

from tests.examples.running import imported


@pytest.fixture
def comparison(monkeypatch):
    return imported("comparison", monkeypatch)


def arms(differences, seed=0):
    """Arms that vary far more from seed to seed than they differ."""
    without = np.random.default_rng(seed).normal(50, 10, len(differences))
    return without, without + np.array(differences)


@pytest.mark.parametrize("differences", [[0.7, 0.7], [0.7, 0.8], [0.0, 0.0], [5.0, 5.1, 5.2], [-9.0, -9.1, -9.2, -9.3]])
def test_few_seeds_get_no_verdict(comparison, differences):
    assert comparison.verdict(*arms(differences)) == "too few seeds for a verdict"


def test_verdict_is_that_of_the_paired_t_test(comparison):
    random = np.random.default_rng(1)
    said = set()
    for shift in np.linspace(-3, 3, 41):
        without, mixed = arms(random.normal(shift, 1.5, 6))
        p = stats.ttest_1samp(mixed - without, 0).pvalue
        expected = "no clear gain" if p >= 0.05 else "gain" if (mixed - without).mean() > 0 else "LOSS"
        said.add(comparison.verdict(without, mixed))
        assert comparison.verdict(without, mixed) == expected
    assert said == {"gain", "LOSS", "no clear gain"}


def test_two_standard_errors_are_not_enough_at_five_seeds(comparison):
    differences = np.array([0.0, 0.2, 1.0, 1.8, 2.0])
    assert differences.mean() > 2.4 * stats.sem(differences)
    assert comparison.verdict(*arms(differences)) == "no clear gain"


def test_verdict_agrees_with_the_interval(comparison):
    random = np.random.default_rng(2)
    for _ in range(50):
        without, mixed = arms(random.normal(1, 1, 7))
        mean = comparison.Mean.of(mixed - without)
        assert (comparison.verdict(without, mixed) == "no clear gain") == (abs(mean.value) <= mean.half)


@pytest.mark.parametrize("difference", [0.0, 0.7, -0.7])
def test_differences_without_spread_prove_nothing(comparison, difference):
    assert comparison.verdict(*arms([difference] * 6)) == "no clear gain"


def test_interval_is_students(comparison):
    values = np.array([1.0, 2.0, 4.0])
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mean = comparison.Mean.of(values)
    assert (mean.value - mean.half, mean.value + mean.half) == pytest.approx((low, high))
    assert comparison.Mean.of([1.0, 2.0]).half == pytest.approx(12.706 / 2, abs=1e-3)  # of two seeds: a wide one
    assert comparison.Mean.of([1.0]).half == np.inf


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_run_that_diverged_is_an_error(comparison, value):
    without, mixed = arms([1.0] * 6)
    mixed[3] = value
    with pytest.raises(ValueError, match="finite"):
        comparison.table("classes", {"all": (without, mixed)})


def test_table(comparison):
    rows = {"all": arms([2.0, 2.1, 1.9, 2.2, 1.8]), "few": arms([-9.0, 7.0, 1.0, -2.0, 4.0])}
    title, *lines = comparison.table("classes", rows)
    assert title.split() == ["classes", "without", "with", "difference"]
    half = stats.t.ppf(0.975, 4) * stats.sem([2.0, 2.1, 1.9, 2.2, 1.8])
    assert lines[0].endswith(f"+2.0 ± {half:.1f}  gain")
    assert lines[1].endswith("  no clear gain")
    assert comparison.table("maps", {"own": rows["all"]}, ("a", "b"), ("more", "less", "same"))[1].endswith("  more")
    quick = comparison.table("classes", {"a name of twenty-eight signs": arms([60.0, 90.0])})[1]
    assert quick.endswith("  too few seeds for a verdict")
    assert len(quick) <= 100
