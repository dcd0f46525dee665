"""How much a depth map looks like a box room, asked of its geometry alone: no network judges it.

Walls, floor and ceiling of a box room stand along three orthogonal axes. From a depth map and the camera's intrinsics follow the surface normals;
the axes are the turn (yaw, then pitch) of the camera that explains most of them. What is measured is how many normals it explains, how flat the
surfaces along the axes are, and whether floor and ceiling are parallel. Axes as in `dag.data.geometry`.
"""

from __future__ import annotations

import numpy as np

from dag.data.geometry import normals_from_depth, unproject

SCORES = ("axis_share", "roughness", "floor_ceiling_degrees")
_TOLERANCE = np.cos(np.radians(15))  # a normal this close to an axis belongs to it
_YAW, _PITCH = np.arange(-45, 45, 5.0), np.arange(-25, 15, 5.0)  # degrees; a quarter turn gives the same axes
_LEAST = 16  # pixels that make a surface


def _frames() -> np.ndarray:
    """Candidate frames (k, 3, 3): rows are the room's right, up and forward in camera coordinates."""
    yaw, pitch = (a.ravel() for a in np.meshgrid(np.radians(_YAW), np.radians(_PITCH), indexing="ij"))
    cy, sy, cp, sp, zero = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.zeros_like(yaw)
    right = np.stack([cy, -sy * sp, -sy * cp], -1)
    up = np.stack([zero, cp, -sp], -1)
    forward = np.stack([sy, cy * sp, cy * cp], -1)
    return np.stack([right, up, forward], 1)


_FRAMES = _frames()


def room_frame(normals: np.ndarray) -> np.ndarray:
    """The frame (3, 3), rows right, up and forward in camera coordinates, to whose axes most of the unit normals (..., 3) are close.

    Closeness counts smoothly, by the largest |n . axis|^8, so that a tie between neighbouring candidates is broken by the better fit.
    """
    along = np.abs(normals.reshape(-1, 3) @ _FRAMES.reshape(-1, 3).T).reshape(-1, len(_FRAMES), 3)
    return _FRAMES[(along.max(-1) ** 8).sum(0).argmax()]


def box_room_scores(depth: np.ndarray, intrinsics: np.ndarray) -> dict[str, float]:
    """Scores of one depth map (h, w) in metres seen with intrinsics (3, 3) in pixels.

    axis_share: share of pixels whose normal is within 15 degrees of an axis of the room, higher is more room-like. roughness: median distance of
    these pixels from the plane (least squares) of all that face the same way, as a share of their depth, in per cent, averaged over the surfaces
    by pixels. floor_ceiling_degrees: angle between the planes of floor and ceiling, NaN where one of them has fewer than 16 pixels.
    Raises ValueError as `normals_from_depth` does.
    """
    normals, points = normals_from_depth(depth, intrinsics), unproject(depth, intrinsics)
    frame = room_frame(normals)
    along = normals @ frame.T
    near = np.abs(along) > _TOLERANCE
    planes, distances = {}, []
    for axis in range(3):
        for side in (1, -1):
            pixels = near[..., axis] & (along[..., axis] * side > 0)
            if pixels.sum() >= _LEAST:
                planes[axis, side], rough = _plane(points[pixels])
                distances.append((rough, int(pixels.sum())))
    floor, ceiling = planes.get((1, 1)), planes.get((1, -1))
    angle = np.nan if floor is None or ceiling is None else float(np.degrees(np.arccos(min(1.0, abs(floor @ ceiling)))))
    rough, weight = zip(*distances, strict=True) if distances else ((np.nan,), (1,))
    return {"axis_share": float(near.any(-1).mean()), "roughness": float(np.average(rough, weights=weight)), "floor_ceiling_degrees": angle}


def _plane(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Normal (3,) of the least-squares plane through points (n, 3), and their median distance from it in per cent of their depth."""
    centred = points - points.mean(0)
    normal = np.linalg.svd(centred, full_matrices=False)[2][2]
    return normal, float(100 * np.median(np.abs(centred @ normal) / points[:, 2]))
