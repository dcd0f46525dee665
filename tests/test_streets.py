"""The streets against geometry worked out independently: unprojected depth, solids as half-spaces, brute-force visibility."""

import numpy as np
import pytest

from dag.data import raycast, streets
from dag.data.domain import check, dataset
from dag.data.geometry import camera

SEEDS = list(range(40, 58))
SIZE = 24


@pytest.fixture(scope="module")
def exact():
    """One ray per pixel through its centre: scenes, hit points (b, n, 3) and normals (b, n, 3) in scene coordinates, depth (b, n), rays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raycast, "SUPERSAMPLING", 1)
        _, depth, normals, known = streets.render(SEEDS, SIZE)
    scene = streets.scenes(SEEDS)
    row, column = np.mgrid[:SIZE, :SIZE] + 0.5
    pixels = np.stack([column, row, np.ones_like(row)]).reshape(3, -1)
    rays = (np.linalg.inv(camera(scene.tan_half_fov, SIZE)) @ pixels).transpose(0, 2, 1)
    rays[..., 1] *= -1  # rows run downwards, y upwards
    rays = rays @ scene.rotation.transpose(0, 2, 1)
    depth = depth.reshape(len(SEEDS), -1).astype(float)
    points = scene.eye[:, None] + depth[..., None] * rays
    return scene, points, normals.reshape(len(SEEDS), -1, 3) @ scene.rotation.transpose(0, 2, 1), depth, known.reshape(depth.shape), rays


def solids(scene, b):
    """Every solid of a scene as a function of points (..., 3): below 0 inside, 0 on its surface, about metres outside."""
    found = [lambda p: p[..., 1]]
    for k in range(streets._BUILDINGS):
        if not scene.half[b, k].any():
            continue

        def building(p, centre=scene.centre[b, k], half=scene.half[b, k], eaves=scene.eaves[b, k], sloped=scene.sloped[b, k]):
            off = np.abs(p - centre)
            worst = (off - half).max(-1)
            for axis, there in zip((0, 2), sloped, strict=True):
                rise = 2 * half[1] - eaves
                # The roof's height above a point that lies `off` from the ridge falls from the ridge to the eaves.
                below = p[..., 1] - (2 * half[1] - rise * off[..., axis] / half[axis])
                worst = np.maximum(worst, below * half[axis] / np.hypot(rise, half[axis])) if there else worst
            return worst

        found.append(building)
    for centre, half in scene.trunk[b][scene.trunk[b, :, 1].any(-1)]:
        found.append(lambda p, centre=centre, half=half: (np.abs(p - centre) - half).max(-1))
    for centre, axes in scene.crown[b][scene.crown[b, :, 1].any(-1)]:
        found.append(lambda p, centre=centre, axes=axes: (np.linalg.norm((p - centre) / axes, axis=-1) - 1) * axes.min())
    return found


def test_shapes_types_and_ranges():
    image, depth, normals, known = streets.render(SEEDS, 32)
    assert (image.shape, image.dtype) == ((len(SEEDS), 32, 32, 3), np.uint8)
    assert (depth.shape, depth.dtype) == ((len(SEEDS), 32, 32), np.float32)
    assert (normals.shape, normals.dtype) == ((len(SEEDS), 32, 32, 3), np.float32)
    assert known.dtype == bool
    assert depth.min() > 1
    assert depth.max() == streets.MAX_DEPTH
    assert 0.3 < known.mean() < 0.9  # there is a sky, and something under it
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-5)


def test_a_scene_depends_on_its_seed_alone():
    together = streets.render(SEEDS, 16)
    for i in (0, 7, 8):
        for all_of_them, alone in zip(together, streets.render([SEEDS[i]], 16), strict=True):
            np.testing.assert_array_equal(all_of_them[i], alone[0])


def test_points_lie_on_a_surface_and_are_the_first_that_their_ray_meets(exact):
    scene, points, _, depth, known, _ = exact
    for b in range(len(SEEDS)):
        inside = solids(scene, b)
        at = np.min([solid(points[b]) for solid in inside], 0)
        assert np.abs(at[known[b]]).max() < 2e-3
        path = scene.eye[b] + np.linspace(0, 0.99, 60)[:, None, None] * (points[b] - scene.eye[b])
        assert min(solid(path).min() for solid in inside) > -2e-3
        assert (depth[b][~known[b]] == streets.MAX_DEPTH).all()


def test_normals_are_the_gradient_of_the_surface(exact):
    """Away from edges, by central differences of how far a point is inside its solid."""
    scene, points, normals, _, known, _ = exact
    compared, step = 0, 1e-3
    for b in range(len(SEEDS)):
        values = np.array([solid(points[b]) for solid in solids(scene, b)])
        owner = np.abs(values).argmin(0)
        shifts = step * np.eye(3)
        for k, solid in enumerate(solids(scene, b)):
            mine = known[b] & (owner == k)
            slope = np.stack([solid(points[b][mine] + s) - solid(points[b][mine] - s) for s in shifts], -1) / (2 * step)
            length = np.linalg.norm(slope, axis=-1)
            smooth = length > 0.5  # not at a corner, where one side is met on either side of the point
            agree = (slope[smooth] / length[smooth, None] * normals[b][mine][smooth]).sum(-1)
            # An edge runs through some of the steps.
            assert (agree > 0.999).mean() > 0.97 if smooth.any() else True
            compared += smooth.sum()
    assert compared > 1000


def test_normals_face_the_camera(exact):
    _, _, normals, _, known, rays = exact
    assert ((rays * normals).sum(-1) < 1e-6)[known].all()


def test_there_is_one_church_and_it_stands_clear_of_houses():
    scene = streets.scenes(range(300))
    nave, tower = streets._NAVE, streets._TOWER
    assert (scene.half[:, [nave, tower]] > 0).all()
    assert (scene.half[:, tower, 1] > scene.half[:, nave, 1]).all()  # the tower rises above the nave
    gap = np.abs(scene.centre[:, :nave, None] - scene.centre[:, None, [nave, tower]]) - scene.half[:, :nave, None] - scene.half[:, None, [nave, tower]]
    there = scene.half[:, :nave].any(-1)
    assert (gap[..., [0, 2]].max(-1).min(-1)[there] > 0).all()
    assert there.mean() > 0.5


def test_the_camera_stands_on_the_road_and_in_the_open():
    scene = streets.scenes(range(300))
    assert (np.abs(scene.eye[:, 0]) < scene.road[:, 0]).all()
    for b in range(300):
        assert min(solid(scene.eye[b]) for solid in solids(scene, b)) > 0.3


def test_the_domain_knows_where_depth_is_unknown():
    check({"name": "streets", "size": 16}, {"labels": [0, 4], "prior": [4, 4]})
    pictures = dataset({"name": "streets", "size": 16}, None).squares(np.array([3, 9]), 16)
    image, depth, _, known = streets.render([3, 9], 16)
    np.testing.assert_array_equal(pictures.images, image)
    np.testing.assert_array_equal(pictures.depth, depth)
    np.testing.assert_array_equal(pictures.valid, known)
    assert dataset({"name": "rooms", "size": 16}, None).squares(np.array([3]), 16).valid is None
