"""Errors of depth maps: the nine numbers of the field, alignment, and the protocol (mask, caps, crop) they are measured under.

Depth is in metres along the optical axis. The numbers are those of Eigen et al. 2014 (arXiv 1406.2283) and their followers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ERRORS = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "si_log", "delta1", "delta2", "delta3")
ALIGNMENTS = ("none", "median", "scale_shift", "scale_shift_disparity")
_EIGEN = (45 / 480, 471 / 480, 41 / 640, 601 / 640)  # rows 45:471 and columns 41:601 of 480 x 640, as shares


def _masked(pred: np.ndarray, gt: np.ndarray, valid: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The valid pixels of both maps as float64 vectors."""
    pred, gt = np.asarray(pred), np.asarray(gt)
    valid = np.ones(gt.shape, bool) if valid is None else np.asarray(valid, bool)
    if not pred.shape == gt.shape == valid.shape:
        raise ValueError(f"depth errors: pred has shape {pred.shape}, gt {gt.shape}, valid {valid.shape}; they must be equal")
    if not valid.any():
        raise ValueError("depth errors: no valid pixel")
    p, g = pred[valid].astype(np.float64), gt[valid].astype(np.float64)
    if not (np.isfinite(g).all() and (g > 0).all()):
        raise ValueError("depth errors: gt holds a valid pixel that is NaN, infinite or not above 0 m")
    if np.isnan(p).any():
        raise ValueError(f"depth errors: pred is NaN at {int(np.isnan(p).sum())} of {p.size} valid pixels")
    return p, g


def depth_errors(pred: np.ndarray, gt: np.ndarray, valid: np.ndarray | None = None) -> dict[str, float]:
    """The nine errors of one depth map; pred and gt (h, w) in metres, valid (h, w) bool (default: everywhere).

    With e = ln pred - ln gt: abs_rel mean |pred - gt| / gt; sq_rel mean (pred - gt)^2 / gt (m); rmse (m); rmse_log sqrt(mean e^2);
    log10 mean |log10 pred - log10 gt|; si_log 100 sqrt(mean e^2 - (mean e)^2); delta_i share of pixels with
    max(pred / gt, gt / pred) < 1.25^i. Raises ValueError on unequal shapes, no valid pixel, or a valid pixel of either map
    that is NaN, infinite or not positive.
    """
    return _errors(*_masked(pred, gt, valid))


def _errors(p: np.ndarray, g: np.ndarray) -> dict[str, float]:
    """The nine errors of the vectors that `_masked` gives."""
    if not (np.isfinite(p).all() and (p > 0).all()):
        raise ValueError(f"depth errors: pred reaches from {p.min():.6g} to {p.max():.6g} m, expected finite and above 0; clip it first")
    quotient, difference = p / g, p - g
    log_difference, ratio = np.log(quotient), np.maximum(quotient, 1 / quotient)
    return {
        "abs_rel": float(np.mean(np.abs(quotient - 1))),
        "sq_rel": float(np.mean(difference**2 / g)),
        "rmse": float(np.mean(difference**2) ** 0.5),
        "rmse_log": float(np.mean(log_difference**2) ** 0.5),
        "log10": float(np.mean(np.abs(log_difference)) / np.log(10)),
        # The variance of e, in its two-pass form: it cannot fall below zero.
        "si_log": float(100 * np.std(log_difference)),
        **{f"delta{i}": float(np.mean(ratio < 1.25**i)) for i in (1, 2, 3)},
    }


