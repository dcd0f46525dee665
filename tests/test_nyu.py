"""NYU-Depth v2: both forms it comes in, its splits, what is refused, and the floors that any prediction must beat on it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import checkout, snakemake
from PIL import Image
from scipy.io import savemat

from dag.data.domain import dataset
from dag.data.nyu import NYUDepthV2
from dag.metrics.depth_errors import ALIGNMENTS, DepthProtocol, summarise
from dag.stages.downstream import _train, _whole, _whole_pairs, downstream
from dag.stages.study import Study

ROOT = Path(__file__).parent.parent


def write_splits(folder: Path, train: list[int], test: list[int]) -> None:
    savemat(folder / "splits.mat", {"trainNdxs": np.array(train, np.uint16)[:, None], "testNdxs": np.array(test, np.uint16)[:, None]})


def write_matlab(folder: Path, images: np.ndarray, depths: np.ndarray) -> Path:
    """The official file's layout, its axes reversed, of images (n, h, w, 3) and depths (n, h, w)."""
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = images.transpose(0, 3, 2, 1)
        file["depths"] = depths.transpose(0, 2, 1)
    return folder / "nyu_depth_v2_labeled.mat"


DOWN, RIGHT = np.mgrid[0:480, 0:640]


def drawn(index: int, down: np.ndarray = DOWN, right: np.ndarray = RIGHT) -> np.ndarray:
    """A picture whose red grows to the right and whose green grows downwards, each slowly enough for JPEG; its blue tells which picture it is."""
    return np.stack([right // 4 + 20, down // 4 + 60, np.full(right.shape, 40 * index)], -1).astype(np.uint8)


def metres(index: int, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Depth that no turning or mirroring leaves as it is."""
    return index + (right + 2 * down) / 1000


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four pictures, 1 and 3 for training, in the folder form."""
    (tmp_path / "rgb").mkdir()
    (tmp_path / "depth").mkdir()
    for index in range(1, 5):
        Image.fromarray(drawn(index)).save(tmp_path / "rgb" / f"{index:04d}.jpg", quality=95, subsampling=0)
        millimetres = np.round(1000 * metres(index, DOWN, RIGHT)).astype(np.uint16)
        Image.fromarray(millimetres).save(tmp_path / "depth" / f"{index:04d}.png", compress_level=1)
    write_splits(tmp_path, [3, 1], [2, 4])
    return tmp_path


def twice(folder: Path, name: str, other: str) -> None:
    """One picture and its depth, under another name of the same index as well."""
    shutil.copy(folder / f"rgb/{name}.jpg", folder / f"rgb/{other}.jpg")
    shutil.copy(folder / f"depth/{name}.png", folder / f"depth/{other}.png")


def test_official_splits_and_arrays(folder):
    train, test, every = NYUDepthV2(folder, "train"), NYUDepthV2(folder, "test"), NYUDepthV2(folder)
    assert [train.id(i) for i in range(len(train))] == [1, 3]
    assert [test.id(i) for i in range(len(test))] == [2, 4]
    assert len(every) == 4
    image, depth = test.image(1), test.depth(1)
    assert (image.shape, image.dtype) == ((480, 640, 3), np.uint8)
    assert (depth.shape, depth.dtype) == ((480, 640), np.float32)
    np.testing.assert_allclose(depth, metres(4, DOWN, RIGHT), rtol=1e-6)
    assert np.abs(image.astype(int) - drawn(4)).max() < 6  # red, green, blue, as JPEG keeps them


def test_both_forms_give_the_same_arrays(folder, tmp_path_factory):
    every, official = NYUDepthV2(folder), tmp_path_factory.mktemp("official")
    write_matlab(official, *(np.stack([read(i) for i in range(4)]) for read in (every.image, every.depth)))
    shutil.copy(folder / "splits.mat", official)
    for path in (official, official / "nyu_depth_v2_labeled.mat"):
        for split in ("train", "test", None):
            ours, theirs = NYUDepthV2(folder, split), NYUDepthV2(path, split)
            assert len(ours) == len(theirs)
            for i in range(len(ours)):
                assert ours.id(i) == theirs.id(i)
                for read in ("image", "depth"):
                    first, second = getattr(ours, read)(i), getattr(theirs, read)(i)
                    assert first.dtype == second.dtype
                    np.testing.assert_array_equal(first, second)


def test_pixels_of_the_official_file_are_found_where_matlab_has_them(folder):
    """MATLAB's images(y, x, channel, index), counted from 1, is images[index, channel, x, y] of the HDF5 file, counted from 0."""
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w") as file:
        images, depths = np.zeros((2, 3, 640, 480), np.uint8), np.ones((2, 640, 480), np.float32)
        images[1, :, 600, 20] = 10, 20, 30
        depths[1, 600, 20] = 7.5
        file["images"], file["depths"] = images, depths
    second = NYUDepthV2(folder / "nyu_depth_v2_labeled.mat")
    assert second.image(1)[20, 600].tolist() == [10, 20, 30]
    assert second.image(1).sum() == 60
    assert second.depth(1)[20, 600] == 7.5
    assert second.depth(1).sum() == 480 * 640 + 6.5


def test_squares_leave_the_white_frame_out(folder):
    squares = NYUDepthV2(folder, "train").squares(np.arange(2), 8)
    assert squares.valid is None
    assert list(squares.ids) == [1, 3]
    # The middle 464 of the 624 columns inside the frame, from column 8 + 80 and row 8 on, eight pixels of 58 x 58 each.
    middles = 58 * np.arange(8) + 28.5
    np.testing.assert_allclose(squares.depth[0], metres(1, 8 + middles[:, None], 88 + middles), rtol=1e-6)
    assert np.abs(squares.images[1].astype(int) - drawn(3, 8 + middles[:, None] + 0 * middles, 88 + middles + 0 * middles[:, None])).max() < 4


def test_the_place_of_the_data_comes_from_the_config_or_the_environment(folder, monkeypatch):
    monkeypatch.delenv("DAG_NYU_ROOT", raising=False)
    with pytest.raises(ValueError, match=r"domain\.root.*DAG_NYU_ROOT"):
        dataset({"name": "nyu", "size": 8}, "train")
    assert len(dataset({"name": "nyu", "size": 8, "root": str(folder)}, "train")) == 2
    monkeypatch.setenv("DAG_NYU_ROOT", str(folder))
    assert len(dataset({"name": "nyu", "size": 8}, None)) == 4


def _depth(folder: Path, value: int) -> None:
    depth = np.full((480, 640), 2000, np.uint16)
    depth[100, 200] = value
    Image.fromarray(depth).save(folder / "depth" / "0002.png")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda f: (f / "rgb" / "0003.jpg").unlink(), "4 depth maps for 3 pictures; '0003' is only among the depths"),
        (lambda f: (f / "depth" / "0003.png").unlink(), "3 depth maps for 4 pictures; '0003' is only among the pictures"),
        (lambda f: (f / "rgb" / "0002.jpg").write_bytes(b"no jpeg"), "0002.jpg: not a readable picture"),
        (lambda f: (f / "rgb" / "0002.jpg").write_bytes((f / "rgb" / "0002.jpg").read_bytes()[:2000]), "0002.jpg: not a readable picture"),
        (lambda f: Image.new("RGB", (64, 48)).save(f / "rgb" / "0002.jpg"), "picture 2: 48 x 64 pixels, expected 480 x 640"),
        (lambda f: Image.new("L", (640, 480)).save(f / "rgb" / "0002.jpg"), "0002.jpg: a picture of mode L, expected RGB"),
        (lambda f: Image.fromarray(np.ones((48, 64), np.uint16)).save(f / "depth" / "0002.png"), "0002.png: 48 x 64 pixels, expected 480 x 640"),
        (lambda f: _depth(f, 0), "picture 2: depth is 0, negative or not finite at 1 pixels"),
        (lambda f: write_splits(f, [1, 3], [2, 5]), "splits.mat: split 'test' names picture 5; .* has 4 pictures"),
        (lambda f: write_splits(f, [1, 3], [0, 2]), "splits.mat: split 'test' names picture 0"),
        (lambda f: (f / "splits.mat").write_bytes(b"text"), "splits.mat: not a readable .mat file"),
        (lambda f: savemat(f / "splits.mat", {"trainNdxs": [[1]]}), "splits.mat: has no testNdxs"),
        (lambda f: savemat(f / "splits.mat", {"trainNdxs": [[1]], "testNdxs": [[1.5]]}), "splits.mat: testNdxs holds 1 values of float64"),
        (lambda f: write_splits(f, [1, 2], [2, 4]), "splits.mat: picture 2 is listed 2 times, expected every picture in one split, once"),
        (lambda f: write_splits(f, [1, 1, 1], [2, 4]), "splits.mat: picture 1 is listed 3 times"),
        (lambda f: twice(f, "0002", "2"), r"rgb: 0002\.jpg and 2\.jpg are pictures of the same index"),
        (lambda f: (f / "rgb" / "0002.jpg").rename(f / "rgb" / "two.jpg"), "two.jpg: expected a name of digits"),
    ],
)
def test_a_spoilt_folder_is_refused(folder, spoil, expected):
    spoil(folder)
    with pytest.raises(ValueError, match=expected):
        NYUDepthV2(folder, "test").squares(np.arange(1), 8)


