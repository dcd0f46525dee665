"""Distances between sets of features: moments, Frechet distance, KID, precision and recall, FD-infinity, paired bootstrap.

A set of features is an array (n, d), one row per image; everything is computed in float64. The Frechet distance (Heusel et al. 2017, arXiv 1706.08500)
between Gaussians of mean mu_i and covariance S_i is |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2), in squared units of the features. With R = sqrt(S2)
and Z the n centred rows of S1 = Z^T Z / (n - 1), the nonzero eigenvalues of S1 S2 are those of R S1 R (d x d: eigen form) and of Z S2 Z^T / (n - 1)
(n x n: nuclear-norm form, since the sum of their roots is the nuclear norm of Z R / sqrt(n - 1)). Both are symmetric: no distance is ever complex.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import numpy as np

from dag.metrics.bootstrap import KEPT, Estimate, bootstrap
from dag.metrics.neighbours import precision_of_rows, recall_of_rows

_EPS = np.finfo(np.float64).eps
_CHUNK = 4096  # rows turned into float64, or compared with all others, at a time


def _checked(features: np.ndarray, name: str, least: int = 2) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim != 2:
        raise ValueError(f"{name}: features have shape {features.shape}, expected (n, d)")
    if features.dtype.kind not in "fiu":
        raise ValueError(f"{name}: features are of the kind {features.dtype}, expected real numbers")
    if len(features) < least:
        raise ValueError(f"{name}: {len(features)} rows of features, at least {least} are needed")
    if not np.isfinite(features).all():
        raise ValueError(f"{name}: features hold NaN or infinity in {int((~np.isfinite(features)).any(axis=1).sum())} of {len(features)} rows")
    if least > 1 and (features == features[0]).all():
        raise ValueError(f"{name}: all {len(features)} rows of features are equal, so they have no covariance")
    return features


def _same_width(a: int, b: int, names: str) -> None:
    if a != b:
        raise ValueError(f"{names}: features of different width, {a} and {b}; they come from different extractors")


class Moments:
    """Mean and covariance of rows that arrive in pieces: `update` with rows, `merge` with the Moments of another shard.

    Merging is exact (Chan et al. 1983): n1 n2 / (n1 + n2) (m1 - m2)(m1 - m2)^T is the scatter between two shards.
    """

    def __init__(self):
        self.n, self.mu, self._scatter = 0, None, None

    def update(self, features: np.ndarray) -> Moments:
        """Take in more rows (m, d), m >= 1. Raises ValueError on NaN or another width. Returns self."""
        features = _checked(features, "moments", least=1)
        for start in range(0, len(features), _CHUNK):
            part = Moments()
            rows = features[start : start + _CHUNK].astype(np.float64)
            # As an offset from one of the rows the mean is exact where all are equal: rounding is then never taken for a covariance.
            part.n, part.mu = len(rows), rows[0] + (rows - rows[0]).mean(axis=0)
            part._scatter = (rows - part.mu).T @ (rows - part.mu)
            self.merge(part)
        return self

    def merge(self, other: Moments) -> Moments:
        """Take in all rows that `other` has seen. Raises ValueError on another width. Returns self."""
        if other.n == 0:
            return self
        if self.n == 0:
            self.n, self.mu, self._scatter = other.n, other.mu.copy(), other._scatter.copy()
            return self
        _same_width(len(self.mu), len(other.mu), "moments")
        n, step = self.n + other.n, other.mu - self.mu
        self._scatter += other._scatter + np.outer(step, step) * (self.n * other.n / n)
        self.mu = self.mu + step * (other.n / n)
        self.n = n
        return self

    @property
    def sigma(self) -> np.ndarray:
        """Covariance (d, d) with n - 1 in the denominator. Raises ValueError below two rows or when all rows are equal."""
        if self.n < 2:
            raise ValueError(f"moments: {self.n} rows of features, at least 2 are needed")
        if not np.diagonal(self._scatter).any():
            raise ValueError(f"moments: all {self.n} rows of features are equal, so they have no covariance")
        return self._scatter / (self.n - 1)


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and covariance (d, d; n - 1) of features (n, d). Raises ValueError on NaN, equal rows or n < 2."""
    whole = Moments().update(_checked(features, "moments"))
    return whole.mu, whole.sigma


def _nonnegative(value: float, rounding: float, what: str) -> float:
    if value < -rounding or not np.isfinite(value):
        raise ValueError(f"{what} is {value:.6g}, which is more than rounding ({rounding:.1g}) below zero: not a covariance")
    return max(value, 0.0)


