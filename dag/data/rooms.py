"""Indoor scenes with exact depth and normals: a vectorised NumPy ray-caster, one scene per seed.

A scene is a box room seen by a pinhole camera that stands inside it. The room has its own size, palette, floor
pattern, rug, windows, door and pictures, three to six pieces of box furniture, and one ceiling lamp that lights
everything by Lambert's law (no shadows). All lengths are metres; x points right, y up, z into the room.

Of `dag.data.raycast`, which it shares with other drawn domains: a scene is a function of its seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dag.data.domain import Drawn
from dag.data.raycast import Uniform, in_chunks, normals, pixels, rays, rotation, slabs, to_bytes

MAX_DEPTH = 10.0  # metres: no room is deeper

# Muted, natural colours (linear RGB in 0..1) to which every scene adds a little of its own.
_WALLS = [(0.80, 0.77, 0.71), (0.74, 0.75, 0.74), (0.69, 0.72, 0.66), (0.66, 0.71, 0.75), (0.79, 0.70, 0.62), (0.76, 0.74, 0.62), (0.62, 0.62, 0.63)]
_FLOORS = [(0.50, 0.37, 0.25), (0.61, 0.49, 0.35), (0.38, 0.28, 0.20), (0.55, 0.54, 0.51), (0.66, 0.60, 0.51), (0.43, 0.40, 0.38)]
_FABRICS = [(0.33, 0.40, 0.48), (0.43, 0.48, 0.38), (0.58, 0.34, 0.28), (0.60, 0.57, 0.52), (0.36, 0.35, 0.37), (0.68, 0.58, 0.42), (0.45, 0.33, 0.40)]
_WOODS = [(0.46, 0.32, 0.20), (0.60, 0.45, 0.29), (0.30, 0.21, 0.15), (0.76, 0.74, 0.70), (0.40, 0.38, 0.36)]

# Furniture by kind, in metres: width along the wall, depth away from it, bottom and top of the main box; then the second
# box as shares of the main one (width, depth) with its own bottom and top. Rows: smallest and largest value.
_KINDS = ("wardrobe", "chest", "bed", "sofa", "desk")
_MAIN = np.array(
    [
        [[0.8, 0.50, 0.0, 1.7], [1.4, 0.65, 0.0, 2.1]],
        [[0.7, 0.40, 0.0, 0.6], [1.3, 0.55, 0.0, 1.0]],
        [[1.2, 1.80, 0.0, 0.40], [1.8, 2.00, 0.0, 0.55]],
        [[1.4, 0.80, 0.0, 0.38], [2.0, 0.95, 0.0, 0.46]],
        [[1.0, 0.55, 0.66, 0.74], [1.5, 0.70, 0.66, 0.74]],
    ]
)
_SECOND = np.array(
    [
        [[1.0, 1.0, 0.0, 0.08], [1.0, 1.0, 0.0, 0.08]],  # plinth, in the second colour
        [[0.2, 0.5, 0.6, 1.1], [0.35, 0.6, 0.6, 1.4]],  # something standing on it
        [[1.0, 0.05, 0.0, 0.85], [1.0, 0.05, 0.0, 1.15]],  # headboard
        [[1.0, 0.30, 0.0, 0.75], [1.0, 0.30, 0.0, 0.90]],  # back rest
        [[0.35, 0.9, 0.0, 0.66], [0.35, 0.9, 0.0, 0.66]],  # drawers below the top
    ]
)


@dataclass
class Scenes:
    """Parameters of b scenes. Boxes and patches are padded to the same count; an absent one has size zero."""

    room: np.ndarray  # (b, 3) width, height, depth
    eye: np.ndarray  # (b, 3) camera position
    rotation: np.ndarray  # (b, 3, 3) camera axes as columns, in room coordinates
    tan_half_fov: np.ndarray  # (b,)
    lamp: np.ndarray  # (b, 3)
    surfaces: np.ndarray  # (b, 3, 3) colours of floor, walls, ceiling
    floor: dict[str, np.ndarray]  # pattern, rug
    box_centre: np.ndarray  # (b, k, 3)
    box_half: np.ndarray  # (b, k, 3)
    box_colour: np.ndarray  # (b, k, 3); the last box is the lamp
    patches: dict[str, np.ndarray]  # rectangles on walls: wall, u, v extents, colour, frame, glow


def scenes(seeds: Sequence[int]) -> Scenes:
    """Draw the parameters of one scene per seed (non-negative integers)."""
    u = Uniform(seeds)
    b = len(u)
    room = np.stack([u(3.2, 6.0), u(2.4, 3.0), u(3.6, 7.0)], 1)
    width, height, depth = room.T
    eye = np.stack([width * u(0.3, 0.7), u(1.3, 1.75), u(0.15, 0.6)], 1)
    # The camera looks across the room: more to the right the further left it stands.
    yaw = np.radians(u(-22, 22)) - 0.5 * (eye[:, 0] / width - 0.5)
    pitch = np.radians(u(-14, 0))
    surfaces = np.stack([u.choice(_FLOORS), u.choice(_WALLS, 0.02), np.repeat(u(0.82, 0.92)[:, None], 3, 1)], 1)
    floor = {
        "pattern": (u() * 3).astype(int),  # plain, planks, tiles
        "contrast": u(0.08, 0.22),
        "tile": u(0.35, 0.6),
        "rug": np.stack([width * u(0.15, 0.35), width * u(0.6, 0.85), depth * u(0.3, 0.45), depth * u(0.6, 0.8)], 1),
        "rug_there": u() < 0.5,
        "rug_colour": u.choice(_FABRICS),
    }
    lamp = np.stack([width * u(0.35, 0.65), height - 0.35, depth * u(0.4, 0.7)], 1)
    centre, half, colour = _furniture(u, room)
    lamp_half = np.stack([u(0.12, 0.25), np.full(b, 0.06), u(0.12, 0.25)], 1)
    return Scenes(
        room=room,
        eye=eye,
        rotation=rotation(yaw, pitch),
        tan_half_fov=np.tan(np.radians(u(58, 82)) / 2),
        lamp=lamp,
        surfaces=surfaces,
        floor=floor,
        box_centre=np.concatenate([centre, (lamp + [0, 0.29, 0])[:, None]], 1),
        box_half=np.concatenate([half, lamp_half[:, None]], 1),
        box_colour=np.concatenate([colour, np.full((b, 1, 3), 1.0)], 1),
        patches=_patches(u, room),
    )


def _furniture(u: Uniform, room: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two boxes for each of six places along the walls, three to six of which are taken: centres, half sizes, colours."""
    b = len(room)
    width, _, depth = room.T
    order = np.argsort(u(count=6), axis=1).argsort(axis=1)
    taken = order < (3 + (u() * 4).astype(int))[:, None]
    boxes = []
    # A place is a wall and a stretch of it: two at the back, two on either side, clear of the camera and of each other.
    places = [("back", 0.02, 0.48), ("back", 0.52, 0.98), ("left", 0.2, 0.42), ("left", 0.42, 0.64), ("right", 0.2, 0.42), ("right", 0.42, 0.64)]
    for place, (wall, start, end) in enumerate(places):
        along = width if wall == "back" else depth
        kind = (u() * len(_KINDS)).astype(int)
        if wall != "back":
            kind = np.where(kind == 2, 1, kind)  # a bed would reach across the room
        main = _MAIN[kind, 0] + (_MAIN[kind, 1] - _MAIN[kind, 0]) * u(count=4)
        second = _SECOND[kind, 0] + (_SECOND[kind, 1] - _SECOND[kind, 0]) * u(count=4)
        w = np.minimum(main[:, 0], (end - start) * along)
        d = np.minimum(main[:, 1], 0.42 * depth if wall == "back" else 0.28 * width)
        position = start * along + w / 2 + u() * ((end - start) * along - w)
        shift = np.where((kind == 1) | (kind == 4), u(-0.3, 0.3), 0.0) * w
        wood, fabric = u.choice(_WOODS), u.choice(_FABRICS)
        soft = ((kind == 2) | (kind == 3))[:, None]
        for extent, where, colour in [
            ((w, d, main[:, 2], main[:, 3]), position, np.where(soft, fabric, wood)),
            ((w * second[:, 0], d * second[:, 1], second[:, 2], second[:, 3]), position + shift, np.where(soft, 0.8 * fabric, 0.85 * wood)),
        ]:
            boxes.append(_against_wall(wall, room, extent, where, taken[:, place]) + (colour,))
    centre, half, colour = (np.stack(part, 1) for part in zip(*boxes, strict=True))
    assert centre.shape == (b, 12, 3)
    return centre, half, colour