def _matlab(folder: Path, change) -> None:
    images, depths = np.zeros((4, 480, 640, 3), np.uint8), np.ones((4, 480, 640), np.float32)
    with h5py.File(write_matlab(folder, images, depths), "a") as file:
        change(file)


def _set(name: str, value, index=None):
    """A change of an HDF5 file: a dataset replaced, or one number of it."""

    def change(file):
        if index is None:
            del file[name]
            file[name] = value
        else:
            file[name][index] = value

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda file: file.pop("depths"), "has no dataset depths; it holds images"),
        (lambda file: file.pop("images"), "has no dataset images; it holds depths"),
        (_set("depths", np.ones((4, 480, 640), np.float32)), r"depths is float32 of shape \(4, 480, 640\), expected float32 of shape \(4, 640, 480\)"),
        (_set("depths", np.ones((3, 640, 480), np.float32)), r"images is uint8 of shape \(4, 3, 640, 480\)"),
        (_set("images", np.zeros((4, 3, 640, 480), np.float32)), "images is float32"),
        (_set("depths", np.nan, (1, 5, 5)), "picture 2: depth is 0, negative or not finite at 1 pixels"),
        (_set("depths", 0, (1, 5, 5)), "picture 2: depth is 0, negative or not finite at 1 pixels"),
        (_set("depths", -1, (1, 5, 5)), "picture 2: depth is 0, negative or not finite at 1 pixels"),
    ],
)
def test_a_spoilt_matlab_file_is_refused(folder, change, expected):
    _matlab(folder, change)
    with pytest.raises(ValueError, match="nyu_depth_v2_labeled.mat.*" + expected):
        NYUDepthV2(folder, "test").squares(np.arange(1), 8)


