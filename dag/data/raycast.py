"""What the drawn domains share: random numbers of a scene, rays of its camera, boxes that they hit, pixels as means of rays.

A scene is a function of its seed alone: it depends neither on the batch it is drawn in nor on the picture size. All lengths are metres;
x points right, y up, z forward. Working arrays are float32, (b, n): n rays of each of b scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

SUPERSAMPLING = 2  # rays per pixel and axis; the pixel is their mean
_DRAWS = 256  # uniform numbers behind one scene; each has one fixed use
_CHUNK = 8 * 32**2  # pixels traced together: their working arrays stay in the second-level cache


class Uniform:
    """The uniform numbers behind some scenes, one row per seed (non-negative integers): hands out their columns, each once."""

    def __init__(self, seeds: Sequence[int]):
        self.values, self.used = np.stack([np.random.default_rng(int(s)).random(_DRAWS) for s in seeds]), 0

    def __len__(self) -> int:
        return len(self.values)

    def __call__(self, low=0.0, high=1.0, count: int | None = None) -> np.ndarray:
        """(b,) or (b, count) numbers between low and high."""
        n = 1 if count is None else count
        columns = self.values[:, self.used : self.used + n]
        self.used += n
        columns = columns[:, 0] if count is None else columns
        return low + (np.asarray(high) - low) * columns

    def choice(self, table, jitter: float = 0.04) -> np.ndarray:
        """One row of a colour table per scene, with its own brightness and tint."""
        row = np.asarray(table)[(self() * len(table)).astype(int)]
        return np.clip(row * self(0.9, 1.1)[:, None] + self(-jitter, jitter, 3), 0.05, 0.95)


def rotation(yaw: np.ndarray, pitch: np.ndarray) -> np.ndarray:
    """Camera axes as columns, in scene coordinates (b, 3, 3), from angles in radians (b,): to the right, and up."""
    b = len(yaw)
    zero, one = np.zeros(b), np.ones(b)
    turn = np.stack([np.cos(yaw), zero, np.sin(yaw), zero, one, zero, -np.sin(yaw), zero, np.cos(yaw)], 1).reshape(b, 3, 3)
    tilt = np.stack([one, zero, zero, zero, np.cos(pitch), np.sin(pitch), zero, -np.sin(pitch), np.cos(pitch)], 1).reshape(b, 3, 3)
    return turn @ tilt


def rays(rotation: np.ndarray, tan_half_fov: np.ndarray, size: int) -> list[np.ndarray]:
    """Directions in scene coordinates, three arrays (b, n), of length 1 along the optical axis: distance along them is depth."""
    side = size * SUPERSAMPLING
    grid = (np.arange(side) + 0.5) / side * 2 - 1
    x = np.tile(grid, side)[None] * tan_half_fov[:, None]
    y = np.repeat(-grid, side)[None] * tan_half_fov[:, None]
    r = rotation[..., None]
    directions = [r[:, i, 0] * x + r[:, i, 1] * y + r[:, i, 2] for i in range(3)]
    return [np.where(np.abs(d) < 1e-6, 1e-6, d).astype(np.float32) for d in directions]


def slabs(centre: np.ndarray, half: np.ndarray, inverse: list[np.ndarray], reach: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Where rays meet one axis-aligned box per scene: depth of its three near planes, of entering and of leaving it.

    centre: (b, 3) as seen from the eye; half: (b, 3) half its sides; inverse: 1 / direction; reach: its absolute value. A ray is inside
    between entering the last and leaving the first of three pairs of planes; it misses where it would enter after leaving.
    """
    mid = [centre[:, i, None] * inverse[i] for i in range(3)]
    span = [half[:, i, None] * reach[i] for i in range(3)]
    near = [mid[i] - span[i] for i in range(3)]
    enter = np.maximum(np.maximum(near[0], near[1]), near[2])
    leave = np.minimum(np.minimum(mid[0] + span[0], mid[1] + span[1]), mid[2] + span[2])
    return near, enter, leave


def pixels(values: np.ndarray, size: int) -> np.ndarray:
    """Means (b, size, size, c) over the rays of a pixel of values (b, n, c)."""
    b, s = len(values), SUPERSAMPLING
    parts = values.reshape(b, size, s, size, s, -1)
    if parts.shape[-1] == 1:
        return parts.mean((2, 4))
    # What mean() gives for several channels, to the last bit, several times faster.
    return sum(parts[:, :, i, :, j] for i in range(s) for j in range(s)) / np.float32(s * s)


def normals(values: np.ndarray, size: int) -> np.ndarray:
    """Unit normals (b, size, size, 3) of pixels from those of their rays (b, n, 3)."""
    mean = pixels(values, size)
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    return mean


def to_bytes(colour: np.ndarray, size: int) -> np.ndarray:
    """Image (b, size, size, 3) uint8 from the colours (b, n, 3) that rays see; 1 is white."""
    return (pixels(np.clip(colour, 0, 1), size) * 255 + 0.5).astype(np.uint8)


def in_chunks(draw: Callable[[Sequence[int], int], tuple[np.ndarray, ...]], seeds: Sequence[int], size: int) -> tuple[np.ndarray, ...]:
    """draw(seeds, size) of a few scenes at a time, put together. Raises ValueError on a size below 1."""
    if size < 1:
        raise ValueError(f"render: size is {size}, expected a positive number of pixels")
    count = max(1, _CHUNK // size**2)
    parts = [draw(seeds[i : i + count], size) for i in range(0, len(seeds), count)]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))
