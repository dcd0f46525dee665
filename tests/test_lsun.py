"""LSUN: database, folder and zip hold the same pictures; guided-diffusion's crop; subsets by seed; what cannot be read."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from standins import drawn_pictures, encoded, write_lmdb

from dag.data.domain import dataset
from dag.data.lsun import FILTERS, LSUN, square
from dag.stages.data import prepare, read
from dag.stages.study import Study, StudyError

pytest.importorskip("lmdb")


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    """24 pictures of several shapes, webp and jpeg, by name."""
    return {f"{i:040x}.{kind}": encoded(image, kind) for i, (image, kind) in enumerate(zip(drawn_pictures(24), ["webp", "jpeg"] * 12, strict=True))}


@pytest.fixture(scope="module")
def places(pictures, tmp_path_factory) -> dict[str, Path]:
    """The same pictures as a database, a folder with subfolders and a zip."""
    root = tmp_path_factory.mktemp("lsun")
    write_lmdb(root / "bedroom_train_lmdb", {name.encode(): data for name, data in pictures.items()})
    for name, data in pictures.items():
        file = root / "folder" / name[:39] / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (root / "folder" / "list.txt").write_text("no picture")
    with zipfile.ZipFile(root / "train.zip", "w") as archive:
        archive.writestr("list.txt", "no picture")
        for name, data in pictures.items():
            archive.writestr(f"bedroom/{name}", data)
    return {"lmdb": root / "bedroom_train_lmdb", "folder": root / "folder", "zip": root / "train.zip"}


@pytest.mark.parametrize("kind", ["lmdb", "folder", "zip"])
def test_every_kind_of_place_gives_the_same_pictures(places, pictures, kind):
    source = LSUN(places[kind])
    assert len(source) == 24
    found = source.squares(np.arange(24), 16)
    assert sorted(found.ids) == list(range(24))
    assert found.depth is None
    assert found.valid is None
    for image, i in zip(found.images, found.ids, strict=True):
        original = Image.open(io.BytesIO(list(pictures.values())[i])).convert("RGB")
        np.testing.assert_array_equal(image, square(original, 16, FILTERS["area"]))
    np.testing.assert_array_equal(source.image(3), np.asarray(Image.open(io.BytesIO(list(pictures.values())[source.id(3)])).convert("RGB")))
    assert source.depth(3) is None
    assert not source.unreadable


@pytest.mark.parametrize("shape", [(341, 256), (256, 300), (257, 400), (64, 64), (999, 500)])
def test_squares_are_cut_as_guided_diffusion_cuts_lsun(shape):
    """Written down from its datasets/lsun_bedroom.py: BOX to a short side of 64, whole pixels, then the middle."""
    height, width = shape
    image = drawn_pictures(1, [shape])[0]
    factor = 64 / min(width, height)
    expected = np.array(Image.fromarray(image).resize((int(round(factor * width)), int(round(factor * height))), resample=Image.BOX))
    down, right = (expected.shape[0] - 64) // 2, (expected.shape[1] - 64) // 2
    np.testing.assert_array_equal(square(Image.fromarray(image), 64, FILTERS["area"]), expected[down : down + 64, right : right + 64])
    assert (square(Image.fromarray(image), 64, FILTERS["lanczos"]) != expected[down : down + 64, right : right + 64]).any() or shape == (64, 64)


def test_subsets_follow_from_the_seed_alone(places):
    first, again, other = (LSUN(places[kind], order=order) for kind, order in (("lmdb", 1), ("zip", 1), ("lmdb", 2)))
    taken = first.squares(np.arange(5, 15), 8)
    np.testing.assert_array_equal(again.squares(np.arange(5, 15), 8).images, taken.images)
    assert list(taken.ids) != list(range(5, 15))
    assert list(other.squares(np.arange(5, 15), 8).ids) != list(taken.ids)
    assert not set(taken.ids) & set(first.squares(np.r_[0:5, 15:24], 8).ids)


def test_a_split_is_found_under_the_names_that_lsun_has(places):
    root = places["folder"].parent
    with pytest.raises(FileNotFoundError, match=r"split 'train' should be one of .* found train\.zip, bedroom_train_lmdb"):
        dataset({"name": "lsun", "size": 8, "root": str(root)}, "train")
    with pytest.raises(FileNotFoundError, match=r"split 'val' should be one of val, val\.zip and <category>_val_lmdb there, found none"):
        dataset({"name": "lsun", "size": 8, "root": str(root)}, "val")
    with pytest.raises(ValueError, match=r"'\.\./x' is no split"):
        dataset({"name": "lsun", "size": 8, "root": str(root)}, "../x")
    assert dataset({"name": "lsun", "size": 8, "root": str(root)}, "folder").place == places["folder"]


@pytest.fixture
def damaged(pictures, tmp_path) -> Path:
    """A database with 3 of 24 pictures that do not decode: empty, cut short, not a picture."""
    items = {name.encode(): data for name, data in pictures.items()}
    for key, data in zip(sorted(items)[4:7], (b"", items[sorted(items)[5]][:60], b"not a picture"), strict=True):
        items[key] = data
    return write_lmdb(tmp_path / "church_val_lmdb", items)


def test_pictures_that_do_not_decode_are_counted_listed_and_left_out(damaged):
    source = LSUN(damaged, corrupt=0.2)
    found = source.squares(np.arange(24), 8)
    assert len(found.images) == len(found.ids) == 21
    assert sorted(found.ids) == [*range(4), *range(7, 24)]
    assert sorted(source.unreadable) == [f"{damaged}: {i:040x}.{kind}" for i, kind in ((4, "webp"), (5, "jpeg"), (6, "webp"))]
    assert all("not a readable picture" in reason for reason in source.unreadable.values())
    again = LSUN(damaged, corrupt=0.2)
    again.squares(np.arange(24), 8)
    assert again.unreadable == source.unreadable  # which the provenance holds: no address of an object in memory
    with pytest.raises(ValueError, match=r"church_val_lmdb: 0{39}[456]\.\w+: not a readable picture .*; 3 of \d+ pictures .* domain\.corrupt = 0\.1 of 24"):
        LSUN(damaged, corrupt=0.1).squares(np.arange(24), 8)
    with pytest.raises(ValueError, match=r"not a readable picture .*; 1 of \d+ pictures so far are not readable, more than the share"):
        LSUN(damaged).squares(np.arange(24), 8)


def test_places_without_pictures_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such database, folder or zip"):
        LSUN(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="empty_lmdb: holds no pictures"):
        LSUN(write_lmdb(tmp_path / "empty_lmdb", {}))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder: holds no pictures"):
        LSUN(tmp_path / "folder")
    (tmp_path / "cut.zip").write_bytes(b"PK\3\4 cut")
    with pytest.raises(ValueError, match=r"cut\.zip: not a whole zip file"):
        LSUN(tmp_path / "cut.zip")
    (tmp_path / "folder" / "data.mdb").write_bytes(b"no database")
    with pytest.raises(ValueError, match="folder: not a whole LMDB database"):
        LSUN(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"domain\.resample is 'cubic', expected one of area, lanczos"):
        LSUN(tmp_path, resample="cubic")


USES = {
    "unet": ["train", 0, 4],
    "labels": ["train", 0, 10],
    "validation": ["train", 12, 4],
    "prior": ["train", 0, 10],
    "judge": ["train", 0, 10],
    "reference": ["train", 0, 10],
    "heldout": ["train", 16, 4],
    "downstream": ["train", 0, 8],
    "test": ["train", 20, 4],
}


@pytest.fixture
def study(places, tmp_path, monkeypatch):
    """The smoke study on LSUN, labelled by a DPT; its working folder is the project's."""
    from standins import write_dpt

    root = Path(__file__).parent.parent
    monkeypatch.chdir(root)
    config = yaml.safe_load((root / "config" / "smoke.yaml").read_text())
    (tmp_path / "lsun").mkdir()
    (tmp_path / "lsun" / "bedroom_train_lmdb").symlink_to(places["lmdb"])
    config.update(domain={"name": "lsun", "size": 16, "root": str(tmp_path / "lsun")}, data=USES)
    config.update(estimator={"model": str(write_dpt(tmp_path / "dpt", 16))}, judge={"model": str(tmp_path / "dpt")})
    return Study(config, "lsun.yaml")


