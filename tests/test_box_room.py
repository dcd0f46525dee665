"""Geometry without a judge: rooms of known turn are recognised, what is no room scores as none."""

import numpy as np
import pytest

from dag.data.geometry import camera
from dag.data.rooms import render
from dag.metrics.box_room import SCORES, box_room_scores, room_frame

K = camera(np.array([np.tan(np.radians(35))]), 32)[0]


def empty_room(yaw: float, pitch: float) -> np.ndarray:
    """Depth (32, 32) of an empty box, 4 x 2.6 x 6 m, by intersecting rays with its planes; angles in degrees."""
    centres = (np.arange(32) + 0.5 - 16) / K[0, 0]
    rays = np.stack([*np.meshgrid(centres, -centres), np.ones((32, 32))], -1)
    y, p = np.radians([yaw, pitch])
    tilt = np.array([[1, 0, 0], [0, np.cos(p), np.sin(p)], [0, -np.sin(p), np.cos(p)]])
    turn = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    rays = rays @ (turn @ tilt).T
    low, high = np.array([-2.0, -1.5, -0.5]), np.array([2.0, 1.1, 5.5])
    with np.errstate(divide="ignore"):
        hits = np.where(rays > 0, high / rays, low / rays)
    return np.where(np.isfinite(hits), hits, np.inf).min(-1)


@pytest.mark.parametrize(("yaw", "pitch"), [(0, 0), (20, -10), (-15, -5)])
def test_an_empty_room_is_all_room(yaw, pitch):
    scores = box_room_scores(empty_room(yaw, pitch), K)
    assert scores["axis_share"] > 0.75  # normals across an edge belong to no wall
    assert scores["roughness"] < 0.5
    assert scores["floor_ceiling_degrees"] < 2


def test_the_frame_is_the_camera_s_turn():
    frame = room_frame(np.eye(3)[[0, 1, 2, 1, 0]])
    assert np.allclose(frame, np.eye(3), atol=1e-9)
    y = np.radians(20)
    turned = np.array([[np.cos(y), 0, -np.sin(y)], [0, 1, 0], [np.sin(y), 0, np.cos(y)]])
    found = room_frame(turned)
    assert np.allclose(np.abs(found @ turned.T), np.eye(3), atol=1e-6)
    for candidate in (frame, found):
        assert np.allclose(candidate @ candidate.T, np.eye(3))


def test_less_of_a_room_scores_less():
    depth = render(np.arange(8), 32)[1].astype(float)
    rng = np.random.default_rng(0)

    def mean(spoil):
        scores = [box_room_scores(spoil(d), K) for d in depth]
        return {name: np.nanmean([s[name] for s in scores]) for name in SCORES}

    good, noisy, torn = mean(lambda d: d), mean(lambda d: d * np.exp(rng.normal(0, 0.05, d.shape))), mean(lambda d: d[rng.permutation(32)])
    for worse in (noisy, torn):
        assert worse["axis_share"] < good["axis_share"] - 0.2
        assert worse["roughness"] > good["roughness"]
    assert torn["floor_ceiling_degrees"] > good["floor_ceiling_degrees"]


def test_a_wall_alone_has_no_angle_between_floor_and_ceiling():
    scores = box_room_scores(np.full((32, 32), 3.0), K)
    assert scores["axis_share"] == 1
    assert scores["roughness"] == pytest.approx(0, abs=1e-9)
    assert np.isnan(scores["floor_ceiling_degrees"])


def test_depth_behind_the_camera_is_refused():
    with pytest.raises(ValueError, match="not positive and finite"):
        box_room_scores(np.zeros((32, 32)), K)