def _against_wall(wall, room, extent, position, taken):
    """Centre and half size of a box of extent (width, depth, bottom, top) that stands against a wall at a position along it."""
    w, d, bottom, top = extent
    y, y_half = (bottom + top) / 2, (top - bottom) / 2
    if wall == "back":
        centre, half = (position, y, room[:, 2] - d / 2), (w / 2, y_half, d / 2)
    else:
        x = d / 2 if wall == "left" else room[:, 0] - d / 2
        centre, half = (x, y, position), (d / 2, y_half, w / 2)
    return np.stack(centre, 1), np.stack(half, 1) * taken[:, None]


def _patches(u: Uniform, room: np.ndarray) -> dict[str, np.ndarray]:
    """Rectangles painted on the walls: a window at the back, a window and a door at a side, a picture.

    `wall` is 0 left, 1 right, 2 back; u runs along the wall, v is the height.
    """
    b = len(room)
    width, height, depth = room.T
    side = (u() < 0.5).astype(int)
    sky = np.stack([u(0.72, 0.86), u(0.82, 0.90), u(0.90, 0.98)], 1)
    rows = []

    def add(wall, there, centre, w, low, high, colour, frame, glow):
        scale = np.where(there, 1.0, 0.0)
        rows.append((wall, np.stack([centre - scale * w / 2, centre + scale * w / 2, low, high], 1), colour, frame, np.full(b, glow)))

    add(np.full(b, 2), u() < 0.6, width * u(0.25, 0.75), u(0.9, 1.7), u(0.8, 1.1), height - u(0.25, 0.5), sky, np.full(b, 0.07), 1.0)
    add(side, u() < 0.5, depth * u(0.5, 0.75), u(0.9, 1.6), u(0.8, 1.1), height - u(0.25, 0.5), sky, np.full(b, 0.07), 1.0)
    add(1 - side, u() < 0.5, depth * u(0.35, 0.8), u(0.8, 0.95), np.zeros(b), u(1.95, 2.05), u.choice(_WOODS), np.full(b, 0.06), 0.0)
    add(
        np.where(u() < 0.5, 2, 1 - side),
        u() < 0.5,
        np.where(u() < 0.5, 0.2, 0.8) * width,
        u(0.4, 0.8),
        u(1.3, 1.5),
        u(1.8, 2.0),
        u.choice(_FABRICS),
        np.full(b, 0.04),
        0.0,
    )
    wall, extent, colour, frame, glow = (np.stack(part, 1) for part in zip(*rows, strict=True))
    return {"wall": wall, "extent": extent, "colour": colour, "frame": frame, "glow": glow}


