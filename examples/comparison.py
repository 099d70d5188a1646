"""Two arms compared over seeds: Student's t on paired differences, the words that it allows, and the table of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

#: Fewer seeds get no verdict; a difference is called one where its p is below ``LEVEL``, its interval then excludes 0.
FEWEST_SEEDS, LEVEL = 5, 0.05

#: For a difference that is clearly above 0, clearly below, and neither.
WORDS = ("gain", "LOSS", "no clear gain")
TOO_FEW = "too few seeds for a verdict"

RULE = (
    f"± is the {1 - LEVEL:.0%} interval of Student's t. A verdict needs {FEWEST_SEEDS} seeds and p < {LEVEL} in",
    f"the paired t test (scipy.stats.ttest_rel). By chance {LEVEL * 100:.0f} in 100 rows without any effect get one.",
)
FOOTNOTE = ("Differences are paired: both arms of a seed share data, initial weights and batches.", *RULE)


class Mean(NamedTuple):
    """A mean over seeds and its 95 % interval of Student's t, ``value ± half``; ``half`` is infinite for one seed."""

    value: float
    half: float

    @classmethod
    def of(cls, values: np.ndarray) -> Mean:
        """Of (seeds,) values.

        Raises:
            ValueError: a value is not finite.
        """
        values = np.asarray(values, dtype=float)
        if not np.isfinite(values).all():
            raise ValueError(f"values must be finite, got {values}")
        if len(values) < 2:
            return cls(float(values.mean()), float("inf"))
        half = stats.t.ppf(1 - LEVEL / 2, len(values) - 1) * stats.sem(values)
        return cls(float(values.mean()), float(half))


def verdict(without: np.ndarray, mixed: np.ndarray, words: Sequence[str] = WORDS) -> str:
    """What the paired difference of (seeds,) values allows one to say.

    Args:
        words: for a difference that is clearly above 0, clearly below, and neither.

    Returns:
        One of ``words``, or ``TOO_FEW``.
    """
    if len(mixed) < FEWEST_SEEDS:
        return TOO_FEW
    if np.ptp(mixed - without) < 1e-9:  # t divides by their spread: there is none to judge by
        return words[2]
    test = stats.ttest_rel(mixed, without)
    if test.pvalue >= LEVEL:
        return words[2]
    return words[0] if test.statistic > 0 else words[1]


def table(
    title: str,
    rows: dict[str, tuple[np.ndarray, np.ndarray]],
    arms: tuple[str, str] = ("without", "with"),
    words: Sequence[str] = WORDS,
) -> list[str]:
    """Lines that compare two arms, each number with its interval.

    Args:
        title: what the first column names.
        rows: (seeds,) without BatchFormer and (seeds,) with it, in percent, larger is better, by name.
        arms: titles of the two columns, where they are others.
        words: for a difference that is clearly above 0, clearly below, and neither.
    """
    lines = [f"  {title:<28}{arms[0]:>13}{arms[1]:>13}{'difference':>15}"]
    for name, (without, mixed) in rows.items():
        first, second, difference = (Mean.of(values) for values in (without, mixed, mixed - without))
        texts = [f"{m.value:.1f} ± {m.half:.1f}" for m in (first, second)]
        texts.append(f"{difference.value:+.1f} ± {difference.half:.1f}")
        lines.append(f"  {name:<28}{texts[0]:>13}{texts[1]:>13}{texts[2]:>15}  {verdict(without, mixed, words)}")
    return lines
