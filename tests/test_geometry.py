"""Points and normals from depth, against planes in closed form and the ray-caster's exact scenes."""

import numpy as np
import pytest

from dag.data.geometry import camera, normals_from_depth, unproject
from dag.data.rooms import render, scenes

SIZE = 48
SEEDS = list(range(900, 908))


@pytest.fixture(scope="module")
def rooms():
    scene = scenes(SEEDS)
    _, depth, normals = render(SEEDS, SIZE)
    return scene, camera(scene.tan_half_fov, SIZE), depth, normals


def test_pinhole_projects_points_back_onto_their_pixel_centres():
    intrinsics = np.array([[40.0, 0, 17], [0, 35, 12], [0, 0, 1]])
    depth = np.random.default_rng(0).uniform(1, 5, (24, 32))
    x, y, z = np.moveaxis(unproject(depth, intrinsics), -1, 0)
    v, u = np.mgrid[:24, :32] + 0.5
    np.testing.assert_allclose(intrinsics[0, 0] * x / z + intrinsics[0, 2], u)
    np.testing.assert_allclose(-intrinsics[1, 1] * y / z + intrinsics[1, 2], v)  # y points up, rows run down
    np.testing.assert_array_equal(z, depth)


@pytest.mark.parametrize("normal", [(0, 0, -1), (0, 1, -0.2), (-0.7, 0.3, -0.4), (0.9, 0, -0.05)])
def test_normals_of_a_plane_are_exact_up_to_the_border(normal):
    normal = np.array(normal) / np.linalg.norm(normal)
    intrinsics = camera(np.array([0.4]), 16)[0]
    rays = unproject(np.ones((16, 16)), intrinsics)
    facing = rays @ normal
    offset = np.where(facing < -1e-3, facing, -1.0)  # rays that miss the plane see something else
    got = normals_from_depth(-1.5 / offset, intrinsics)
    inside = _eroded(facing < -1e-3)
    assert inside.sum() >= 20
    np.testing.assert_allclose(got[inside], np.broadcast_to(normal, (*got.shape[:2], 3))[inside], atol=1e-9)


def test_points_of_rooms_lie_inside_their_room(rooms):
    scene, intrinsics, depth, normals = rooms
    for i in range(len(SEEDS)):
        world = scene.eye[i] + unproject(depth[i], intrinsics[i]) @ scene.rotation[i].T
        assert (world > -0.15).all()
        assert (world < scene.room[i] + 0.15).all()
        floor = ((normals[i] @ scene.rotation[i].T)[..., 1] > 0.999) & (world[..., 1] < 0.06)
        assert floor.sum() > 30
        assert abs(np.median(world[floor][:, 1])) < 0.01


def test_normals_of_rooms_agree_with_the_ray_caster_inside_planes(rooms):
    scene, intrinsics, depth, exact = rooms
    checked = 0
    for i in range(len(SEEDS)):
        inside = _same_plane(unproject(depth[i], intrinsics[i]), exact[i])
        cosine = (normals_from_depth(depth[i], intrinsics[i]) * exact[i]).sum(-1)[inside]
        assert np.degrees(np.arccos(np.clip(cosine, -1, 1))).max() < 3  # a pixel's depth is the mean of four rays, not its centre's
        assert np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean() < 0.2
        checked += inside.sum()
    assert checked > 0.4 * len(SEEDS) * SIZE**2


def test_normals_are_unit_and_face_the_camera_on_any_surface():
    intrinsics = camera(np.array([0.7]), 20)[0]
    depth = np.random.default_rng(1).uniform(0.5, 8, (20, 20))
    normal, point = normals_from_depth(depth, intrinsics), unproject(depth, intrinsics)
    np.testing.assert_allclose(np.linalg.norm(normal, axis=-1), 1)
    assert ((normal * point).sum(-1) < 0).all()


@pytest.mark.parametrize(
    ("depth", "intrinsics", "message"),
    [
        (np.ones((2, 4, 4)), np.eye(3), "shapes"),
        (np.ones((4, 4)), np.eye(4), "shapes"),
        (np.zeros((4, 4)), np.eye(3), "positive and finite"),
        (np.full((4, 4), np.nan), np.eye(3), "positive and finite"),
        (np.ones((1, 4)), np.eye(3), "at least 2 x 2"),
    ],
)
def test_bad_depth_is_refused(depth, intrinsics, message):
    with pytest.raises(ValueError, match=message):
        normals_from_depth(depth, intrinsics)


def _eroded(mask):
    """Pixels whose neighbours above, below, left and right (where there are any) are all in the mask."""
    padded = np.pad(mask, 1, constant_values=True)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _same_plane(points, normal):
    """Pixels that lie in one plane with their four neighbours: same exact normal, same distance from the camera's eye."""
    offset = (points * normal).sum(-1)
    same = np.ones(offset.shape, bool)
    for axis in (0, 1):
        for step in (1, -1):
            near = (np.abs(np.roll(normal, step, axis) - normal).max(-1) < 1e-4) & (np.abs(np.roll(offset, step, axis) - offset) < 0.02)
            index = [slice(None), slice(None)]
            index[axis] = 0 if step == 1 else -1
            near[tuple(index)] = False
            same &= near
    return same
