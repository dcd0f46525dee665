"""The pinhole camera, and points and surface normals of a depth map that it sees.

Axes as in `dag.data.raycast`: x points right, y up, z forward, lengths in metres, depth along z. Row v, column u of a
picture is the centre of its pixel, (u + 1/2, v + 1/2) in the units of the intrinsics, and rows run downwards.
"""

from __future__ import annotations

import numpy as np


def camera(tan_half_fov: np.ndarray, size: int) -> np.ndarray:
    """Pinhole intrinsics (b, 3, 3) in pixels of a size x size picture, from tan(field of view / 2) of shape (b,)."""
    k = np.zeros((len(tan_half_fov), 3, 3))
    k[:, 0, 0] = k[:, 1, 1] = size / 2 / tan_half_fov
    k[:, 0, 2] = k[:, 1, 2] = size / 2
    k[:, 2, 2] = 1
    return k


def unproject(depth: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Points (h, w, 3) in metres, camera coordinates, of a depth map (h, w) in metres with intrinsics (3, 3) in pixels.

    Raises ValueError for other shapes and for depth that is not positive and finite.
    """
    depth = _checked(depth, intrinsics)
    x, y = _rays(depth.shape, intrinsics)
    return np.stack([x * depth, y * depth, depth], -1)


def normals_from_depth(depth: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Unit normals (h, w, 3) of the surface, camera coordinates, facing the camera; arguments and errors as in `unproject`.

    A plane n . P = -c (n facing the camera, c > 0) seen along the ray r = (x, y, 1), P = r z, has 1/z = -(n . r)/c: inverse
    depth is linear in the picture, and its slopes and its intercept are the normal up to a positive factor. Central
    differences (one-sided at the border) are therefore exact inside a plane, whatever its slant.
    """
    depth = _checked(depth, intrinsics)
    if min(depth.shape) < 2:
        raise ValueError(f"normals_from_depth: depth is {depth.shape[0]} x {depth.shape[1]}, expected at least 2 x 2 pixels")
    inverse = 1 / depth
    x, y = _rays(depth.shape, intrinsics)
    down, right = np.gradient(inverse)
    slope_x, slope_y = right * intrinsics[0, 0], -down * intrinsics[1, 1]
    normal = -np.stack([slope_x, slope_y, inverse - x * slope_x - y * slope_y], -1)
    return normal / np.linalg.norm(normal, axis=-1, keepdims=True)


def _rays(shape: tuple[int, int], intrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x (1, w) and y (h, 1) of the ray through each pixel's centre, of length 1 along z."""
    h, w = shape
    x = (np.arange(w) + 0.5 - intrinsics[0, 2]) / intrinsics[0, 0]
    y = -(np.arange(h) + 0.5 - intrinsics[1, 2]) / intrinsics[1, 1]
    return x[None], y[:, None]


def _checked(depth: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    depth = np.asarray(depth, float)
    if depth.ndim != 2 or np.shape(intrinsics) != (3, 3):
        raise ValueError(f"geometry: depth and intrinsics have shapes {depth.shape} and {np.shape(intrinsics)}, expected (h, w) and (3, 3)")
    if not (np.isfinite(depth) & (depth > 0)).all():
        raise ValueError("geometry: depth has values that are not positive and finite, expected metres in front of the camera")
    return depth
