"""Outdoor scenes with exact depth and normals: a street of a small town and its church, one scene per seed.

A road with pavements runs between lawns away from the camera, which stands on it at eye height. Houses with gabled roofs line both sides,
one church with nave and spired tower stands among them or at the road's end, with trees along the pavements, under a sky that
shades to the horizon and may show the sun. The sun lights everything by Lambert's law (no shadows) and haze pales what is far.

Depth ends at MAX_DEPTH: the sky has that depth, and it is not known there. Of `dag.data.raycast`, which it shares with other drawn
domains: a scene is a function of its seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dag.data.domain import Drawn
from dag.data.raycast import Uniform, in_chunks, normals, pixels, rays, rotation, slabs, to_bytes

MAX_DEPTH = 80.0  # metres
_HAZE = 110.0  # metres after which 1 - 1/e of a colour has gone over into the horizon's
_SUN = np.cos(np.radians(4.0))  # its disc, larger than life

# Muted, natural colours (linear RGB in 0..1) to which every scene adds a little of its own.
_PLASTER = [(0.80, 0.74, 0.62), (0.82, 0.80, 0.76), (0.74, 0.62, 0.50), (0.66, 0.42, 0.33), (0.70, 0.72, 0.68), (0.83, 0.72, 0.55)]
_ROOFS = [(0.52, 0.27, 0.19), (0.42, 0.22, 0.17), (0.34, 0.33, 0.35), (0.45, 0.33, 0.25)]
_STONE = [(0.72, 0.68, 0.60), (0.63, 0.60, 0.55), (0.80, 0.77, 0.72), (0.60, 0.45, 0.36)]
_SLATES = [(0.30, 0.33, 0.38), (0.36, 0.50, 0.44), (0.40, 0.25, 0.21)]
_LEAVES = [(0.24, 0.36, 0.16), (0.32, 0.42, 0.18), (0.18, 0.30, 0.17), (0.48, 0.40, 0.16)]
_LAWNS = [(0.36, 0.46, 0.22), (0.44, 0.48, 0.27), (0.30, 0.40, 0.22)]
_ROADS = [(0.40, 0.40, 0.41), (0.47, 0.46, 0.44), (0.34, 0.34, 0.36)]
_ZENITHS = [(0.34, 0.53, 0.80), (0.42, 0.60, 0.84), (0.55, 0.62, 0.70), (0.40, 0.46, 0.66)]
_HORIZONS = [(0.84, 0.89, 0.93), (0.92, 0.87, 0.78), (0.80, 0.83, 0.85)]

_HOUSES = 6  # three to each side
_NAVE, _TOWER = _HOUSES, _HOUSES + 1
_BUILDINGS = _HOUSES + 2
_TREES = 5
_GROUND, _SKY = -1, -2  # what a ray hit; buildings, trunks and crowns are counted from 0
_FLAT = 1e9  # a slope that cuts nothing


@dataclass
class Scenes:
    """Parameters of b scenes. Buildings: houses, nave, tower. What is absent has size zero."""

    eye: np.ndarray  # (b, 3) camera position; the road runs along z, its middle is x = 0
    rotation: np.ndarray  # (b, 3, 3) camera axes as columns, in scene coordinates
    tan_half_fov: np.ndarray  # (b,)
    sun: np.ndarray  # (b, 3) unit vector towards it
    sky: np.ndarray  # (b, 2, 3) colours at the zenith and at the horizon
    ground: np.ndarray  # (b, 3, 3) colours of road, pavement, lawn
    road: np.ndarray  # (b, 3) half the road's width, the pavement's outer edge, where the road ends
    centre: np.ndarray  # (b, k, 3) of a building's bounding box, which stands on the ground
    half: np.ndarray  # (b, k, 3)
    eaves: np.ndarray  # (b, k) height at which the roof begins
    sloped: np.ndarray  # (b, k, 2) whether the roof slopes along x, along z: one of them for a gable, both for a spire
    colour: np.ndarray  # (b, k, 2, 3) of walls and roof
    trunk: np.ndarray  # (b, j, 2, 3) centre and half size
    crown: np.ndarray  # (b, j, 2, 3) centre and half axes of an ellipsoid
    leaves: np.ndarray  # (b, j, 3)


def scenes(seeds: Sequence[int]) -> Scenes:
    """Draw the parameters of one scene per seed (non-negative integers)."""
    u = Uniform(seeds)
    b = len(u)
    width = u(2.6, 4.0)
    edge = width + u(1.4, 2.2)
    eye = np.stack([width * u(-0.8, 0.8), u(1.5, 1.9), np.zeros(b)], 1)
    yaw, pitch = np.radians(u(-24, 24)), np.radians(u(-3, 11))
    azimuth, elevation = u(0, 2 * np.pi), np.radians(u(18, 60))
    sun = np.stack([np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)], 1)
    church, front = _church(u, edge)
    houses = _houses(u, edge, church)
    centre, half, eaves, sloped, colour = (np.concatenate(parts, 1) for parts in zip(houses, church, strict=True))
    trunk, crown, leaves = _trees(u, edge)
    return Scenes(
        eye=eye,
        rotation=rotation(yaw, pitch),
        tan_half_fov=np.tan(np.radians(u(58, 84)) / 2),
        sun=sun,
        sky=np.stack([u.choice(_ZENITHS, 0.02), u.choice(_HORIZONS, 0.02)], 1),
        ground=np.stack([u.choice(_ROADS, 0.01), np.repeat(u(0.58, 0.72)[:, None], 3, 1), u.choice(_LAWNS)], 1),
        road=np.stack([width, edge, front], 1),
        centre=centre,
        half=half,
        eaves=eaves,
        sloped=sloped,
        colour=colour,
        trunk=trunk,
        crown=crown,
        leaves=leaves,
    )


def _standing(x, z, half_x, half_z, ridge) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half size (b, 3) of a bounding box on the ground."""
    return np.stack([x, ridge / 2, z], 1), np.stack([half_x, ridge / 2, half_z], 1)