@pytest.mark.parametrize(
    ("path", "split", "kind", "expected"),
    [
        ("nowhere", "test", FileNotFoundError, "nowhere: no such file or folder"),
        ("depth", "test", FileNotFoundError, "rgb: no such folder; expected nyu_depth_v2_labeled.mat"),
        (
            "splits.mat",
            "test",
            ValueError,
            r"splits.mat: not a readable HDF5 file \(a MATLAB 5 file, as splits.mat is\); expected the labelled set, nyu_depth_v2_labeled.mat",
        ),
        ("", "val", ValueError, "'val' is no split of NYU-Depth v2, expected one of train, test"),
    ],
)
def test_what_is_not_the_dataset_is_refused(folder, path, split, kind, expected):
    with pytest.raises(kind, match=expected):
        NYUDepthV2(folder / path, split)


def test_missing_splits_are_named(folder):
    (folder / "splits.mat").unlink()
    assert len(NYUDepthV2(folder)) == 4
    with pytest.raises(FileNotFoundError, match=r"splits\.mat: no such file"):
        NYUDepthV2(folder, "train")


def study(root: Path, monkeypatch, **downstream) -> Study:
    """config/nyu.yaml on other data, with other keys of its downstream section."""
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "config" / "nyu.yaml").read_text())
    config["domain"]["root"] = str(root)
    config["downstream"].update(downstream)
    return Study(config, "nyu.yaml")


