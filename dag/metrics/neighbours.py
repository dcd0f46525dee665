"""Which rows lie in the manifold of others, the balls around them that reach to their k-th neighbour: what precision and recall count
(Kynkaanniemi et al. 2019, arXiv 1904.06991). Rows are float64, (n, d)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_CHUNK = 4096  # rows compared with all others at a time


def precision_of_rows(features: np.ndarray, real: np.ndarray, k: int = 3) -> Callable[[np.ndarray], float]:
    """The function that maps row numbers of `features` to the precision of those rows."""
    centre = real.mean(axis=0)  # distances from |x|^2 + |y|^2 - 2 x.y lose fewer digits around the origin
    inside = _inside(real - centre, features - centre, k)
    return lambda rows: float(inside[rows].mean())


def recall_of_rows(features: np.ndarray, real: np.ndarray, k: int = 3) -> Callable[[np.ndarray], float]:
    """The function that maps row numbers of `features` to the recall of those rows: the manifold is that of the rows alone."""
    centre = real.mean(axis=0)
    features, real = features - centre, real - centre
    if len(features) > _CHUNK:
        return lambda rows: float(_inside(features[rows], real, k).mean())
    among, to_real = _squared_distances(features, features), _squared_distances(features, real)
    np.fill_diagonal(among, -1)

    def recall(rows: np.ndarray) -> float:
        radius = np.partition(among[np.ix_(rows, rows)], k, axis=1)[:, k]
        return float((to_real[rows] <= radius[:, None]).any(axis=0).mean())

    return recall


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.clip(np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * x @ y.T, 0, None)


def _inside(centres: np.ndarray, points: np.ndarray, k: int) -> np.ndarray:
    """Which points lie within the distance of some centre to its k-th neighbour among the centres."""
    inside = np.zeros(len(points), bool)
    for start in range(0, len(centres), _CHUNK):
        chunk = centres[start : start + _CHUNK]
        own = _squared_distances(chunk, centres)
        own[np.arange(len(chunk)), start + np.arange(len(chunk))] = -1  # itself comes first whatever the rounding
        radius = np.partition(own, k, axis=1)[:, k]
        inside |= (_squared_distances(chunk, points) <= radius[:, None]).any(axis=0)
    return inside
