"""Intervals and p-values of numbers that sum up a set of samples, and of the difference between two sets that share their seeds, by subsampling."""

from __future__ import annotations

import math
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
    which is exact for a mean (Shao & Wu 1989, Ann. Statist. 17); the less smooth a statistic is, the more pairs it has to leave out. Sets of m rows
    still lie a little further off than one of n, so deviations are taken from their own mean: the interval is one for the expected value at this n,
    not for the limit of many samples.
    p is two-sided, by the normal distribution with the standard error of these deviations. (Swapping the labels of random pairs would not do: guidance moves
    all samples one way, and then pairs cannot be exchanged even where both sets are equally far from the reference.) Raises ValueError when n < 3.
    """
    if n < 3:
        raise ValueError(f"bootstrap: {n} samples, expected at least 3")
    rng = np.random.default_rng(seed)
    m = min(n - 1, round(kept * n))
    sets = [rng.permutation(n)[:m] for _ in range(resamples)]

    widen = (m / (n - m)) ** 0.5

    def interval(value: float, resampled: np.ndarray) -> tuple[float, float]:
        deviations = np.percentile(resampled - resampled.mean(), [2.5, 97.5]) * widen
        return float(value + deviations[0]), float(value + deviations[1])

    value, resampled = statistic(np.arange(n)), np.array([statistic(rows) for rows in sets])
    low, high = interval(value, resampled)
    if not paired:
        return Estimate(n, value, low, high)
    other = statistic(n + np.arange(n))
    diff, resampled = value - other, resampled - [statistic(n + rows) for rows in sets]
    # Sets that are alike differ by rounding, which is no evidence.
    error = max(float(resampled.std()) * widen, 1e-9 * max(abs(value), abs(other)))
    p = math.erfc(abs(diff) / error / 2**0.5) if error else 1.0
    return Estimate(n, value, low, high, diff, *interval(diff, resampled), p)
