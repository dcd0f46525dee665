"""Intervals and p-values of numbers that sum up a set of samples, and of the difference between two sets that share their seeds, by subsampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

KEPT = 0.9  # share of the pairs in a resample


@dataclass(frozen=True)
class Estimate:
    """A number of n samples with its 95 % interval, and its difference to a baseline (None where there is none).

    diff = value - baseline, so a negative one is better where less is better. p: of "no difference", two-sided.
    """

    n: int
    value: float
    low: float
    high: float
    diff: float | None = None
    diff_low: float | None = None
    diff_high: float | None = None
    p: float | None = None


def bootstrap(statistic: Callable[[np.ndarray], float], n: int, *, paired: bool, resamples: int = 200, seed: int = 0, kept: float = KEPT) -> Estimate:
    """The statistic of n samples with its interval; paired: also its difference to n samples of a baseline with the same seeds.

    statistic maps row numbers to a number: rows 0 to n - 1 are the samples, n + i is the baseline's partner of i. A resample takes pairs, so what
    the seeds share cancels in the difference. The usual resample of n rows with replacement repeats rows, which raises every distance and, where n
    is a few times the dimensions, can double its spread. Here a resample is m = kept n different pairs whose deviation counts sqrt(m / (n - m)) times,
    which gives the variance of a mean exactly (Shao & Wu 1989, Ann. Statist. 17); the less smooth a statistic is, the more pairs it has to leave out.
    Sets of m rows still lie a little further off than one of n, so their spread is about their own mean: the interval is one for the expected value at
    this n, not for the limit of many samples.
    Interval and two-sided p are those of Student's t with this standard error, so that p is below 0.05 where the interval of a difference leaves out 0.
    (Percentiles of the deviations would not do: they mirror the few pairs left out, and their skew has the wrong sign. Nor would a p from swapping the
    labels of random pairs: guidance moves all samples one way, and pairs then cannot be exchanged even where both sets are equally far from the
    reference.) Raises ValueError when n < 3.
    """
    from scipy.stats import t as student  # here: the stages that only take moments do without scipy

    if n < 3:
        raise ValueError(f"bootstrap: {n} samples, expected at least 3")
    rng = np.random.default_rng(seed)
    m = min(n - 1, round(kept * n))
    sets = [rng.permutation(n)[:m] for _ in range(resamples)]

    widen, reach = (m / (n - m)) ** 0.5, float(student.ppf(0.975, resamples - 1))

    def error_of(resampled: np.ndarray) -> float:
        return float(resampled.std(ddof=1)) * widen

    value, resampled = statistic(np.arange(n)), np.array([statistic(rows) for rows in sets])
    error = reach * error_of(resampled)
    if not paired:
        return Estimate(n, value, value - error, value + error)
    other = statistic(n + np.arange(n))
    diff, differences = value - other, resampled - [statistic(n + rows) for rows in sets]
    # Sets that are alike differ by rounding, which is no evidence.
    se = max(error_of(differences), 1e-9 * max(abs(value), abs(other)))
    p = 2 * float(student.sf(abs(diff) / se, resamples - 1)) if se else 1.0
    return Estimate(n, value, value - error, value + error, diff, diff - reach * se, diff + reach * se, p)