def _roots(eigenvalues: np.ndarray, scale: float, what: str) -> np.ndarray:
    """Square roots of the ascending eigenvalues of a nonnegative symmetric matrix whose factors multiply up to `scale`."""
    _nonnegative(float(eigenvalues[0]), 100 * len(eigenvalues) * _EPS * scale, f"smallest eigenvalue of {what}")
    return np.sqrt(np.clip(eigenvalues, 0, None))


def _distance(mean_term: float, trace1: float, trace2: float, roots: np.ndarray) -> float:
    # An eigenvalue is known to eps * (its matrix's scale), its square root therefore only to sqrt(eps).
    rounding = 10 * len(roots) * _EPS**0.5 * (trace1 + trace2)
    return _nonnegative(float(mean_term + trace1 + trace2 - 2 * roots.sum()), rounding, "Frechet distance")


class Reference:
    """Moments to which many sets are compared; the square root of the covariance is computed once, when first needed.

    mu (d,), sigma (d, d). Raises ValueError on NaN, on shapes that do not fit, or on a sigma that is not symmetric and positive semidefinite.
    """

    def __init__(self, mu: np.ndarray, sigma: np.ndarray):
        self.mu, self.sigma = np.atleast_1d(np.asarray(mu, np.float64)), np.atleast_2d(np.asarray(sigma, np.float64))
        if self.sigma.shape != (len(self.mu), len(self.mu)):
            raise ValueError(f"moments: mu has shape {self.mu.shape} and sigma {self.sigma.shape}, expected (d,) and (d, d)")
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise ValueError("moments: mu or sigma holds NaN or infinity")
        if np.abs(self.sigma - self.sigma.T).max() > 1e-8 * np.abs(self.sigma).max():
            raise ValueError("moments: sigma is not symmetric: not a covariance")
        self.trace = float(np.trace(self.sigma))

    def check(self) -> None:
        """Raises ValueError where sigma is not positive semidefinite; a Cholesky factor tells it in a tenth of the time of `root`, which tells it too."""
        try:
            np.linalg.cholesky(self.sigma + 100 * len(self.mu) * _EPS * np.abs(self.sigma).max() * np.eye(len(self.mu)))
        except np.linalg.LinAlgError:
            raise ValueError("moments: sigma has an eigenvalue below zero: not a covariance") from None

    @cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root (d, d) of sigma."""
        values, vectors = np.linalg.eigh(self.sigma)
        return (vectors * _roots(values, abs(values[-1]), "sigma")) @ vectors.T

    def distance_to(self, mu: np.ndarray, sigma: np.ndarray) -> float:
        """Frechet distance to other moments, in eigen form."""
        other = Reference(mu, sigma)
        _same_width(len(other.mu), len(self.mu), "Frechet distance")
        product = self.root @ other.sigma @ self.root
        roots = _roots(np.linalg.eigvalsh((product + product.T) / 2), abs(self.trace * other.trace), "sqrt(S2) S1 sqrt(S2)")
        return _distance(float(np.square(other.mu - self.mu).sum()), other.trace, self.trace, roots)

    def distance(self, features: np.ndarray) -> float:
        """Frechet distance to the moments of features (n, d), in the cheaper form: the nuclear norm where n < d, else eigen.

        Raises ValueError on NaN, equal rows, another width or n < 2.
        """
        features = _checked(features, "Frechet distance")
        _same_width(features.shape[1], len(self.mu), "Frechet distance")
        if len(features) >= len(self.mu):
            return self.distance_to(*moments(features))
        return _frechet_of_rows(features, self, len(features))(np.arange(len(features)))


def _as_reference(moments_: Reference | tuple[np.ndarray, np.ndarray]) -> Reference:
    return moments_ if isinstance(moments_, Reference) else Reference(*moments_)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Frechet distance between two Gaussians, mu (d,) and sigma (d, d). Compare many sets with one through `Reference`.

    Raises ValueError on NaN, on shapes that differ, and on a sigma that is not symmetric and positive semidefinite.
    """
    return Reference(mu2, sigma2).distance_to(mu1, sigma1)