def test_lsun_is_labelled_by_dpt_and_goes_on_where_it_was_killed(study, tmp_path, monkeypatch):
    from dag.stages import labelling

    raw, out = tmp_path / "pictures.npz", tmp_path / "labels.npz"
    prepare(study, use="labels", out=raw)
    assert set(read(raw)) == {"images", "ids"}
    monkeypatch.setattr(labelling, "_PART", 4)
    estimate, calls = labelling.estimate, []

    def killed(*arguments):
        calls.append(len(arguments[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return estimate(*arguments)

    monkeypatch.setattr(labelling, "estimate", killed)
    with pytest.raises(KeyboardInterrupt):
        labelling.label(study, pictures=raw, out=out)
    assert not out.exists()
    labelling.label(study, pictures=raw, out=out)
    assert calls == [4, 4, 2, 2]
    whole = read(out, "images", "ids", "depth")
    monkeypatch.setattr(labelling, "_PART", 100)
    labelling.label(study, pictures=raw, out=tmp_path / "again.npz")
    np.testing.assert_allclose(read(tmp_path / "again.npz")["depth"], whole["depth"], rtol=1e-5)
    assert whole["depth"].shape == (10, 16, 16)
    assert (whole["depth"].min(), whole["depth"].max()) == pytest.approx((0.5, 10.0))
    np.testing.assert_array_equal(whole["images"], read(raw)["images"])
    assert not out.with_suffix(".parts").exists()
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["estimator"]["sha256"].keys() == {"model.safetensors"}
    assert facts["pictures"]["unreadable"] == {}
    labelling.label(study, pictures=out, out=tmp_path / "twice.npz")
    np.testing.assert_array_equal(read(tmp_path / "twice.npz")["depth"], whole["depth"])


def test_a_dpt_may_be_the_judge_and_must_stay_the_same(study, tmp_path):
    from dag.estimators import estimate, load_pretrained
    from dag.stages.evaluation import load_judge
    from dag.stages.models import coding, judge

    judge(study, out=tmp_path / "judge.safetensors")
    images = np.stack(drawn_pictures(2, [(16, 16)]))
    found = estimate(load_judge(tmp_path / "judge.safetensors", coding(study)), images, coding(study))
    np.testing.assert_array_equal(found, estimate(load_pretrained(tmp_path / "dpt", coding(study))[0], images, coding(study)))
    weights = tmp_path / "dpt" / "model.safetensors"
    state = load_file(weights)
    state["head.head.0.bias"] += 1
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"dpt: has other weights than when .*judge\.safetensors was made; run the stage `judge` again"):
        load_judge(tmp_path / "judge.safetensors", coding(study))


TRAINING = {"steps": 1, "batch_size": 1}


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ({"model": "a/b", "training": TRAINING}, "judge.training is set, but judge.model names a network that is trained"),
        ({"training": TRAINING}, "judge.architecture is missing, expected architecture and training, or model"),
        ({"architecture": {}, "training": TRAINING, "output": "metres"}, "judge"),
    ],
)
def test_a_judge_is_trained_or_pretrained(study, judge, words):
    with pytest.raises(StudyError, match=words):
        Study({**study.config, "judge": judge}, "lsun.yaml")
    with pytest.raises(StudyError, match=r"domain\.order is set, but the domain 'rooms' takes only a size"):
        Study({**study.config, "domain": {"name": "rooms", "size": 16, "order": 1}}, "lsun.yaml")


def test_downstream_networks_may_be_tested_on_another_domain(study, tmp_path):
    from standins import write_nyu

    write_nyu(tmp_path / "nyu")
    elsewhere = {**study["downstream"], "domain": {"name": "nyu", "root": str(tmp_path / "nyu")}}
    other = Study({**study.config, "downstream": elsewhere, "data": {**USES, "test": "test"}}, "lsun.yaml")
    prepare(other, use="test", out=tmp_path / "test.npz")
    found = read(tmp_path / "test.npz")
    assert found["images"].shape == (2, 16, 16, 3)
    assert list(found["ids"]) == [2, 4]
    assert found["depth"].min() > 0
    with pytest.raises(StudyError, match=r"data\.test is 'val'; the splits of the domain 'nyu' are train, test"):
        Study({**study.config, "downstream": elsewhere, "data": {**USES, "test": "val"}}, "lsun.yaml")
    wrong = {**study["downstream"], "domain": {"name": "nyu", "depth_unit": 1}}
    with pytest.raises(StudyError, match=r"domain of data\.test\.depth_unit is set, but the domain 'nyu' takes root"):
        Study({**study.config, "downstream": wrong, "data": {**USES, "test": "test"}}, "lsun.yaml")
