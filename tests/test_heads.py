"""Depth heads against the plain Linear over concatenated features, their training loss, and the file of features that they are trained from."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from naive import NaiveHead
from torch import nn

from dag.data.features import FeatureFile, write_features
from dag.heads import DepthHead, build_heads, head_loss, time_embedding
from dag.training import Recipe, fit

CHANNELS = {2: 6, 4: 5, 5: 4, 7: 3}
SIDES = {2: 4, 4: 8, 5: 8, 7: 16}
SIZE = 16


def make_features(batch: int, dtype=torch.float64, seed: int = 0) -> dict[int, torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return {k: torch.randn(batch, c, SIDES[k], SIDES[k], generator=numbers, dtype=torch.float64).to(dtype) for k, c in CHANNELS.items()}


def make_head(channels: dict[int, int] = CHANNELS, *, dtype=torch.float64, **sizes) -> DepthHead:
    """A head in eval mode with random weights, running statistics among them."""
    torch.manual_seed(1)
    head = DepthHead(channels, **{"width": 8, "time_width": 6, **sizes})
    for layer in head.layers:
        for values in (layer.norm.running_mean, layer.norm.bias.data):
            values.normal_()
        for values in (layer.norm.running_var, layer.norm.weight.data):
            values.uniform_(0.5, 2)
    return head.to(dtype).eval()


T = torch.tensor([999, 3])


@pytest.mark.parametrize("size", [16, 32, 4])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_factorised_head_equals_one_linear_over_the_concatenation(size, layers, training):
    """To rounding in float64, whether features are enlarged, left or reduced, and by its gradient too."""
    head = make_head(layers=layers).train(training)
    features = {k: f.requires_grad_() for k, f in make_features(2).items()}
    expected, found = NaiveHead(head)(features, T, size), head(features, T, size)
    assert found.shape == (2, 1, size, size)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    gradients = (torch.autograd.grad((depth * weights).sum(), list(features.values())) for depth in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_order_of_blocks_is_that_of_the_weights_only():
    head = make_head({7: 3, 2: 6})
    features = make_features(2)
    torch.testing.assert_close(head(features, T, SIZE), NaiveHead(head)(features, T, SIZE), rtol=0, atol=1e-12)
    assert torch.equal(head(features, T, SIZE), head(dict(reversed(features.items())), T, SIZE))


def test_float32_and_half_precision_features():
    features = make_features(2)
    expected = make_head()(features, T, SIZE)
    single = make_head(dtype=torch.float32)
    torch.testing.assert_close(single({k: f.float() for k, f in features.items()}, T, SIZE).double(), expected, rtol=0, atol=1e-4)
    for dtype in (torch.float16, torch.bfloat16):
        low = {k: f.to(dtype) for k, f in features.items()}
        assert torch.equal(single(low, T, SIZE), single({k: f.float() for k, f in low.items()}, T, SIZE))


def test_a_pixels_depth_depends_on_its_own_pixel_and_sample():
    head = make_head({7: 3})
    features = make_features(2)
    before = head(features, T, SIZE)
    features[7][0, :, 5, 9] += 1
    changed = (head(features, T, SIZE) - before).abs() > 1e-9
    assert changed.nonzero().tolist() == [[0, 0, 5, 9]]


def test_depth_depends_on_t_of_its_sample():
    head, features = make_head(), make_features(2)
    first, second = head(features, T, SIZE), head(features, torch.tensor([998, 3]), SIZE)
    assert not torch.allclose(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_time_embedding_is_sines_and_cosines():
    t = torch.tensor([0, 1, 750])
    embedding = time_embedding(t, 4, dtype=torch.float64)
    expected = [[math.sin(v), math.sin(v / 100), math.cos(v), math.cos(v / 100)] for v in t.tolist()]
    torch.testing.assert_close(embedding, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(time_embedding(t, 4), embedding.float())


def test_first_layer_starts_as_one_linear_would():
    torch.manual_seed(0)
    head = DepthHead({0: 30, 1: 70}, width=64)
    weight, linear = NaiveHead(head).first.weight.detach(), nn.Linear(100, 64).weight.detach()
    assert weight.abs().max() <= 0.1
    assert float(weight.std()) == pytest.approx(float(linear.std()), rel=0.05)


def test_bad_heads_are_refused():
    for options in ({"channels": {}}, {"layers": 0}, {"time_width": 5}, {"time_width": 0}):
        with pytest.raises(ValueError, match="DepthHead: .* expected"):
            DepthHead(**{"channels": CHANNELS, **options})
    with pytest.raises(KeyError, match="7"):
        make_head()({k: f for k, f in make_features(1).items() if k != 7}, T[:1], SIZE)
    with pytest.raises(ValueError, match=r"head 'weak' asks for decoder blocks \[3, 9\]; there are \[2, 4, 5, 7\]"):
        build_heads({"strong": [2, 4], "weak": [9, 3]}, CHANNELS)


def test_named_heads_and_their_loss():
    heads = build_heads({"strong": (2, 5, 7), "weak": [5]}, CHANNELS, width=8, layers=1, time_width=6).double()
    assert {name: head.blocks for name, head in heads.items()} == {"strong": (2, 5, 7), "weak": (5,)}
    features, depth = make_features(2), torch.rand(2, 1, SIZE, SIZE, dtype=torch.float64)
    loss = head_loss(heads.eval(), (features, T, depth), torch.Generator())
    expected = sum(float((NaiveHead(head)(features, T, SIZE) - depth).detach().abs().sum()) / depth.numel() for head in heads.values())
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-12)


def test_heads_learn_a_depth_that_their_features_hold(tmp_path):
    """Depth planted in a channel is found by the head that sees it and by no other."""
    features = make_features(16, torch.float32)
    depth = torch.nn.functional.interpolate(features[5][:, 1:2], size=(SIZE, SIZE), mode="bilinear")
    torch.manual_seed(0)
    heads = build_heads({"strong": [5, 7], "weak": [7]}, CHANNELS, width=16, time_width=8)
    data = (features, torch.arange(16) * 60, depth)
    trained = fit(heads, head_loss, lambda step: data, Recipe(40, 16, 2e-2, warmup=5, ema=0.8), state=tmp_path / "s.pt", log=tmp_path / "log")
    with torch.no_grad():
        errors = {name: float((head(features, data[1], SIZE) - depth).abs().mean()) for name, head in trained.items()}
    assert errors["strong"] < 0.3 * float(depth.abs().mean())
    assert errors["weak"] > 0.7 * float(depth.abs().mean())


# ---- the file of features


IMAGE, TIMES = np.repeat(np.arange(3), 2), np.array([10, 500, 20, 600, 30, 700])
SHAPES = {k: (c, SIDES[k], SIDES[k]) for k, c in CHANNELS.items()}


def batches(sizes=(4, 2)) -> list[dict[int, torch.Tensor]]:
    whole = make_features(sum(sizes), torch.float32)
    starts = np.cumsum([0, *sizes])
    return [{k: f[a:b] for k, f in whole.items()} for a, b in zip(starts, starts[1:], strict=False)]


@pytest.fixture
def stored(tmp_path):
    write_features(tmp_path / "f" / "rows.npy", SHAPES, IMAGE, TIMES, batches())
    return tmp_path / "f" / "rows.npy"


def test_features_come_back_in_any_order(stored):
    file, whole = FeatureFile(stored), make_features(6, torch.float32)
    assert (file.channels, file.shapes) == (CHANNELS, SHAPES)
    assert (file.image.tolist(), file.t.tolist()) == (IMAGE.tolist(), TIMES.tolist())
    for rows in ([5, 0, 3, 3, 1], [2], list(range(6))):
        read = file.read(np.array(rows), [7, 2])
        assert read.keys() == {2, 7}
        for k, feature in read.items():
            assert feature.dtype == torch.float32
            assert torch.equal(feature, whole[k][rows].half().float())
    assert sorted(p.name for p in stored.parent.iterdir()) == ["rows.json", "rows.npy"]


def test_blocks_that_are_not_stored_are_named(stored):
    with pytest.raises(ValueError, match=r"rows\.npy: holds no features of blocks \[0, 9\]; there are \[2, 4, 5, 7\]"):
        FeatureFile(stored).read(np.array([0]), [0, 2, 9])


@pytest.mark.parametrize("keep", [0, 4, 60, 200, -2])
def test_torn_rows_are_refused(stored, keep):
    stored.write_bytes(stored.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"rows\.npy: not a whole feature file") as error:
        FeatureFile(stored)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_went_bad_on_disk_are_named(stored, value):
    file, column = FeatureFile(stored), -1  # the last one, of the last block
    np.load(stored, mmap_mode="r+")[4, column] = value
    with pytest.raises(ValueError, match=rf"rows\.npy: the features of image {IMAGE[4]} at t = {TIMES[4]} are not finite"):
        file.read(np.array([5, 4, 0]), [max(SHAPES)])
    assert file.read(np.array([5, 4, 0]), [min(SHAPES)]).keys() == {min(SHAPES)}  # other blocks are as they were
    assert file.read(np.array([5, 3, 0]), [max(SHAPES)]).keys() == {max(SHAPES)}


@pytest.mark.parametrize("text", ["", '{"shapes": {"2": [6,', "[]", '{"shapes": {}}', '{"shapes": {"x": [1]}, "image": [], "t": []}'])
def test_torn_index_is_refused(stored, text):
    stored.with_suffix(".json").write_text(text)
    with pytest.raises(ValueError, match=r"rows\.json: not the index of a feature file") as error:
        FeatureFile(stored)
    assert "\n" not in str(error.value)


def test_missing_half_and_unfitting_index_are_refused(stored):
    index = stored.with_suffix(".json")
    meta = json.loads(index.read_text())
    for change in ({"t": [1, 2]}, {"image": [0]}, {"shapes": {"2": [6, 4, 4]}}):
        index.write_text(json.dumps({**meta, **change}))
        with pytest.raises(ValueError, match=r"rows\.npy: holds .*, its index says"):
            FeatureFile(stored)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"rows\.npy: no feature file with its index rows\.json"):
        FeatureFile(stored)


def spoiled(value: float) -> list[dict[int, torch.Tensor]]:
    parts = batches()
    parts[1][5][1, 0, 0, 0] = value
    return parts


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (spoiled(float("nan")), "the features of image 2 at t = 700 are not finite"),
        (spoiled(1e6), "the features of image 2 at t = 700 are not finite in float16"),
        (batches((4, 1)), "5 rows of features arrived, expected 6"),
        (batches((4, 3)), "at least 7 rows of features arrived, expected 6"),
    ],
)
def test_bad_batches_leave_no_file(stored, parts, message):
    """Nor does the file that was there before count any longer."""
    with pytest.raises(ValueError, match=message):
        write_features(stored, SHAPES, IMAGE, TIMES, parts)
    with pytest.raises(FileNotFoundError):
        FeatureFile(stored)
    assert [p.name for p in stored.parent.iterdir()] == ["rows.npy"]