def test_predictions_of_whole_pictures_are_measured_at_their_own_size(folder, monkeypatch):
    """An oracle has no error under any alignment, and a depth half as large again is found to be that, on the pixels of the Eigen crop."""
    made, test = study(folder, monkeypatch), NYUDepthV2(folder, "test")
    truth = {test.image(i)[test.part].tobytes(): test.depth(i)[test.part] for i in range(2)}
    oracle, larger = _whole(made, [lambda images, f=factor: np.stack([f * truth[image.tobytes()] for image in images]) for factor in (1, 1.5)], ALIGNMENTS)
    for errors, off in ((oracle, 0), (larger, 0.5)):
        assert sorted({error["image"] for error in errors}) == [2, 4]
        for error in errors:
            assert error["pixels"] == 426 * 560
            assert error["abs_rel"] == pytest.approx(off if error["alignment"] == "none" else 0, abs=1e-6)


def test_constant_maps_are_measured_like_networks(folder, monkeypatch, tmp_path):
    made, train, test = study(folder, monkeypatch), NYUDepthV2(folder, "train"), NYUDepthV2(folder, "test")
    downstream(made, source="constant", out=tmp_path / "constant.csv")
    found = pd.read_csv(tmp_path / "constant.csv").set_index(["source", "alignment", "image"])["abs_rel"]
    assert len(found) == 2 * (3 + 1 + 1)
    depths = np.stack([train.depth(i) for i in range(2)])
    for name, prediction, alignment in (
        ("constant", np.exp(np.log(np.clip(depths, 0.5, 10)).mean(0)), "median"),
        ("constant_disparity", 1 / (1 / depths).mean(0), "scale_shift_disparity"),
        ("flat", np.full((480, 640), 3.0), "median"),
    ):
        expected = DepthProtocol(alignment, crop="eigen").evaluate(prediction[None], test.depth(1)[None])[0]
        assert found[name, alignment, 4] == pytest.approx(expected["abs_rel"], rel=1e-6)


def test_whole_reference_pictures_are_taken_from_the_dataset(folder, monkeypatch, tmp_path):
    """In the dataset's shape, without its frame, and with the depth of each pixel; a network of their shape is trained and tested."""
    made = study(folder, monkeypatch, seeds=1)
    made["downstream"]["reference_whole"].update(shape=[64, 96], training={"steps": 2, "batch_size": 2}, architecture={"imagenet": 4, "enlarge": 1})
    images, depth = _whole_pairs(made)
    train = NYUDepthV2(folder, "train")
    down, right = np.meshgrid((np.arange(64) + 0.5) * 464 / 64 + 7.5, (np.arange(96) + 0.5) * 624 / 96 + 7.5, indexing="ij")  # in the photograph
    found = [round(float(distance[0, 0] - metres(0, down[0, 0], right[0, 0]))) for distance in depth]
    assert sorted(found) == [train.id(i) for i in range(2)]
    for picture, distance, index in zip(images, depth, found, strict=True):
        np.testing.assert_allclose(distance, metres(index, down, right), atol=2e-3)
        assert np.abs(picture.astype(int) - drawn(index, down, right)).max() < 4
    downstream(made, source="reference_whole", out=tmp_path / "whole.csv")
    found = pd.read_csv(tmp_path / "whole.csv")
    assert set(found["image"]) == {2, 4}
    assert set(found["alignment"]) == set(ALIGNMENTS)
    assert (found["pixels"] == 426 * 560).all()


def test_a_source_of_table_4_depends_on_its_own_keys(folder, monkeypatch):
    def stamps(**changes) -> dict[str, str]:
        made = study(folder, monkeypatch, **changes)
        return {source: made.section_hash(*made.downstream_keys(source)) for source in made.sources}

    plain, section = stamps(), yaml.safe_load((ROOT / "config" / "nyu.yaml").read_text())["downstream"]
    assert len(set(plain.values())) >= 2
    for changes, expected in (
        ({"reference_whole": {**section["reference_whole"], "shape": [64, 96]}}, {"reference_whole"}),
        ({"training": {**section["training"], "steps": 1}}, set(plain) - {"reference_whole"}),
        ({"sources": {**section["sources"], "dag": "both"}}, {"dag"}),
        ({"labels": "judged"}, set(section["sources"])),
        ({"seeds": 1}, set(plain)),
    ):
        now = stamps(**changes)
        assert {source for source in plain if now[source] != plain[source]} == expected


