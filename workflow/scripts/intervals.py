"""A mean and its 95 % interval."""

import numpy as np
from scipy import stats


def over_images(values: np.ndarray, seed: int = 0, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean, low, high by the percentile bootstrap over images; the same values and seed give the same interval."""
    values = np.asarray(values, float)
    rows = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[rows].mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def over_trainings(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, low, high by Student's t over a handful of trainings; no interval (nan) for a single one."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def paired(differences: np.ndarray) -> tuple[float, float, float, float]:
    """Mean, low, high and p of paired differences between a handful of trainings, by Student's t; all nan without any."""
    if not len(differences):
        return (float("nan"),) * 4
    p = float(stats.ttest_1samp(differences, 0).pvalue) if len(differences) > 1 else float("nan")
    return *over_trainings(differences), p
