"""Depth errors against hand-computed 4 x 4 maps; protocols against oracles and planted masks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dag.metrics.depth_errors import ALIGNMENTS, ERRORS, DepthProtocol, align, depth_errors, summarise

GT = np.array([[1.0, 1, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2], [4, 4, 4, 4]])


def wave(h: int = 4, w: int = 4, seed: int = 0) -> np.ndarray:
    """A smooth positive depth map in metres."""
    return np.random.default_rng(seed).uniform(1, 6, (h, w))


def test_errors_of_a_map_twice_too_deep_in_its_last_row():
    pred = GT.copy()
    pred[3] = 8
    e = depth_errors(pred, GT)
    # Four of sixteen pixels are off by 4 m: ratio 2, so ln 2.
    assert e["abs_rel"] == pytest.approx(0.25)
    assert e["sq_rel"] == pytest.approx(16 / 4 * 0.25)
    assert e["rmse"] == pytest.approx(2.0)
    assert e["rmse_log"] == pytest.approx(math.log(2) / 2)
    assert e["log10"] == pytest.approx(math.log10(2) / 4)
    assert e["si_log"] == pytest.approx(100 * math.log(2) * math.sqrt(1 / 4 - 1 / 16))
    assert (e["delta1"], e["delta2"], e["delta3"]) == (0.75, 0.75, 0.75)  # 1.25^3 = 1.953


def test_errors_of_a_map_scaled_as_a_whole():
    e = depth_errors(1.5 * GT, GT)
    assert e["abs_rel"] == pytest.approx(0.5)
    assert e["sq_rel"] == pytest.approx(0.25 * GT.mean())
    assert e["rmse"] == pytest.approx(0.5 * math.sqrt((4 * 1 + 8 * 4 + 4 * 16) / 16))
    assert e["rmse_log"] == pytest.approx(math.log(1.5))
    assert e["log10"] == pytest.approx(math.log10(1.5))
    assert e["si_log"] == pytest.approx(0, abs=1e-10)
    assert (e["delta1"], e["delta2"], e["delta3"]) == (0.0, 1.0, 1.0)  # 1.25 < 1.5 < 1.5625


def test_delta_is_the_same_for_too_near_and_too_far():
    assert depth_errors(GT / 1.3, GT)["delta1"] == depth_errors(GT * 1.3, GT)["delta1"] == 0.0
    assert depth_errors(GT / 1.2, GT)["delta1"] == depth_errors(GT * 1.2, GT)["delta1"] == 1.0


def test_only_valid_pixels_count():
    pred, valid = GT.copy(), np.ones((4, 4), bool)
    pred[0], valid[0] = np.nan, False
    e = depth_errors(pred, GT, valid)
    assert e["rmse"] == 0.0
    assert e["delta1"] == 1.0


def test_the_oracle_has_no_error_under_any_alignment():
    gt = np.stack([wave(seed=i) for i in range(3)])
    for how in ALIGNMENTS:
        for record in DepthProtocol(how).evaluate(gt, gt):
            assert tuple(record)[2:11] == ERRORS
            assert [record[name] for name in ERRORS[:6]] == pytest.approx([0] * 6, abs=1e-9)
            assert [record[name] for name in ERRORS[6:]] == [1.0] * 3


@pytest.mark.parametrize(
    ("how", "distort"),
    [("median", lambda d: 3 * d), ("scale_shift", lambda d: 0.5 * d + 2), ("scale_shift_disparity", lambda d: 1 / (0.4 / d + 0.3))],
)
def test_alignment_undoes_exactly_its_own_distortion(how, distort):
    gt = wave()
    np.testing.assert_allclose(align(distort(gt), gt, None, how), gt, rtol=1e-9)
    assert np.abs(align(distort(gt), gt, None, "none") - gt).max() > 0.1


def test_alignment_is_fitted_on_valid_pixels_and_applied_to_all():
    pred, gt, valid = GT.copy(), 2 * GT, np.ones((4, 4), bool)
    pred[0], valid[0] = 50, False
    np.testing.assert_allclose(align(pred, gt, valid, "median"), 2 * pred)
    np.testing.assert_allclose(align(pred, gt, valid, "scale_shift"), 2 * pred)


def test_least_squares_cannot_be_bettered():
    pred, gt = wave(seed=1), wave(seed=2)
    best = np.square(align(pred, gt, None, "scale_shift") - gt).sum()
    scale, shift = np.polyfit(pred.ravel(), gt.ravel(), 1)
    assert best == pytest.approx(np.square(scale * pred + shift - gt).sum())


def test_a_flat_prediction_becomes_the_mean_or_the_median():
    flat = np.full((4, 4), 3.0, np.float32) + 0.1
    np.testing.assert_allclose(align(flat, GT, None, "scale_shift"), GT.mean())
    np.testing.assert_allclose(align(flat, GT, None, "scale_shift_disparity"), 1 / (1 / GT).mean())
    np.testing.assert_allclose(align(flat, GT, None, "median"), 2.0)


def test_disparity_below_zero_is_infinitely_far_and_the_cap_brings_it_back():
    gt = np.array([[1.0, 2.0, 8.0, 9.0]])
    pred = np.array([[1.0, 1.2, 1.4, 30.0]])  # the fitted line runs through zero disparity before the last pixel
    aligned = align(pred, gt, None, "scale_shift_disparity")
    assert np.isinf(aligned[0, 3])
    record = DepthProtocol("scale_shift_disparity").evaluate(pred[None], gt[None])[0]
    assert np.isfinite([record[name] for name in ERRORS]).all()


def test_caps_choose_pixels_of_gt_and_clip_the_prediction():
    gt, pred = GT.copy(), GT.copy()
    gt[0], gt[1, 0], pred[3] = 10.0, 0.0, 400.0
    record = DepthProtocol("none").evaluate(pred[None], gt[None])[0]
    assert record["pixels"] == 11
    assert record["rmse"] == pytest.approx(6 * math.sqrt(4 / 11))


def test_crops():
    gt = np.ones((480, 640))
    mask = DepthProtocol("none", crop="eigen").mask(gt)
    assert mask[45:471, 41:601].all()
    assert mask.sum() == (471 - 45) * (601 - 41)
    assert DepthProtocol("none", crop="eigen").mask(gt[::2, ::2])[22:236, 20:300].all()
    mask = DepthProtocol("none", crop=(1, 3, 0, 2)).mask(GT)
    assert mask[1:3, :2].all()
    assert mask.sum() == 4


def test_records_of_images_and_their_two_rmses():
    gt = np.stack([GT, GT])
    pred, valid = gt + [[[1.0]], [[3.0]]], np.ones_like(gt, bool)
    valid[1, :2] = False
    records = DepthProtocol("none").evaluate(pred, gt, valid)
    assert [(r["image"], r["alignment"], r["pixels"]) for r in records] == [(0, "none", 16), (1, "none", 8)]
    means = summarise(records)
    assert means["rmse"] == pytest.approx(2.0)
    assert means["rmse_pooled"] == pytest.approx(math.sqrt((16 * 1 + 8 * 9) / 24))
    assert means["abs_rel"] == pytest.approx(np.mean([r["abs_rel"] for r in records]))


def test_describe_names_everything_that_changes_a_number():
    lines = {
        DepthProtocol("none").describe(),
        DepthProtocol("median").describe(),
        DepthProtocol("none", max_depth=80).describe(),
        DepthProtocol("none", crop="eigen").describe(),
        DepthProtocol("none", crop=(0, 2, 0, 2)).describe(),
    }
    assert len(lines) == 5
    assert "alignment none, 0.001 m < depth < 10 m, Eigen crop" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alignment": "scale"}, "alignment is 'scale', expected one of none, median"),
        ({"alignment": "none", "min_depth": 0}, "depth caps"),
        ({"alignment": "none", "crop": "garg"}, "crop is 'garg'"),
        ({"alignment": "none", "crop": (3, 1, 0, 2)}, "top < bottom"),
        ({"alignment": "none", "crop": (0, 1, 2)}, "four numbers"),
    ],
)
def test_protocols_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DepthProtocol(**arguments)


def test_maps_that_allow_no_number_are_refused():
    with pytest.raises(ValueError, match="no valid pixel"):
        depth_errors(GT, GT, np.zeros((4, 4), bool))
    with pytest.raises(ValueError, match="must be equal"):
        depth_errors(GT[:2], GT)
    with pytest.raises(ValueError, match="gt holds"):
        depth_errors(GT, GT - 1)
    with pytest.raises(ValueError, match="expected finite and above 0"):
        depth_errors(GT - 1, GT)
    with pytest.raises(ValueError, match="alignment is 'best'"):
        align(GT, GT, None, "best")
    with pytest.raises(ValueError, match="median of pred"):
        align(-GT, GT, None, "median")
    with pytest.raises(ValueError, match="pred falls to"):
        align(GT - 1, GT, None, "scale_shift_disparity")
    spoiled = np.stack([GT, GT])
    spoiled[1, 2, 2] = np.nan
    with pytest.raises(ValueError, match="image 1: depth errors: pred is NaN at 1 of 16"):
        DepthProtocol("none").evaluate(spoiled, np.stack([GT, GT]))
    with pytest.raises(ValueError, match="image 0: crop .* reaches beyond a picture of 4 x 4"):
        DepthProtocol("none", crop=(0, 5, 0, 4)).evaluate(GT[None], GT[None])
    with pytest.raises(ValueError, match="crop eigen belongs to"):
        DepthProtocol("none", crop="eigen").evaluate(GT[None], GT[None])
    with pytest.raises(ValueError, match=r"expected equal \(n, h, w\)"):
        DepthProtocol("none").evaluate(GT, GT)
    with pytest.raises(ValueError, match="no records"):
        summarise([])