def test_the_workflow_takes_whole_reference_pictures_from_the_dataset(nyu_root, tmp_path):
    (checkout(tmp_path) / "models").symlink_to(ROOT / "models")
    target = "results/nyu/metrics/downstream/reference_whole.csv"
    plan = snakemake(tmp_path, "-n", "-p", target, config="config/nyu.yaml")
    assert plan.returncode == 0, plan.stderr[-2000:]
    lines = (plan.stdout + plan.stderr).splitlines()
    (command,) = (line for line in lines if "dag downstream" in line)
    assert "--source reference_whole" in command
    assert f"--out {target}" in command
    assert not {"--pictures", "--test"} & set(command.split())
    # The dataset's squares are made before, so that another dataset, or other pictures of it, make the table anew.
    assert {use for use in ("downstream", "test", "prior") if any(f"--use {use} " in line for line in lines)} == {"downstream", "test"}


def test_networks_of_another_architecture_start_again(folder, monkeypatch, tmp_path):
    """Of the same shapes, as `enlarge` changes none; the state of a training that was cut is not gone on from."""
    whole = {"shape": [64, 96], "training": {"steps": 2, "batch_size": 2}, "architecture": {"imagenet": 4, "enlarge": 1}}
    images, depth = torch.zeros(2, 3, 64, 96), torch.zeros(2, 1, 64, 96)
    for changes in ({}, {}, {"enlarge": 2}, {"frozen": 2}):
        made = study(folder, monkeypatch, reference_whole={**whole, "architecture": whole["architecture"] | changes})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _train(made, "reference_whole", images, depth, 0, tmp_path / "whole.csv")
        assert any("starting again" in str(warning.message) for warning in caught) == bool(changes)


def test_a_source_of_pictures_needs_them(folder, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="pictures is not given, expected the pictures of unguided"):
        downstream(study(folder, monkeypatch), source="unguided", out=tmp_path / "x.csv")


def test_the_config_knows_the_camera():
    """Field of view of the squares, which are as high as a photograph without its frame; the focal length is that of the official toolbox."""
    config = yaml.safe_load((ROOT / "config" / "nyu.yaml").read_text())
    rows = NYUDepthV2.part[0].stop - NYUDepthV2.part[0].start
    assert config["figures"]["fov_degrees"] == pytest.approx(2 * np.degrees(np.arctan(rows / 2 / 519.469611)), abs=0.1)


def test_the_real_set_has_its_official_size(nyu_root):
    train, test = NYUDepthV2(nyu_root, "train"), NYUDepthV2(nyu_root, "test")
    assert (len(train), len(test), len(NYUDepthV2(nyu_root))) == (795, 654, 1449)
    assert not {train.id(i) for i in range(795)} & {test.id(i) for i in range(654)}
    image, frame = test.image(0), np.ones((480, 640), bool)
    frame[test.part] = False
    assert np.median(image[frame].min(-1)) > 240 > np.median(image[~frame].min(-1))  # white
    assert test.depth(0).shape == frame.shape


def test_the_floors_of_the_real_set(nyu_root):
    """Predictions that look at no picture, on the 654 test images; known from elsewhere. At a quarter of the resolution, for time."""
    train, test = (_quarter_depths(NYUDepthV2(nyu_root, split)) for split in ("train", "test"))
    mean, disparity, flat = train.mean(0), 1 / (1 / train).mean(0), np.ones((120, 160), np.float32)
    for prediction, alignment, abs_rel, delta1, rmse in (
        (mean, "none", 0.402, 0.428, 1.10),
        (mean, "median", 0.248, 0.572, 0.83),
        (mean, "scale_shift", 0.233, 0.637, 0.70),
        (disparity, "scale_shift_disparity", 0.213, 0.615, 0.77),
        (flat, "median", 0.323, 0.520, 1.00),
    ):
        errors = summarise(DepthProtocol(alignment, crop="eigen").evaluate(np.broadcast_to(prediction, test.shape), test))
        assert errors["abs_rel"] == pytest.approx(abs_rel, abs=0.005), alignment
        assert errors["delta1"] == pytest.approx(delta1, abs=0.005), alignment
        assert errors["rmse"] == pytest.approx(rmse, abs=0.01), alignment  # known to two digits


def _quarter_depths(pictures: NYUDepthV2) -> np.ndarray:
    return np.stack([pictures.depth(i)[2::4, 2::4] for i in range(len(pictures))])
