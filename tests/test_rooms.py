"""The ray-caster against geometry worked out independently: unprojected depth, brute-force visibility, area averages."""

import numpy as np
import pytest

from dag.data import raycast, rooms
from dag.data.geometry import camera

SEEDS = [0, 1, 2, 3, 5, 8, 13, 21, 34]  # nine: one more than the ray-caster traces together
SIZE = 24


@pytest.fixture(scope="module")
def drawn():
    return rooms.render(SEEDS, 32)


@pytest.fixture(scope="module")
def exact():
    """One ray per pixel through its centre, so that depth and normal are those of a single point.

    Returns the scenes' parameters, the hit points (b, n, 3) in room coordinates, the rays (b, n, 3) and normals (b, n, 3) in camera coordinates.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raycast, "SUPERSAMPLING", 1)
        _, depth, normals = rooms.render(SEEDS, SIZE)
    scene = rooms.scenes(SEEDS)
    row, column = np.mgrid[:SIZE, :SIZE] + 0.5
    pixels = np.stack([column, row, np.ones_like(row)]).reshape(3, -1)
    rays = (np.linalg.inv(camera(scene.tan_half_fov, SIZE)) @ pixels).transpose(0, 2, 1)
    rays[..., 1] *= -1  # rows run downwards, y upwards
    points = scene.eye[:, None] + depth.reshape(len(SEEDS), -1, 1) * (rays @ scene.rotation.transpose(0, 2, 1))
    return scene, points, rays, normals.reshape(len(SEEDS), -1, 3)


def test_shapes_types_and_ranges(drawn):
    image, depth, normals = drawn
    assert (image.shape, image.dtype) == ((9, 32, 32, 3), np.uint8)
    assert (depth.shape, depth.dtype) == ((9, 32, 32), np.float32)
    assert (normals.shape, normals.dtype) == ((9, 32, 32, 3), np.float32)
    assert (image.reshape(9, -1).std(axis=1) > 10).all()
    assert depth.min() > 0
    assert depth.max() < rooms.MAX_DEPTH
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-5)


def test_a_scene_depends_on_its_seed_alone(drawn):
    for i in (0, 7, 8):
        for together, alone in zip(drawn, rooms.render([SEEDS[i]], 32), strict=True):
            np.testing.assert_array_equal(together[i], alone[0])
    shuffled = rooms.render(SEEDS[::-1], 32)
    for forward, backward in zip(drawn, shuffled, strict=True):
        np.testing.assert_array_equal(forward, backward[::-1])


@pytest.mark.parametrize("size", [1, 7, 50])
def test_any_size(size):
    image, depth, normals = rooms.render([4, 5], size)
    assert image.shape == normals.shape == (2, size, size, 3)
    assert depth.shape == (2, size, size)


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_without_pixels_is_refused(size):
    with pytest.raises(ValueError, match=f"size is {size}, expected a positive"):
        rooms.render([0], size)


def test_a_pixel_is_the_mean_of_its_rays(drawn, monkeypatch):
    monkeypatch.setattr(raycast, "SUPERSAMPLING", 1)
    image, depth, normals = (_area_average(part.astype(np.float64)) for part in rooms.render(SEEDS, 64))
    assert np.abs(drawn[0] - image).max() <= 1  # each of the two is rounded to whole levels
    np.testing.assert_allclose(drawn[1], depth, rtol=1e-5)
    np.testing.assert_allclose(drawn[2], normals / np.linalg.norm(normals, axis=-1, keepdims=True), atol=1e-5)


def test_a_larger_picture_shows_the_same_scene(drawn):
    image, depth, _ = (_area_average(part.astype(np.float64)) for part in rooms.render(SEEDS, 64))
    assert np.abs(drawn[0] - image).mean() < 2  # levels of 255: four rays per pixel against sixteen
    assert np.median(np.abs(drawn[1] / depth - 1)) < 1e-3
    other = np.roll(image, 1, axis=0)
    assert np.abs(drawn[0] - other).mean() > 10


def test_points_lie_on_the_stated_surface(exact):
    scene, points, _, normals = exact
    normals = normals @ scene.rotation.transpose(0, 2, 1)  # to room coordinates
    axis = np.abs(normals).argmax(-1)
    sign = np.take_along_axis(normals, axis[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.abs(sign), 1, atol=1e-5)  # every surface is parallel to the room's axes
    in_view = set()
    for b in range(len(SEEDS)):
        assert _distance_to_surface(scene, b, points[b], axis[b], np.sign(sign[b])).max() < 1e-4
        on_wall = _on_room(scene.room[b], points[b], axis[b], np.sign(sign[b]))
        in_view |= set(axis[b][on_wall])
    assert in_view == {0, 1, 2}  # the scenes show side walls, floors or ceilings, and back walls


def test_points_are_the_first_that_their_ray_meets(exact):
    scene, points, _, _ = exact
    for b in range(len(SEEDS)):
        along = np.linspace(0, 0.99, 34)[:, None, None]
        path = scene.eye[b] + along * (points[b] - scene.eye[b])
        assert (path > 0).all()
        assert (path < scene.room[b]).all()
        for centre, half in zip(scene.box_centre[b], scene.box_half[b], strict=True):
            if half.any():
                assert not (np.abs(path - centre) < half - 1e-3).all(-1).any()


def test_normals_face_the_camera(exact):
    _, _, rays, normals = exact
    assert ((rays * normals).sum(-1) < 0).all()


def test_camera_axes_and_field_of_view():
    scene = rooms.scenes(SEEDS)
    np.testing.assert_allclose(scene.rotation @ scene.rotation.transpose(0, 2, 1), np.tile(np.eye(3), (9, 1, 1)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(scene.rotation), 1)
    intrinsics = camera(scene.tan_half_fov, 40)
    np.testing.assert_allclose(intrinsics @ [0, 0, 1], np.tile([20, 20, 1], (9, 1)))  # the optical axis meets the picture's centre
    edge = np.stack([scene.tan_half_fov, np.zeros(9), np.ones(9)], 1)
    np.testing.assert_allclose(np.einsum("bij,bj->bi", intrinsics, edge)[:, 0], 40)  # and half the field of view its rim


def test_depth_of_the_centre_is_a_distance():
    """Along the optical axis, depth is the plain distance to the first surface: of an odd picture's middle pixel, by one ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raycast, "SUPERSAMPLING", 1)
        depth = rooms.render(SEEDS, 5)[1][:, 2, 2]
    scene = rooms.scenes(SEEDS)
    for b, distance in enumerate(depth):
        path = scene.eye[b] + np.linspace(0, 10, 20001)[:, None] * scene.rotation[b, :, 2]
        solid = (path <= 0).any(-1) | (path >= scene.room[b]).any(-1)
        for centre, half in zip(scene.box_centre[b], scene.box_half[b], strict=True):
            solid |= (np.abs(path - centre) < half).all(-1)
        assert distance == pytest.approx(np.argmax(solid) * 10 / 20000, abs=1e-3)


