"""Photographs as squares of one size, with their depth: the short side is scaled to the size, then the centre or a random part is kept.

Colours are resampled by an antialiased bicubic filter, depths by the mean of the known metres a pixel covers.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Size = int | tuple[int, int]  # of a square, or height and width


def centre(shape: tuple[int, ...]) -> Box:
    """The largest square in the middle of a picture (h, w, ...)."""
    height, width = shape[:2]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _shape(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def scaled(image: np.ndarray, size: Size, box: Box) -> np.ndarray:
    """The part of an image (h, w, 3) uint8 inside a box, at (*size, 3)."""
    return np.asarray(Image.fromarray(image).resize(_shape(size)[::-1], Image.Resampling.BICUBIC, box))


def scaled_depth(depth: np.ndarray, size: Size, box: Box) -> tuple[np.ndarray, np.ndarray]:
    """Depth, float32 of that size, of the part of a map (h, w) inside a box, and where it is known, bool.

    A pixel is known where at least half of what it covers is (above 0); the others are filled with the nearest known depth.
    Raises ValueError on depth that is negative, NaN or infinite, and where nothing is known.
    """
    if not (np.isfinite(depth).all() and (depth >= 0).all()):
        raise ValueError("depth holds NaN, infinite or negative values, expected metres, 0 where unknown")
    known = (depth > 0).astype(np.float32)
    share = _mean(known, size, box)
    valid = share >= 0.5
    if not valid.any():
        raise ValueError("depth is unknown (0) everywhere in the square, expected metres")
    metres = (_mean(depth.astype(np.float32), size, box) / np.maximum(share, 1e-6)).astype(np.float32)
    return metres if valid.all() else filled(metres, valid), valid


def filled(depth: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """depth (h, w) with every pixel that is not valid (h, w) set to the nearest one that is."""
    from scipy.ndimage import distance_transform_edt

    nearest = distance_transform_edt(~valid, return_distances=False, return_indices=True)
    return depth[tuple(nearest)]


def _mean(values: np.ndarray, size: Size, box: Box) -> np.ndarray:
    return np.asarray(Image.fromarray(values).resize(_shape(size)[::-1], Image.Resampling.BOX, box))


class RandomSquares:
    """Random squares of images, mirrored or not: what a network that needs many pictures sees of a few.

    `squares(positions)` is a function of the positions alone: every run of as many positions as there are images shows each once, in an order of
    its own. smallest: least side of a square as a share of the picture's short side, in (0, 1].
    images: (h, w, 3) uint8 each, taken one by one and kept small. Raises ValueError on another share.
    """

    def __init__(self, images: Iterable[np.ndarray], size: int, smallest: float, seed: int = 0):
        if not 0 < smallest <= 1:
            raise ValueError(f"the smallest square is {smallest} of the short side, expected above 0 and at most 1")
        self.size, self.smallest, self.seed = size, smallest, seed
        # Twice as fine as the smallest square needs: reading is done once, and resampling twice costs no sharpness.
        side = int(np.ceil(2 * size / smallest))
        self.images = [_shrunk(image, side) for image in images]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Images (n, size, size, 3) uint8 of some positions, whole numbers from 0."""
        return np.stack([self._square(int(position)) for position in positions])

    def _square(self, position: int) -> np.ndarray:
        epoch, place = divmod(position, len(self.images))
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.images))
        image, random = self.images[order[place]], np.random.default_rng([self.seed, 1, position])
        height, width = image.shape[:2]
        side = min(height, width) * random.uniform(self.smallest, 1)
        left, top = random.uniform(0, width - side), random.uniform(0, height - side)
        square = scaled(image, self.size, (left, top, left + side, top + side))
        return square[:, ::-1] if random.random() < 0.5 else square


def _shrunk(image: np.ndarray, side: int) -> np.ndarray:
    """An image whose short side is `side`, or as it is where that is no smaller."""
    height, width = image.shape[:2]
    factor = side / min(height, width)
    if factor >= 1:
        return image
    return np.asarray(Image.fromarray(image).resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC))
