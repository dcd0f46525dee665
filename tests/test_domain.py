"""Where pictures come from: the contract of domains, uses of a dataset, and the folder of pictures."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dag.data.domain import Use, check, dataset
from dag.data.folder import Folder
from dag.data.rooms import render
from dag.data.squares import RandomSquares, centre, scaled, scaled_depth
from dag.stages.data import prepare, read
from dag.stages.pretraining import training_squares
from dag.stages.study import Study, StudyError

ROOT = Path(__file__).parent.parent
USES = ("unet", "labels", "validation", "prior", "judge", "reference", "heldout", "downstream", "test")


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def study(domain: dict | None = None, data: dict | None = None, **unet) -> Study:
    """The smoke study with another domain, other uses and other keys of its U-Net."""
    config = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    config["domain"] = domain or config["domain"]
    config["data"].update(data or {})
    config["unet"].update(unet)
    return Study(config, "smoke.yaml")


def picture(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A smooth picture (h, w, 3) that no mirroring or turning leaves as it is."""
    down, right = np.mgrid[0 : shape[0], 0 : shape[1]] / max(shape)
    return np.stack([200 * right + seed, 200 * down, 50 + 100 * right * down], -1).astype(np.uint8)


def folder(root: Path, shapes=((12, 16), (16, 12), (20, 20)), depth: bool = True) -> Path:
    """Pictures a, b, ... with depths of 16-bit millimetres that grow to the right."""
    (root / "rgb").mkdir(parents=True)
    for i, (name, shape) in enumerate(zip("abcdefghij", shapes, strict=False)):
        Image.fromarray(picture(shape, i)).save(root / "rgb" / f"{name}.png")
        if depth:
            (root / "depth").mkdir(exist_ok=True)
            metres = np.broadcast_to(1000 + 100 * np.arange(shape[1]), shape).astype(np.uint16)
            Image.fromarray(metres).save(root / "depth" / f"{name}.png")
    return root


def test_rooms_are_drawn_as_before(tmp_path):
    images, depth, _ = render(np.arange(1400000, 1400064), 16)
    prepare(study(), use="reference", out=tmp_path / "reference.npz")
    stored = read(tmp_path / "reference.npz")
    assert list(stored) == ["images", "depth", "ids"]
    assert (stored["images"].tobytes(), stored["depth"].tobytes()) == (images.tobytes(), depth.tobytes())
    assert (stored["ids"] == np.arange(1400000, 1400064)).all()
    squares, data = training_squares(study(data={"unet": [5, 640]}))
    np.testing.assert_array_equal(squares(np.arange(32, 40)), render(np.arange(37, 45), 16)[0])
    assert data == "rooms from seed 5"


def test_a_drawn_scene_is_a_dataset_of_its_own():
    rooms = dataset({"name": "rooms", "size": 16}, None)
    image, depth, _ = render([7], 16)
    np.testing.assert_array_equal(rooms.image(7), image[0])
    np.testing.assert_array_equal(rooms.depth(7), depth[0])
    assert rooms.id(7) == 7 < len(rooms)


@pytest.mark.parametrize(
    ("value", "use", "index"),
    [("train", Use("train"), range(9)), ([2, 3], Use(None, 2, 3), range(2, 5)), (["train", 4, 5], Use("train", 4, 5), range(4, 9))],
)
def test_a_use_names_pictures(value, use, index):
    assert Use.parse(value) == use
    np.testing.assert_array_equal(use.index(9), index)


@pytest.mark.parametrize("value", [["train", 1], [1, 2, 3], [-1, 2], [1, 0], ["a", "b"], [1, "b"], [1.5, 2], ["a", True, 2]])
def test_what_is_no_use_is_refused(value):
    with pytest.raises(ValueError, match="expected a split"):
        Use.parse(value)


@pytest.mark.parametrize(("use", "count"), [(Use("train", 4, 6), 9), (Use(None, 9), 9), (Use(None, 9, 1), 9)])
def test_more_pictures_than_there_are_are_refused(use, count):
    with pytest.raises(ValueError, match="has 9"):
        use.index(count)


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [("a", "b", False), ("a", "a", True), (["a", 0, 5], ["a", 5, 2], False), (["a", 0, 5], ["a", 4, 2], True), ([0, 5], "a", True), ([0, 5], [5, 9], False)],
)
def test_uses_that_share_pictures(one, other, shared):
    assert Use.parse(one).shares(Use.parse(other)) is Use.parse(other).shares(Use.parse(one)) is shared


