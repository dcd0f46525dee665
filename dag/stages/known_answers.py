"""Stage known_answers: the study's own instruments, asked what is known beforehand. A study whose instruments are off must not go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from dag.stages.artefacts import write_csv, write_provenance
from dag.stages.data import read
from dag.stages.study import Study

FAULTS = ("blur", "tilt", "hole")
_STRENGTHS = (1, 2, 3)


def known_answers(study: Study, *, heldout: Path, out: Path) -> None:
    """Ask distances and depth errors for answers that are known, and write what they say.

    heldout: scenes with their true depth, so that no network but the extractor is asked. Raises ValueError, naming the question, what was
    found and what was expected, when an answer is off.
    """
    started = time.time()
    depth = read(heldout, "depth")["depth"]
    rows = [*_gaussians(), *_planted(study, depth), *_predictors(study, depth)]
    table = pd.DataFrame(rows, columns=["instrument", "question", "found", "expected", "right"])
    wrong = table[~table.right]
    if len(wrong):
        first = wrong.iloc[0]
        raise ValueError(
            f"known answers: {len(wrong)} of {len(table)} are off, the first of {first.instrument}: {first.question}: {first.found}, expected {first.expected}"
        )
    write_csv(table.drop(columns="right"), out)
    write_provenance(out, study, started, questions=len(table))


def _close(found: float, expected: float, tolerance: float = 1e-9) -> bool:
    return abs(found - expected) <= tolerance * max(1.0, abs(expected))


def _gaussians() -> Iterator[tuple]:
    """Frechet distances whose closed form needs no square root of a matrix."""
    from dag.metrics.distances import frechet_distance

    rng = np.random.default_rng(0)
    mu, sigma = rng.normal(size=40), np.diag(rng.uniform(0.1, 2, 40))
    a, b = np.array([[2.0, 0.6], [0.6, 0.5]]), np.array([[0.8, -0.3], [-0.3, 1.5]])
    # Of a 2 x 2 matrix, tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    product = a @ b
    two = np.trace(a) + np.trace(b) - 2 * np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    cases = [
        ("a Gaussian and itself", (mu, sigma, mu, sigma), 0.0),
        ("shifted by one in each of 40 dimensions", (mu, sigma, mu + 1, sigma), 40.0),
        ("spread twice as wide: trace of the covariance", (mu, sigma, mu, 4 * sigma), float(np.trace(sigma))),
        ("two covariances that do not commute, 2 x 2", (np.zeros(2), a, np.zeros(2), b), float(two)),
    ]
    for question, arguments, expected in cases:
        found = frechet_distance(*arguments)
        yield "Fréchet distance", question, f"{found:.9g}", f"{expected:.9g}", _close(found, expected, 1e-7)


def _planted(study: Study, depth: np.ndarray) -> Iterator[tuple]:
    """dFID of real scenes to themselves is zero, and grows with each fault planted in their depth."""
    from dag.accelerator import here
    from dag.metrics.distances import Reference, moments
    from dag.metrics.extractors import depth_features, load_extractor

    section, near, far = study["evaluation"], study["depth"]["near"], study["depth"]["far"]
    options = {key: section.get(key) for key in ("dims", "resolution", "weights", "sha256")}
    extractor = load_extractor(section["extractor"], **options, device=here())
    untouched = depth_features(extractor, depth, near, far)
    truth = Reference(*moments(untouched))

    def dfid(maps: np.ndarray) -> float:
        return truth.distance(depth_features(extractor, maps, near, far))

    nought = truth.distance(untouched)
    yield "dFID", "real depth and itself", f"{nought:.4f}", "0.0000", nought < 1e-4
    for fault in FAULTS:
        values = [nought, *(dfid(plant(depth, fault, strength)) for strength in _STRENGTHS)]
        rising = all(low < high for low, high in zip(values, values[1:], strict=False))
        yield (
            "dFID",
            f"{fault} planted in real depth, strength 0 to {_STRENGTHS[-1]}",
            " → ".join(f"{round(v, 3):.4g}" for v in values),
            "each above the one before",
            rising,
        )


def plant(depth: np.ndarray, fault: str, strength: int) -> np.ndarray:
    """Depth maps (n, h, w) with a fault: "blur" (Gaussian, sigma strength / 2 pixels at 32), "tilt" (depth grows by 15 % strength
    from the left to the right edge and shrinks as much to the other), "hole" (a square in the middle, strength eighths of the side, twice as far)."""
    from scipy.ndimage import gaussian_filter

    side = depth.shape[-1]
    if fault == "blur":
        sigma = strength / 2 * side / 32
        return gaussian_filter(depth, (0, sigma, sigma))
    if fault == "tilt":
        return depth * np.exp(np.linspace(-1, 1, side) * np.log1p(0.15 * strength)).astype(depth.dtype)
    half = strength * side // 16
    spoiled = depth.copy()
    spoiled[:, side // 2 - half : side // 2 + half, side // 2 - half : side // 2 + half] *= 2
    return spoiled


def _predictors(study: Study, depth: np.ndarray) -> Iterator[tuple]:
    """Depth errors of an oracle, of one that is off by a factor, and of a constant."""
    from dag.metrics.depth_errors import DepthProtocol, summarise

    far = study["depth"]["far"]
    depth = np.clip(depth.astype(np.float64), study["depth"]["near"], 0.9 * far)

    def errors(pred: np.ndarray, alignment: str = "none") -> dict[str, float]:
        return summarise(DepthProtocol(alignment, max_depth=far).evaluate(pred, depth))

    oracle, tenth, aligned = errors(depth), errors(1.1 * depth), errors(1.1 * depth, "median")
    # Aligned by scale and shift, a constant becomes the mean of each true map.
    middle = depth.mean(axis=(1, 2), keepdims=True)
    constant, by_hand = errors(np.ones_like(depth), "scale_shift")["abs_rel"], float((np.abs(depth - middle) / depth).mean())
    cases: list[tuple[str, float, float]] = [
        ("AbsRel of an oracle", oracle["abs_rel"], 0.0),
        ("RMSE of an oracle", oracle["rmse"], 0.0),
        ("δ<1.25 of an oracle", oracle["delta1"], 1.0),
        ("AbsRel of 1.1 × the truth", tenth["abs_rel"], 0.1),
        ("AbsRel of 1.1 × the truth, aligned by its median", aligned["abs_rel"], 0.0),
        ("AbsRel of a constant, aligned by scale and shift: that of each map's mean", constant, by_hand),
    ]
    for question, found, expected in cases:
        yield "depth errors", question, f"{found:.6g}" if abs(found) > 1e-12 else "0", f"{expected:.6g}", _close(found, expected)