def _frechet_of_rows(features: np.ndarray, reference: Reference, size: int) -> Callable[[np.ndarray], float]:
    """The function that maps row numbers, about `size` of them, to the Frechet distance of the set of those rows of `features`.

    What all sets share is multiplied once: rows times root (eigen form), or rows times sigma times rows (nuclear-norm form, where size < d).
    The cost per set is then one product and the eigenvalues of a matrix of min(size, d) columns.
    """
    z = features.astype(np.float64) - reference.mu
    squares = np.square(z).sum(axis=1)
    nuclear = size < z.shape[1]
    if nuclear:
        reference.check()
    shared = (z @ reference.sigma) @ z.T if nuclear else z @ reference.root

    def distance(rows: np.ndarray) -> float:
        n = len(rows)
        mean_term = float(np.square(z[rows].mean(axis=0)).sum())
        if nuclear:
            gram = shared[np.ix_(rows, rows)]
            to_mean = gram.mean(axis=1)
            matrix = gram - to_mean[:, None] - to_mean + to_mean.mean()
        else:
            projected = shared[rows]
            projected -= projected.mean(axis=0)
            matrix = projected.T @ projected
        trace = float(squares[rows].sum() - n * mean_term) / (n - 1)
        roots = _roots(np.linalg.eigvalsh(matrix / (n - 1)), (trace + mean_term) * reference.trace, "S1 S2")
        return _distance(mean_term, trace, reference.trace, roots)

    return distance


def fd_infinity(fake_features: np.ndarray, real_moments: Reference | tuple[np.ndarray, np.ndarray], seed: int, *, points: int = 15) -> float:
    """Frechet distance extrapolated to infinitely many samples (Chong & Forsyth 2020, arXiv 1911.07023).

    The expected distance is linear in 1/n to first order, so distances of random subsets of `points` sizes from n/4 (3 at least) to n are regressed on 1/size;
    the intercept is returned. Being an extrapolation it may fall slightly below zero. It removes the bias of the fake set only, not that of the
    real moments. Raises ValueError like `Reference.distance`, and when n < 8.
    """
    fake_features = _checked(fake_features, "FD-infinity", least=8)
    reference = _as_reference(real_moments)
    _same_width(fake_features.shape[1], len(reference.mu), "FD-infinity")
    return _fd_infinity_of_rows(fake_features, reference, len(fake_features), seed, points)(np.arange(len(fake_features)))