FOLDER = {"name": "folder", "size": 16, "root": "pictures"}
APART = {use: "test" if use in ("test", "heldout") else ["train", 90, 5] if use == "validation" else ["train", 0, 90] for use in USES}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": {"test": "train"}}, "data.test may share pictures with data.unet"),
        ({"data": {"validation": "train"}}, "data.validation may share pictures with data.labels"),
        ({"data": {"reference": [0, 10]}}, "data.heldout may share pictures with data.reference"),
        ({"data": {"labels": ["train", 0, 0]}}, "data.labels is"),
        ({"domain": {"name": "folder", "size": 16}}, "domain.root is missing"),
        ({"domain": {**FOLDER, "depth_unit": 0}}, "domain.depth_unit"),
        ({"domain": {**FOLDER, "name": "rooms"}}, "domain.root is set"),
        ({"domain": {"name": "rooms", "size": 16}}, "has no splits"),
        ({"crop": 1.5}, "unet.crop"),
    ],
)
def test_a_dataset_that_cannot_serve_is_refused(changes, expected):
    with pytest.raises(StudyError, match="smoke.yaml: .*" + expected):
        study(**{"domain": FOLDER, **changes, "data": {**APART, **changes.get("data", {})}})


def test_a_drawn_domain_has_no_crops():
    with pytest.raises(StudyError, match="unet.crop"):
        study(crop=0.5)


def test_uses_of_files_may_share_what_trains_different_networks():
    assert check(FOLDER, APART)["unet"] == Use("train", 0, 90)


def test_pictures_become_squares(tmp_path):
    pictures = Folder(folder(tmp_path))
    squares = pictures.squares(np.arange(3), 4)
    assert squares.images.shape == (3, 4, 4, 3)
    assert squares.valid is None
    # The middle 12 of 16 columns in four parts of three pixels, then the left to right of an upright picture.
    np.testing.assert_allclose(squares.depth[0], np.broadcast_to([1.3, 1.6, 1.9, 2.2], (4, 4)), rtol=1e-6)
    np.testing.assert_allclose(squares.depth[1], np.broadcast_to([1.1, 1.4, 1.7, 2.0], (4, 4)), rtol=1e-6)
    assert np.abs(squares.images[2].astype(int) - picture((20, 20), 2)[2::5, 2::5]).max() <= 2
    assert list(squares.ids) == [0, 1, 2]
    np.testing.assert_array_equal(pictures.squares(np.array([2]), 20).images[0], pictures.image(2))


def test_a_picture_lying_on_its_side_is_turned(tmp_path):
    folder(tmp_path)
    upright, exif = Image.fromarray(picture((12, 16))), Image.Exif()
    exif[0x0112] = 6  # stored turned left; shown after a turn to the right
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "rgb" / "a.png", exif=exif)
    pictures = Folder(tmp_path)
    np.testing.assert_array_equal(pictures.image(0), picture((12, 16)))
    assert pictures.depth(0).shape == (12, 16)