def test_disjoint_seeds_give_different_scenes():
    image, depth, _ = rooms.render(range(1000, 1050), 16)
    assert len(np.unique(image.reshape(50, -1), axis=0)) == len(np.unique(depth.reshape(50, -1), axis=0)) == 50


def test_rooms_are_furnished():
    scene = rooms.scenes(range(200))
    pieces = scene.box_half[:, :12].reshape(200, 6, 2, 3).any(axis=(2, 3)).sum(1)
    assert set(pieces) == {3, 4, 5, 6}


def _area_average(values: np.ndarray) -> np.ndarray:
    b, height, width, *rest = values.shape
    return values.reshape(b, height // 2, 2, width // 2, 2, *rest).mean((2, 4))


def _on_room(room, points, axis, sign) -> np.ndarray:
    """Whether points (n, 3) lie on the room's inner face whose normal is `sign` along `axis`."""
    coordinate = np.take_along_axis(points, axis[:, None], 1)[:, 0]
    return np.abs(coordinate - np.where(sign > 0, 0, room[axis])) < 1e-4


def _distance_to_surface(scene, b, points, axis, sign) -> np.ndarray:
    """Distance (n,) of points (n, 3) to the nearest face, of the room or a box, that has the stated normal."""
    rows = np.arange(len(points))
    plane = np.where(sign > 0, 0, scene.room[b][axis])
    outside = np.maximum(np.maximum(-points, points - scene.room[b]), 0).max(-1)
    nearest = np.maximum(np.abs(points[rows, axis] - plane), outside)
    for centre, half in zip(scene.box_centre[b], scene.box_half[b], strict=True):
        local = points - centre
        off_plane = np.abs(local[rows, axis] - sign * half[axis])
        beside = np.maximum(np.abs(local) - half, 0).max(-1)
        nearest = np.where(half.any(), np.minimum(nearest, np.maximum(off_plane, beside)), nearest)
    return nearest