def _fd_infinity_of_rows(features: np.ndarray, reference: Reference, size: int, seed: int = 0, points: int = 15) -> Callable[[np.ndarray], float]:
    """As _frechet_of_rows, for FD-infinity; rows i and size + i are of one pair.

    Which pairs a subset is of is drawn once: a set without some pairs has what is left of the same subsets. Subsets drawn anew for every set would
    differ by their own chance, which is no smaller than that of the samples and does not shrink with the share of pairs that is left out.
    """
    distance, rng = _frechet_of_rows(features, reference, size), np.random.default_rng(seed)
    subsets = np.zeros((points, size), bool)
    for chosen, n in zip(subsets, np.linspace(max(size // 4, 3), size, points).astype(int), strict=True):
        chosen[rng.permutation(size)[:n]] = True

    def extrapolated(rows: np.ndarray) -> float:
        parts = [rows[chosen[rows % size]] for chosen in subsets]
        return float(np.polyfit([1 / len(part) for part in parts], [distance(part) for part in parts], 1)[1])

    return extrapolated


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """Kernel distance: the unbiased estimate of MMD^2 with k(x, y) = (x . y / d + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401).

    a (n, d), b (m, d). Uses all pairs; being unbiased it may fall below zero when the sets are alike.
    Raises ValueError on NaN, equal rows, different widths or fewer than two rows.
    """
    a, b = _checked(a, "KID").astype(np.float64), _checked(b, "KID").astype(np.float64)
    _same_width(a.shape[1], b.shape[1], "KID")

    return _kid_of_rows(a, b)(np.arange(len(a)))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _diagonal(x: np.ndarray) -> np.ndarray:
    return (np.square(x).sum(axis=1) / x.shape[1] + 1) ** 3


def _kid_of_rows(features: np.ndarray, real: np.ndarray) -> Callable[[np.ndarray], float]:
    """The function that maps row numbers of `features` to the KID of those rows and all rows of `real`."""
    features, real = features.astype(np.float64), real.astype(np.float64)
    parts = [real[i : i + _CHUNK] for i in range(0, len(real), _CHUNK)]
    among_real = (sum(float(_kernel(part, real).sum()) for part in parts) - _diagonal(real).sum()) / (len(real) * (len(real) - 1))
    to_real = sum(_kernel(features, part).sum(axis=1) for part in parts) / len(real)
    own = _diagonal(features)
    # The kernels between all rows are kept only where a resampling can ask for them again and again.
    kernels = _kernel(features, features) if len(features) <= _CHUNK else None

    def distance(rows: np.ndarray) -> float:
        n = len(rows)
        if kernels is not None:
            total = kernels[np.ix_(rows, rows)].sum()
        else:
            total = sum(_kernel(features[rows[i : i + _CHUNK]], features[rows]).sum() for i in range(0, n, _CHUNK))
        return float((total - own[rows].sum()) / (n * (n - 1)) + among_real - 2 * to_real[rows].mean())

    return distance


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), each in [0, 1].

    Precision is the share of fake rows that lie within the distance of some real row to its k-th neighbour among the real; recall is the same
    with the roles exchanged. real (n, d), fake (m, d). Raises ValueError on NaN, equal rows, different widths, or k + 1 > n or m.
    """
    real, fake = _checked(real, "precision and recall", k + 1).astype(np.float64), _checked(fake, "precision and recall", k + 1).astype(np.float64)
    _same_width(real.shape[1], fake.shape[1], "precision and recall")
    rows = np.arange(len(fake))
    return precision_of_rows(fake, real, k)(rows), recall_of_rows(fake, real, k)(rows)


_OF_ROWS = {
    "fd": lambda rows, real, size: _frechet_of_rows(rows, _as_reference(real), size),
    "fd_infinity": lambda rows, real, size: _fd_infinity_of_rows(rows, _as_reference(real), size),
    "kid": lambda rows, real, size: _kid_of_rows(rows, real),
    "precision": lambda rows, real, size: precision_of_rows(rows.astype(np.float64), real.astype(np.float64)),
    "recall": lambda rows, real, size: recall_of_rows(rows.astype(np.float64), real.astype(np.float64)),
}
METRICS = tuple(_OF_ROWS)
_RANGES = {"fd": (0, np.inf), "precision": (0, 1), "recall": (0, 1)}  # what no interval need reach beyond
_KEPT = {"recall": 0.5}  # neighbours change by leaps: with nine tenths of the pairs its intervals are up to twice as wide as they should be


def paired_bootstrap(
    real: Reference | tuple[np.ndarray, np.ndarray] | np.ndarray,
    features: np.ndarray,
    baseline: np.ndarray | None = None,
    *,
    metric: str = "fd",
    beyond: tuple | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> Estimate:
    """A distance of features (n, d) to the real ones with its interval, and its difference to a baseline (n, d): see `bootstrap`.

    features[i] and baseline[i] come from one seed. metric: "fd" or "fd_infinity" (its subsets from seed 0), for which `real` may be moments or a
    `Reference`; "kid", "precision" or "recall" (k = 3), for which it is features (m, d). The real ones count as given.
    beyond: (real, features, baseline) of other features of the same pictures: the number is then the logarithm of the distance over theirs, so that its
    difference compares by what factor either changed, whatever the scale of each.
    Raises ValueError like `Reference.distance`, on an unknown metric, on unequal counts of pairs, and when n is too small for the metric.
    """
    statistic = _of_pairs(metric, real, features, baseline)
    if beyond is not None:
        if (len(beyond[1]), beyond[2] is None) != (len(features), baseline is None):
            raise ValueError(f"beyond: {len(beyond[1])} rows of features do not belong to {len(features)} rows, with a baseline or without")
        first, second = statistic, _of_pairs(metric, *beyond)

        def statistic(rows: np.ndarray) -> float:
            return float(np.log(first(rows)) - np.log(second(rows)))

    options = {"resamples": resamples, "seed": seed, "kept": _KEPT.get(metric, KEPT)}
    found = bootstrap(statistic, len(features), paired=baseline is not None, **options)
    if beyond is not None or metric not in _RANGES:
        return found
    least, most = _RANGES[metric]
    return replace(found, low=max(found.low, least), high=min(found.high, most))


def _of_pairs(metric: str, real, features: np.ndarray, baseline: np.ndarray | None) -> Callable[[np.ndarray], float]:
    """The function that maps row numbers to the distance of those rows: of features, and n + i of their baseline."""
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {', '.join(METRICS)}")
    least = {"fd_infinity": 10, "precision": 4, "recall": 8}.get(metric, 3)  # of which the metric still takes a resample
    if metric.startswith("fd"):
        real = _as_reference(moments(real) if isinstance(real, np.ndarray) else real)
        width = len(real.mu)
    elif isinstance(real, np.ndarray):
        width = _checked(real, "reference", 4).shape[1]
    else:
        raise ValueError(f"{metric} needs the features (m, d) of the real images, found moments")
    rows = features = _checked(features, "features", least)
    _same_width(features.shape[1], width, "features and reference")
    if baseline is not None:
        baseline = _checked(baseline, "baseline", least)
        _same_width(baseline.shape[1], width, "baseline and reference")
        if len(baseline) != len(features):
            raise ValueError(f"baseline: {len(baseline)} rows do not pair with {len(features)} rows of features")
        rows = np.concatenate([features, baseline])
    return _OF_ROWS[metric](rows, real, len(features))