def test_unknown_depth_is_filled_and_marked():
    depth = np.full((8, 8), 2.0)
    depth[:4, :4], depth[6:, 6:] = 0, 6.0
    depth[0, 4:6] = 0  # half of a pixel: still known, by its other half
    square, valid = scaled_depth(depth, 4, centre(depth.shape))
    np.testing.assert_array_equal(valid, [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    assert (square[:2] == 2).all()
    assert square[3, 3] == 6


def test_random_squares_depend_on_their_position_alone(tmp_path):
    pictures = Folder(folder(tmp_path, shapes=[(12, 16)] * 5))
    squares = RandomSquares(map(pictures.image, range(5)), 4, smallest=0.5)
    every = squares(np.arange(10))
    np.testing.assert_array_equal(squares(np.arange(3, 6)), every[3:6])
    assert len(np.unique(every.reshape(10, -1), axis=0)) == 10
    mirrored = [square[0, 0, 0] > square[0, -1, 0] for square in squares(np.arange(64))]
    assert 16 < sum(mirrored) < 48  # red grows to the right


def test_every_picture_comes_once_before_any_comes_again(tmp_path):
    pictures = Folder(folder(tmp_path, shapes=[(8, 8)] * 5))
    squares = RandomSquares(map(pictures.image, range(5)), 8, smallest=1.0)
    reds = [square[:, [0, -1], 0].min() for square in squares(np.arange(15))]  # the picture's number, where red begins
    assert [sorted(reds[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert reds[:5] != reds[5:10]


@pytest.mark.parametrize("smallest", [0, 1.1, -1])
def test_an_impossible_square_is_refused(tmp_path, smallest):
    with pytest.raises(ValueError, match="smallest square"):
        RandomSquares([picture((8, 8))], 4, smallest)


def test_scaling_keeps_what_has_the_size():
    image = picture((9, 9))
    np.testing.assert_array_equal(scaled(image, 9, centre(image.shape)), image)


def test_a_folder_of_splits_serves_a_study(tmp_path):
    folder(tmp_path / "train", shapes=[(20, 24)] * 10)
    folder(tmp_path / "test", shapes=[(24, 20)] * 2)
    domain = {"name": "folder", "size": 16, "root": str(tmp_path)}
    uses = {use: "test" if use in ("test", "heldout", "validation") else "train" for use in USES} | {"validation": ["test", 0, 1], "test": ["test", 1, 1]}
    made = study(domain, uses, crop=0.8)
    prepare(made, use="test", out=tmp_path / "test.npz")
    stored = read(tmp_path / "test.npz", "images", "depth", "ids")
    assert stored["images"].shape == (1, 16, 16, 3)
    prepare(made, use="validation", out=tmp_path / "validation.npz")
    assert sorted([*stored["ids"], *read(tmp_path / "validation.npz")["ids"]]) == [0, 1]
    squares, data = training_squares(made)
    assert squares(np.arange(12)).shape == (12, 16, 16, 3)
    assert data == "folder train, squares from 0.8"
    with pytest.raises(ValueError, match="data.labels: pictures 0 to 10 are asked for; split 'train' has 10"):
        prepare(study(domain, {**uses, "labels": ["train", 0, 11]}), use="labels", out=tmp_path / "labels.npz")


def test_pictures_without_depth_have_none(tmp_path):
    squares = Folder(folder(tmp_path, depth=False)).squares(np.arange(3), 8)
    assert squares.depth is None
    assert squares.valid is None
    plain = tmp_path / "plain"
    plain.mkdir()
    Image.fromarray(picture((9, 9))).save(plain / "x.jpg")
    assert Folder(plain).depth(0) is None


def _grey(root: Path):
    Image.fromarray(picture((12, 16))[..., 0]).save(root / "rgb" / "a.png")


def _transparent(root: Path):
    Image.fromarray(picture((12, 16))).convert("RGBA").save(root / "rgb" / "a.png")


def _deep(root: Path):
    """A PNG of 16 bits a colour, which Pillow reads but does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    colours = picture((12, 16)).astype(">u2") * 257
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours))
    header = struct.pack(">IIBBBBB", 16, 12, 16, 2, 0, 0, 0)
    (root / "rgb" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def _cut(root: Path):
    file = root / "rgb" / "a.png"
    file.write_bytes(file.read_bytes()[:100])


def _text(root: Path):
    (root / "rgb" / "a.png").write_text("no picture")


def _shallow(root: Path):
    Image.fromarray(picture((12, 16))[..., 0]).save(root / "depth" / "a.png")


def _other_size(root: Path):
    Image.fromarray(np.ones((16, 12), np.uint16)).save(root / "depth" / "a.png")


def _unknown(root: Path):
    Image.fromarray(np.zeros((12, 16), np.uint16)).save(root / "depth" / "a.png")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_grey, "a.png: a picture of mode L, expected RGB"),
        (_transparent, "a.png: a picture of mode RGBA, expected RGB"),
        (_deep, "a.png: a picture of 16 bits a colour, expected RGB, 8 bits"),
        (_cut, "a.png: not a readable picture"),
        (_text, "a.png: not a readable picture"),
        (_shallow, "depth.a.png: a picture of mode L, expected 16-bit grey"),
        (_other_size, "depth.a.png: 16 x 12 pixels, expected 12 x 16"),
        (_unknown, "a.png: depth is unknown"),
    ],
)
def test_a_spoilt_picture_is_named(tmp_path, spoil, expected):
    spoil(folder(tmp_path))
    with pytest.raises(ValueError, match=expected):
        Folder(tmp_path).squares(np.arange(3), 8)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda root: (root / "depth" / "b.png").unlink(), "2 depth maps for 3 pictures; 'b' is only among the pictures"),
        (lambda root: (root / "rgb" / "b.png").unlink(), "3 depth maps for 2 pictures; 'b' is only among the depths"),
        (lambda root: (root / "rgb" / "b.png").rename(root / "rgb" / "a.jpg"), "two pictures named 'a'"),
        (lambda root: [f.unlink() for f in (root / "rgb").iterdir()], "holds no pictures"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, spoil, expected):
    spoil(folder(tmp_path))
    with pytest.raises(ValueError, match=expected):
        Folder(tmp_path)


def test_a_missing_folder_and_a_split_outside_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        Folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no split"):
        dataset({**FOLDER, "root": str(tmp_path)}, "..")