def _church(u: Uniform, edge: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Nave and tower (centre, half, eaves, sloped, colour), and how far the road runs: to the church where that closes it."""
    place = (u() * 3).astype(int)  # left, right, ahead
    ahead, side = place == 2, np.where(place == 0, -1.0, 1.0)
    breadth, length, eaves, rise = u(4.0, 5.5), u(7.0, 10.5), u(6.0, 9.0), u(4.0, 6.5)
    along_z = ahead | (u() < 0.5)
    half_x, half_z = np.where(along_z, breadth, length), np.where(along_z, length, breadth)
    back = u(2.0, 7.0)
    x = np.where(ahead, u(-3.0, 3.0), side * (edge + back + half_x))
    z = np.where(ahead, u(28.0, 44.0), u(12.0, 30.0)) + half_z
    nave = _standing(x, z, half_x, half_z, eaves + rise)
    # The tower stands before the end of the nave that is nearer to the road, its wall in line with the nave's.
    t, t_eaves, t_rise = u(2.0, 2.9), eaves + rise + u(0.5, 7.0), u(3.0, 12.0)
    t_x = np.where(along_z, x + np.where(u() < 0.5, 0.0, 1.0) * (breadth - t) * np.where(u() < 0.5, -1, 1), x - side * (length + t))
    t_z = np.where(along_z, z - length - t, z)
    tower = _standing(t_x, t_z, t, t, t_eaves + t_rise)
    sloped = np.stack([np.stack([along_z, ~along_z], 1), np.ones((len(u), 2), bool)], 1)
    stone, slate = u.choice(_STONE), u.choice(_SLATES)
    colour = np.stack([np.stack([stone, slate], 1), np.stack([0.96 * stone, slate], 1)], 1)
    centre, half = (np.stack(pair, 1) for pair in zip(nave, tower, strict=True))
    return (centre, half, np.stack([eaves, t_eaves], 1), sloped, colour), np.where(ahead, z - half_z - 2 * t - 3, np.inf)


def _houses(u: Uniform, edge: np.ndarray, church: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Houses (centre, half, eaves, sloped, colour) one after the other along both sides, where the church leaves room."""
    columns = []
    low, high = (church[0] - church[1]).min(1), (church[0] + church[1]).max(1)
    for side in (-1.0, 1.0):
        end = u(3.0, 9.0)
        for _ in range(_HOUSES // 2):
            half_x, half_z, eaves, rise = u(3.0, 4.8), u(3.2, 5.5), u(2.8, 6.2), u(1.8, 3.6)
            x, z = side * (edge + u(1.2, 4.0) + half_x), end + half_z
            end = end + 2 * half_z + u(1.0, 7.0)
            clear = (x + half_x < low[:, 0] - 1) | (x - half_x > high[:, 0] + 1) | (z + half_z < low[:, 2] - 1) | (z - half_z > high[:, 2] + 1)
            centre, half = _standing(x, z, half_x, half_z, eaves + rise)
            along_z = u() < 0.5
            colour = np.stack([u.choice(_PLASTER), u.choice(_ROOFS)], 1)
            there = clear & (u() < 0.88)
            columns.append((centre, half * there[:, None], eaves, np.stack([along_z, ~along_z], 1), colour))
    return tuple(np.stack(part, 1) for part in zip(*columns, strict=True))


def _trees(u: Uniform, edge: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Trunks and crowns along the pavements: (b, j, 2, 3) each, and leaves (b, j, 3)."""
    columns = []
    for k in range(_TREES):
        there, side = (u() < 0.55)[:, None], np.where(u() < 0.5, -1.0, 1.0)
        x, z = side * (edge + u(0.2, 0.9)), 5.0 + 7.0 * k + u(0.0, 6.0)
        stem, thick, spread, tall = u(1.6, 2.4), u(0.12, 0.22), u(0.9, 1.7), u(1.1, 2.2)
        trunk = np.stack([np.stack([x, stem / 2, z], 1), there * np.stack([thick, stem / 2, thick], 1)], 1)
        crown = np.stack([np.stack([x, stem + 0.8 * tall, z], 1), there * np.stack([spread, tall, spread], 1)], 1)
        columns.append((trunk, crown, u.choice(_LEAVES)))
    return tuple(np.stack(part, 1) for part in zip(*columns, strict=True))


def render(seeds: Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Render one street per seed.

    Returns image (b, size, size, 3) uint8; depth (b, size, size) float32, metres along the optical axis, at most MAX_DEPTH; normals
    (b, size, size, 3) float32, unit length, in camera coordinates (x right, y up, z forward), facing the camera, of the sky (0, 0, -1);
    known (b, size, size) bool, False where less than half of a pixel is nearer than MAX_DEPTH: sky, and ground at the horizon.
    Each pixel is the mean of 2 x 2 rays (normals are normalised after it).
    """
    return in_chunks(_render, seeds, size)


def _render(seeds: Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    scene = scenes(seeds)
    directions = rays(scene.rotation, scene.tan_half_fov, size)
    t, solid, normal = _hit(scene, directions)
    colour = _colour(scene, directions, t, solid, normal)
    # Camera coordinates are products with the camera's axes, the columns of the rotation.
    facing = np.einsum("bij,ibn->bnj", scene.rotation.astype(np.float32), np.stack(normal))
    known = pixels((t < MAX_DEPTH).astype(np.float32)[..., None], size)[..., 0] >= 0.5
    depth = pixels(np.minimum(t, np.float32(MAX_DEPTH))[..., None], size)[..., 0]
    return to_bytes(colour, size), depth, normals(facing, size), known


def _hit(scene: Scenes, directions: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """First hit of every ray: depth t (infinite: the sky), what it hit, and three arrays of the surface's normal in scene coordinates."""
    inverse = [1 / d for d in directions]
    reach = [np.abs(i) for i in inverse]
    eye = scene.eye.astype(np.float32)
    down = directions[1] < 0
    t = np.where(down, -eye[:, 1, None] * inverse[1], np.float32(np.inf))
    solid = np.where(down, np.int8(_GROUND), np.int8(_SKY))
    # The sky faces the camera: its normal is the optical axis, reversed.
    normal = [np.where(down, np.float32(i == 1), -scene.rotation[:, i, 2, None].astype(np.float32)) for i in range(3)]

    def keep(closer: np.ndarray, enter: np.ndarray, index: int, towards: list[np.ndarray]) -> None:
        np.copyto(t, enter, where=closer)
        np.copyto(solid, np.int8(index), where=closer)
        for i in range(3):
            np.copyto(normal[i], towards[i], where=closer)

    boxes = [(scene.centre[:, k], scene.half[:, k], k) for k in range(_BUILDINGS)]
    boxes += [(scene.trunk[:, j, 0], scene.trunk[:, j, 1], _BUILDINGS + j) for j in range(_TREES)]
    for centre, half, index in boxes:
        if not half.any():
            continue
        near, enter, leave = slabs((centre - scene.eye).astype(np.float32), half.astype(np.float32), inverse, reach)
        closer = (enter < leave) & (enter > 0) & (enter < t)
        if not closer.any():
            continue
        face = [np.where(near[i] == enter, -np.sign(directions[i]), 0) for i in range(3)]
        if index < _BUILDINGS:
            enter, leave, face = _under_roof(scene, index, directions, enter, leave, face)
            closer = (enter < leave) & (enter > 0) & (enter < t)
        keep(closer, enter, index, face)
    for j in range(_TREES):
        if scene.crown[:, j, 1].any():
            keep(*_ellipsoid(scene.crown[:, j], eye, directions, t, _BUILDINGS + _TREES + j))
    return t, solid, normal


def _under_roof(scene: Scenes, k: int, directions, enter, leave, face) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """What is left of a ray's way through a building's bounding box below the slopes of its roof."""
    half, eaves = scene.half[:, k], scene.eaves[:, k]
    rise = 2 * half[:, 1] - eaves
    up = (eaves - scene.eye[:, 1]).astype(np.float32)[:, None]
    for which, axis in enumerate((0, 2)):
        sloped = scene.sloped[:, k, which] & (half[:, axis] > 0)
        if not sloped.any():
            continue
        # The plane through eaves and ridge, n . p = c with n = (rise, half width) / length in the plane of axis and height.
        length = np.where(sloped, np.hypot(rise, half[:, axis]), 1)
        steep, flat = (rise / length).astype(np.float32)[:, None], (half[:, axis] / length).astype(np.float32)[:, None]
        bound = np.where(sloped, rise * half[:, axis] / length, _FLAT).astype(np.float32)[:, None]
        centre = (scene.centre[:, k, axis] - scene.eye[:, axis]).astype(np.float32)[:, None]
        for side in (1, -1):
            across = side * steep * directions[axis] + flat * directions[1]
            at = (bound + side * steep * centre + flat * up) / np.where(np.abs(across) < 1e-6, np.float32(1e-6), across)
            first = (across < 0) & (at > enter)
            enter = np.where(first, at, enter)
            leave = np.where(across > 0, np.minimum(leave, at), leave)
            slope = [np.float32(0)] * 3
            slope[axis], slope[1] = side * steep, flat
            face = [np.where(first, slope[i], face[i]) for i in range(3)]
    return enter, leave, face


def _ellipsoid(crown: np.ndarray, eye: np.ndarray, directions, t, index: int) -> tuple[np.ndarray, np.ndarray, int, list[np.ndarray]]:
    """Where rays enter an ellipsoid (b, 2, 3) before t: in coordinates in which it is the unit sphere, |e + t d| = 1."""
    there = crown[:, 1].any(1)[:, None]
    axes = np.where(there, crown[:, 1], 1).astype(np.float32)
    e = [(eye[:, i] - crown[:, 0, i].astype(np.float32))[:, None] / axes[:, i, None] for i in range(3)]
    d = [directions[i] / axes[:, i, None] for i in range(3)]
    a, half_b, c = (sum(p[i] * q[i] for i in range(3)) for p, q in ((d, d), (e, d), (e, e)))
    inside = half_b * half_b - a * (c - 1)
    enter = (-half_b - np.sqrt(np.maximum(inside, 0))) / a
    closer = there & (inside > 0) & (enter > 0) & (enter < t)
    towards = [(e[i] + enter * d[i]) / axes[:, i, None] for i in range(3)]
    length = np.sqrt(sum(n * n for n in towards))
    return closer, enter, index, [n / length for n in towards]


def _colour(scene: Scenes, directions, t, solid, normal) -> np.ndarray:
    """What every ray sees (b, n, 3): the surface in sunlight through haze, or the sky."""
    b, n = t.shape
    zenith, horizon = (scene.sky[:, i].astype(np.float32)[:, None] for i in (0, 1))
    length = np.sqrt(sum(d * d for d in directions))
    height = np.clip(1.8 * directions[1] / length, 0, 1) ** 0.7
    sky = horizon + height[..., None] * (zenith - horizon)
    sun = scene.sun.astype(np.float32)[..., None]
    disc = sum(directions[i] * sun[:, i] for i in range(3)) / length > _SUN
    sky[disc] = (1.0, 0.97, 0.86)

    point = [scene.eye[:, i, None].astype(np.float32) + np.where(np.isfinite(t), t, 0) * directions[i] for i in range(3)]
    colour = _ground(scene, point)
    rows = np.arange(b)[:, None]
    walls, roofs = (scene.colour[:, :, i].astype(np.float32) for i in (0, 1))
    building = (solid >= 0) & (solid < _BUILDINGS)
    k = np.where(building, solid, 0)
    roof = normal[1] > 0.05
    paint = np.where(roof[..., None], roofs[rows, k], _wall(scene, point, normal, k, walls))
    colour = np.where(building[..., None], paint, colour)
    tree = solid >= _BUILDINGS
    j = np.where(tree, (solid - _BUILDINGS) % _TREES, 0)
    leaf = np.where((solid >= _BUILDINGS + _TREES)[..., None], scene.leaves.astype(np.float32)[rows, j], np.float32((0.33, 0.25, 0.18)))
    colour = np.where(tree[..., None], leaf, colour)

    light = 0.50 + 0.62 * np.maximum(sum(normal[i] * sun[:, i] for i in range(3)), 0)
    clear = np.exp(-np.minimum(t, MAX_DEPTH) / _HAZE)[..., None]
    lit = horizon + clear * (colour * light[..., None] - horizon)
    return np.where((solid == _SKY)[..., None], sky, lit).astype(np.float32)


def _ground(scene: Scenes, point: list[np.ndarray]) -> np.ndarray:
    """Colour (b, n, 3) of the ground under points: road with a broken line in its middle, pavements, lawn."""
    x, _, z = point
    width, edge, end = (scene.road[:, i, None].astype(np.float32) for i in range(3))
    beside = np.where(np.abs(x) < width, 0, np.where(np.abs(x) < edge, 1, 2))
    beside = np.where(z > end, 2, beside)
    colour = scene.ground.astype(np.float32)[np.arange(len(x))[:, None], beside]
    line = (beside == 0) & (np.abs(x) < 0.09) & (z % 4 < 2)
    colour[line] = 0.85
    return colour


def _wall(scene: Scenes, point: list[np.ndarray], normal: list[np.ndarray], k: np.ndarray, walls: np.ndarray) -> np.ndarray:
    """Colour (b, n, 3) of a building's wall with its windows: storeys of houses, tall windows of the nave, openings high in the tower."""
    rows = np.arange(len(k))[:, None]
    centre, eaves = scene.centre.astype(np.float32)[rows, k], scene.eaves.astype(np.float32)[rows, k]
    half = scene.half.astype(np.float32)[rows, k]
    across = np.abs(normal[0]) > 0.5  # the wall runs along z
    along = np.where(across, point[2] - centre[..., 2], point[0] - centre[..., 0])
    reach = np.where(across, half[..., 2], half[..., 0])
    y = point[1]
    beside = np.abs(along) < reach - 0.4

    def row(spacing: float, wide: float) -> np.ndarray:
        return np.abs((along / spacing + 0.5) % 1 - 0.5) * spacing < wide

    house = row(2.3, 0.5) & (y % 2.8 > 1.0) & (y % 2.8 < 2.2) & (y < eaves - 0.2)
    nave = row(3.2, 0.55) & (y > 2.0) & (y < eaves - 1.2)
    tower = (np.abs(along) < 0.7) & (y > eaves - 3.4) & (y < eaves - 1.0)
    window = beside & np.select([k == _NAVE, k == _TOWER], [nave, tower], house)
    colour = walls[rows, k]
    colour[window] = (0.24, 0.28, 0.34)
    return colour


def dataset(size: int, split: None = None) -> Drawn:
    """The domain `streets` (see `dag.data.domain`): a street of size x size pixels for every seed."""
    return Drawn(render, size)