def render(seeds: Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Render one room per seed.

    Returns image (b, size, size, 3) uint8; depth (b, size, size) float32, metres along the optical axis; normals
    (b, size, size, 3) float32, unit length, in camera coordinates (x right, y up, z forward), facing the camera.
    Each pixel is the mean of 2 x 2 rays (normals are normalised after it).
    """
    return in_chunks(_render, seeds, size)


def _render(seeds: Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scene = scenes(seeds)
    directions = rays(scene.rotation, scene.tan_half_fov, size)
    t, axis, box = _hit(scene, directions)
    point = [scene.eye[:, i, None].astype(np.float32) + t * directions[i] for i in range(3)]
    sign = np.select([axis == 0, axis == 1, axis == 2], [-np.sign(directions[i]) for i in range(3)]).astype(np.float32)
    colour, glow = _material(scene, point, axis, box)
    colour *= np.maximum(_lambert(scene, point, axis, sign), glow)[..., None]
    # The normal is +-1 on one room axis, so its camera coordinates are one row of the rotation.
    normal = scene.rotation.astype(np.float32)[np.arange(len(t))[:, None], axis] * sign[..., None]
    return to_bytes(colour, size), pixels(t[..., None], size)[..., 0], normals(normal, size)


def _hit(scene: Scenes, directions: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First hit of every ray: depth t, axis of the surface's normal, index of the box (-1: the room itself)."""
    inverse = [1 / d for d in directions]
    eye, room = scene.eye.astype(np.float32), scene.room.astype(np.float32)
    # From inside, the room is left through the nearest of the three planes the ray runs towards.
    exits = [(np.where(directions[i] > 0, room[:, i, None], 0) - eye[:, i, None]) * inverse[i] for i in range(3)]
    t = np.minimum(np.minimum(exits[0], exits[1]), exits[2])
    axis = np.where(exits[1] == t, 1, np.where(exits[0] == t, 0, 2))
    box = np.full(t.shape, -1, np.int8)
    reach = [np.abs(i) for i in inverse]
    for k in range(scene.box_half.shape[1]):
        centre = (scene.box_centre[:, k] - scene.eye).astype(np.float32)
        half = scene.box_half[:, k].astype(np.float32)
        if not half.any():
            continue
        near, enter, leave = slabs(centre, half, inverse, reach)
        hit = (enter < leave) & (enter > 0) & (enter < t)
        if not hit.any():
            continue
        np.copyto(t, enter, where=hit)
        np.copyto(box, np.int8(k), where=hit)
        np.copyto(axis, np.where(near[1] == enter, 1, np.where(near[0] == enter, 0, 2)), where=hit)
    return t, axis, box


def _material(scene: Scenes, point: list[np.ndarray], axis: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour (b, n, 3) and self-emission (b, n) of the surface at every hit point."""
    b, n = axis.shape
    room = scene.room.astype(np.float32)
    is_room = box < 0
    is_floor = is_room & (axis == 1) & (point[1] < room[:, 1, None] / 2)
    surface = np.where(is_floor, 0, np.where(axis == 1, 2, 1))
    palette = np.concatenate([scene.surfaces, scene.box_colour], 1).astype(np.float32)
    colour = palette[np.arange(b)[:, None], np.where(is_room, surface, box + 3)]
    glow = np.where(box == scene.box_half.shape[1] - 1, np.float32(1), np.float32(0))

    x, _, z = point
    f = {k: v[:, None] if v.ndim == 1 else v for k, v in scene.floor.items()}
    planks = np.floor(x / 0.3) * 0.754877666 % 1 - 0.5  # a pseudo-random tone for every plank
    tiles = (np.floor(x / f["tile"]) + np.floor(z / f["tile"])) % 2 - 0.5
    tone = 1 + f["contrast"] * np.select([f["pattern"] == 1, f["pattern"] == 2], [planks, tiles], 0.0)
    colour *= np.where(is_floor, tone, 1).astype(np.float32)[..., None]
    rug = f["rug"]
    on_rug = is_floor & f["rug_there"] & (x > rug[:, :1]) & (x < rug[:, 1:2]) & (z > rug[:, 2:3]) & (z < rug[:, 3:])
    scene_of = np.nonzero(on_rug)[0]
    colour[on_rug] = scene.floor["rug_colour"][scene_of]

    wall = np.where(is_room & (axis == 0), np.where(x < room[:, :1] / 2, 0, 1), np.where(is_room & (axis == 2), 2, -1))
    along = np.where(wall == 2, x, z)
    p = scene.patches
    for k in range(p["wall"].shape[1]):
        _paint(colour, glow, wall, along, point[1], {name: value[:, k] for name, value in p.items()})
    return colour, glow


def _paint(colour, glow, wall, along, height, patch) -> None:
    """Paint one rectangle per scene on its wall, in place: a pale frame around the patch's own colour."""
    u0, u1, v0, v1 = (patch["extent"][:, i, None] for i in range(4))
    scene, ray = np.nonzero((wall == patch["wall"][:, None]) & (along > u0) & (along < u1) & (height > v0) & (height < v1))
    if not len(scene):
        return
    u0, u1, v0, v1 = patch["extent"][scene].T
    u, v = along[scene, ray], height[scene, ray]
    edge = np.minimum(np.minimum(u - u0, u1 - u), np.minimum(v - v0, v1 - v))
    cross = np.where(patch["glow"][scene] > 0, np.abs(u - (u0 + u1) / 2), np.inf)  # windows have a mullion
    frame = np.minimum(edge, cross) < patch["frame"][scene]
    colour[scene, ray] = np.where(frame[:, None], 0.82, patch["colour"][scene])
    glow[scene, ray] = np.where(frame, glow[scene, ray], patch["glow"][scene])


def _lambert(scene: Scenes, point: list[np.ndarray], axis: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """Ambient light plus the lamp's, which falls with the angle and, slowly, with distance."""
    to_lamp = [scene.lamp[:, i, None].astype(np.float32) - point[i] for i in range(3)]
    squared = to_lamp[0] ** 2 + to_lamp[1] ** 2 + to_lamp[2] ** 2
    facing = np.select([axis == 0, axis == 1, axis == 2], to_lamp) * sign
    cosine = np.maximum(facing, 0) / np.sqrt(squared)
    return (0.42 + 0.75 * cosine / (1 + 0.06 * squared)).astype(np.float32)


def dataset(size: int, split: None = None) -> Drawn:
    """The domain `rooms` (see `dag.data.domain`): a room of size x size pixels for every seed."""
    return Drawn(render, size)