def _least_squares(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Scale and shift with the least squared error of scale * x + shift to y; a flat x gets scale 0."""
    if np.ptp(x) == 0:
        return 0.0, float(y.mean())
    centred = x - x.mean()
    scale = float(centred @ (y - y.mean()) / (centred @ centred))
    return scale, float(y.mean() - scale * x.mean())


def align(pred: np.ndarray, gt: np.ndarray, valid: np.ndarray | None, how: str) -> np.ndarray:
    """pred (h, w), in metres, brought closer to gt (h, w) by what `how` allows to be unknown; float64 (h, w), not clipped.

    "none": as it is. "median": times the ratio of the medians. "scale_shift": least squares in depth. "scale_shift_disparity":
    least squares in 1 / depth (Ranftl et al. 2022, arXiv 1907.01341); a pixel whose disparity is then not positive is infinitely far.
    All are fitted on valid pixels. Raises ValueError on an unknown `how`, unequal shapes, no valid pixel, NaN, or a pred that is
    not positive where it is divided by.
    """
    return _alignment(*_masked(pred, gt, valid), how)(np.asarray(pred, np.float64))


def _alignment(p: np.ndarray, g: np.ndarray, how: str) -> Callable[[np.ndarray], np.ndarray]:
    """What `align` does to depths, fitted on the vectors that `_masked` gives."""
    if how not in ALIGNMENTS:
        raise ValueError(f"alignment is {how!r}, expected one of {', '.join(ALIGNMENTS)}")
    if how == "none":
        return lambda depth: depth
    if how == "median":
        if (median := np.median(p)) <= 0:
            raise ValueError(f"alignment median: the median of pred is {median:.6g} m, expected above 0")
        ratio = np.median(g) / median
        return lambda depth: depth * ratio
    if how == "scale_shift":
        scale, shift = _least_squares(p, g)
        return lambda depth: scale * depth + shift
    if p.min() <= 0:
        raise ValueError(f"alignment scale_shift_disparity: pred falls to {p.min():.6g} m, expected above 0 at every valid pixel")
    scale, shift = _least_squares(1 / p, 1 / g)

    def of_disparity(depth: np.ndarray) -> np.ndarray:
        disparity = np.divide(scale, depth, out=np.zeros_like(depth), where=depth > 0) + shift
        return np.divide(1.0, disparity, out=np.full_like(depth, np.inf), where=disparity > 0)

    return of_disparity


@dataclass(frozen=True)
class DepthProtocol:
    """How a depth number was measured. Two numbers compare only under equal protocols, so `describe` is printed below each.

    alignment: one of ALIGNMENTS, fitted per image. A pixel counts where min_depth < gt < max_depth (metres), inside the crop, and
    where the caller says it is valid; predictions are clipped to [min_depth, max_depth] after alignment. crop: None, "eigen"
    (rows 45:471 and columns 41:601 of 480 x 640, scaled for other pictures of that shape), or (top, bottom, left, right) in pixels,
    bottom and right excluded. Raises ValueError on anything else.
    """

    alignment: str
    min_depth: float = 1e-3
    max_depth: float = 10.0
    crop: str | tuple[int, int, int, int] | None = None

    def __post_init__(self):
        if self.alignment not in ALIGNMENTS:
            raise ValueError(f"alignment is {self.alignment!r}, expected one of {', '.join(ALIGNMENTS)}")
        if not 0 < self.min_depth < self.max_depth:
            raise ValueError(f"depth caps are {self.min_depth} and {self.max_depth} m, expected 0 < min_depth < max_depth")
        named = self.crop is None or self.crop == "eigen"
        if not named and (isinstance(self.crop, str) or len(self.crop) != 4):
            raise ValueError(f"crop is {self.crop!r}, expected null, 'eigen' or four numbers (top, bottom, left, right)")
        if not named and not (0 <= self.crop[0] < self.crop[1] and 0 <= self.crop[2] < self.crop[3]):
            raise ValueError(f"crop is {self.crop}, expected (top, bottom, left, right) with top < bottom and left < right")

    def describe(self) -> str:
        """One line to print under a number."""
        crop = "no crop" if self.crop is None else "Eigen crop" if self.crop == "eigen" else f"crop {tuple(self.crop)}"
        return f"alignment {self.alignment}, {self.min_depth:g} m < depth < {self.max_depth:g} m, {crop}"

    def mask(self, gt: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
        """The pixels of gt (h, w) that count, bool (h, w). Raises ValueError on a crop that the picture does not hold."""
        h, w = gt.shape
        mask = (gt > self.min_depth) & (gt < self.max_depth)
        if valid is not None:
            mask &= np.asarray(valid, bool)
        if self.crop is not None:
            top, bottom, left, right = self._crop(h, w)
            inside = np.zeros_like(mask)
            inside[top:bottom, left:right] = True
            mask &= inside
        return mask

    def _crop(self, h: int, w: int) -> tuple[int, int, int, int]:
        if self.crop == "eigen":
            if h * 4 != w * 3:
                raise ValueError(f"crop eigen belongs to pictures of 480 x 640 or that shape scaled, found {h} x {w}")
            return tuple(round(share * side) for share, side in zip(_EIGEN, (h, h, w, w), strict=True))
        if self.crop[1] > h or self.crop[3] > w:
            raise ValueError(f"crop {tuple(self.crop)} reaches beyond a picture of {h} x {w}")
        return self.crop

    def evaluate(self, pred: np.ndarray, gt: np.ndarray, valid: np.ndarray | None = None) -> list[dict[str, float | int | str]]:
        """One record per image of pred and gt (n, h, w), metres: image (0-based), alignment, the nine errors, pixels (that counted).

        valid: (n, h, w) bool or None. Raises ValueError, naming the image, on what `align` and `depth_errors` refuse.
        """
        if np.ndim(gt) != 3 or np.shape(pred) != np.shape(gt) or (valid is not None and np.shape(valid) != np.shape(gt)):
            shapes = f"pred has shape {np.shape(pred)}, gt {np.shape(gt)}" + ("" if valid is None else f", valid {np.shape(valid)}")
            raise ValueError(f"depth protocol: {shapes}; expected equal (n, h, w)")
        records = []
        for i in range(len(gt)):
            try:
                p, g = _masked(pred[i], gt[i], self.mask(gt[i], None if valid is None else valid[i]))
                errors = _errors(np.clip(_alignment(p, g, self.alignment)(p), self.min_depth, self.max_depth), g)
            except ValueError as error:
                raise ValueError(f"image {i}: {error}") from None
            records.append({"image": i, "alignment": self.alignment, **errors, "pixels": p.size})
        return records


def summarise(records: Sequence[Mapping]) -> dict[str, float]:
    """Means over images of the nine errors of `DepthProtocol.evaluate`, and rmse_pooled, the RMSE over the pixels of all images.

    The two RMSEs differ: the mean of roots is never above the root of the mean. Raises ValueError on no records.
    """
    if not records:
        raise ValueError("depth errors: no records to summarise")
    means = {name: float(np.mean([r[name] for r in records])) for name in ERRORS}
    pixels = np.array([r["pixels"] for r in records], np.float64)
    squares = np.array([r["rmse"] for r in records]) ** 2
    return {**means, "rmse_pooled": float((pixels @ squares / pixels.sum()) ** 0.5)}
