"""The paper's own study run whole, in miniature, on stand-ins of every file it reads; and what is wrong with one of them shows before any sampling."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import checkout, snakemake
from diffusers.models.unets.unet_2d import UNet2DModel
from standins import ADM_MINI_FLAGS, write_all, write_lmdb

from dag.stages.counting import Counted
from dag.stages.planning import costs
from dag.stages.study import Study
from dag.weights import sha256

ROOT = Path(__file__).parent.parent
MINI = "config/paper-mini.yaml"

pytestmark = pytest.mark.full_study


@pytest.fixture(scope="module")
def mini(tmp_path_factory) -> Path:
    """The study in miniature, run once."""
    for package in ("transformers", "lmdb", "h5py"):
        pytest.importorskip(package)
    folder = checkout(tmp_path_factory.mktemp("paper"))
    write_all(folder / "assets" / "mini")
    done = snakemake(folder, "--cores", "2", config=MINI)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_every_rule_runs_on_stand_ins(mini):
    results = mini / "results" / "paper-mini"
    for name in ("fig4a_blocks", "fig4b_labels", "table1_guidance", "table3_prior_resolution", "fig8_scale", "table4_downstream", "sensitivity"):
        assert (results / "tables" / f"{name}.csv").stat().st_size > 0
    for name in ("fig3", "fig4a", "fig4b", "fig5", "fig6", "fig8", "samples"):
        assert (results / "figures" / f"{name}.png").stat().st_size > 0
    distances = pd.read_csv(results / "metrics" / "distances.csv")
    assert set(distances.extractor) >= {"inception-2048@299"}
    table = (results / "tables" / "table1_guidance.md").read_text()
    assert "15.71" in table
    assert "Inception features" not in table  # its own are
    assert json.loads((results / "models" / "unet" / "source.json").read_text())["source"] == "assets/mini/lsun_bedroom.pt"
    assert set(pd.read_csv(results / "metrics" / "downstream" / "reference.csv").image) == {2, 4}
    records = [json.loads((results / "models" / f"prior{side}.json").read_text()) for side in (8, 16)]
    assert [record["resolution"] for record in records] == [8, 16]
    moments = json.loads((results / "metrics" / "moments.json").read_text())["outputs"]
    assert moments["results/paper-mini/metrics/moments.npz"]["sha256"] == sha256(results / "metrics" / "moments.npz")
    again = snakemake(mini, "--cores", "2", config=MINI)
    assert "Nothing to be done" in again.stderr + again.stdout


def test_a_church_of_diffusers_goes_through_the_same_rules(mini, tmp_path):
    """A folder in the layout of google/ddpm-church-256, to Table 2 with the published numbers beside."""
    folder = checkout(tmp_path)
    shutil.copytree(mini / "assets" / "mini", folder / "assets" / "mini")
    configs = [MINI, "config/runs/paper-mini-church.yaml"]
    table = folder / "results" / "paper-mini-church" / "tables" / "table2_guidance.md"
    done = snakemake(folder, "--cores", "2", str(table.relative_to(folder)), config=configs)
    assert done.returncode == 0, done.stderr[-4000:]
    assert {"17.69", "17.43", "17.40", "17.31"} <= set(re.findall(r"\d\d\.\d\d", table.read_text()))
    assert len(pd.read_csv(table.with_suffix(".csv")).run.unique()) >= 4
    unet = UNet2DModel.from_pretrained(folder / "results" / "paper-mini-church" / "models" / "unet").state_dict()
    published = torch.load(folder / "assets" / "mini" / "ddpm-church-256" / "diffusion_pytorch_model.bin", weights_only=True)
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
        published = {key.replace(f".{old}.", f".{new}."): value for key, value in published.items()}
    assert unet.keys() == published.keys()
    assert all(torch.equal(value, published[key]) for key, value in unet.items())


def test_its_disk_is_what_the_plan_says(mini, monkeypatch):
    """Of what grows with pictures, to the byte."""
    monkeypatch.chdir(mini)
    config = yaml.safe_load((mini / MINI).read_text())
    config["data"]["test"] = ["test", 0, 2]  # of which the stand-in has fewer than the 654 of NYU-Depth v2
    study = Study(config)
    disk = {cost.stage: cost.disk for cost in costs(study, Counted(study))}
    results = mini / "results" / "paper-mini"

    def written(files: Iterable[Path], *names: str) -> int:
        return sum(array[name].nbytes for file in files for array in [np.load(file)] for name in names if name in array)

    assert disk["label"] == written((results / "data").glob("*.npz"), "images", "depth")
    assert disk["prepare"] == written((results / "data" / "pictures").glob("*.npz"), "images", "depth")
    assert disk["features"] == sum(np.load(file).nbytes for file in (results / "features").glob("*.npy"))
    assert disk["sample both"] == written((results / "samples").glob("both.npz"), "images")
    assert disk["sample both"] == written((results / "samples" / "both").glob("*.npz"), "images")
    split = [run for run in study.runs.index if (results / "samples" / run).is_dir()]
    assert disk["join"] == sum(disk[f"sample {run}"] for run in split)
    kinds = ("judged", "strong", "image_features", "depth_features", "strong_features")
    assert disk["describe"] == written((results / "judged").glob("*.npz"), *kinds)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_its_features_are_those_of_cleanfid_on_png_files(mini, tmp_path):
    """From the study's own pictures to its table; that distances are clean-fid's too: tests/test_extractors.py."""
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W
    from PIL import Image

    results = mini / "results" / "paper-mini"
    features, moments = {}, np.load(results / "metrics" / "moments.npz")
    for name, pictures in (("baseline", "samples/baseline.npz"), ("reference", "data/reference.npz")):
        (tmp_path / name).mkdir()
        for at, image in enumerate(np.load(results / pictures)["images"]):
            Image.fromarray(image).save(tmp_path / name / f"{at:03d}.png")
        network = InceptionV3W(str(mini / "assets" / "mini"), download=False)
        options = {"mode": "clean", "num_workers": 0, "batch_size": 8, "device": torch.device("cpu"), "verbose": False}
        features[name] = get_folder_features(str(tmp_path / name), network, **options)
        np.testing.assert_array_equal(np.load(results / "judged" / f"{name}.npz")["image_features"], features[name])
    np.testing.assert_allclose(moments["image_features_mu"], features["reference"].mean(0, dtype=np.float64), atol=1e-9)
    np.testing.assert_allclose(moments["image_features_sigma"], np.cov(features["reference"], rowvar=False), atol=1e-7)
    # tr sqrt(S1 S2) as the sum of singular values of the centred features' product, which is exact for few pictures.
    fake, real = (f.astype(np.float64) - f.mean(0, dtype=np.float64) for f in (features["baseline"], features["reference"]))
    root = np.linalg.svd(fake @ real.T, compute_uv=False).sum() / ((len(fake) - 1) * (len(real) - 1)) ** 0.5
    spread = (fake**2).sum() / (len(fake) - 1) + (real**2).sum() / (len(real) - 1)
    means = features["baseline"].mean(0, dtype=np.float64) - features["reference"].mean(0, dtype=np.float64)
    distances = pd.read_csv(results / "metrics" / "distances.csv").set_index(["run", "metric"])
    assert distances.value["baseline", "fid"] == pytest.approx((means**2).sum() + spread - 2 * root, rel=1e-6)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def other_flags(assets: Path) -> None:
    (assets / "lsun_bedroom.json").write_text(json.dumps({**ADM_MINI_FLAGS, "num_channels": 64}))


def pictures(folder: Path, *values: bytes) -> None:
    """The database of LSUN made anew, of other values."""
    shutil.rmtree(folder)
    write_lmdb(folder, {f"{i:040x}".encode(): value for i, value in enumerate(values)})


SPOILT = {
    "truncated checkpoint": (lambda assets, _: cut(assets / "lsun_bedroom.pt"), r"dag convert: \S+lsun_bedroom\.pt: not a whole PyTorch file of tensors .*"),
    "flags of another": (lambda assets, _: other_flags(assets), r"dag convert: .* num_channels is 64, the shapes imply 32"),
    "missing database": (
        lambda assets, _: shutil.rmtree(assets / "lsun"),
        r"dag asset: assets/mini/lsun: missing; python tests/standins\.py writes it; put it at assets/mini/lsun \(licence MIT\)",
    ),
    "database without pictures": (lambda assets, _: pictures(assets / "lsun" / "bedroom_val_lmdb"), r"dag prepare: \S+bedroom_val_lmdb: holds no pictures"),
    "pictures that do not decode": (
        lambda assets, _: pictures(assets / "lsun" / "bedroom_val_lmdb", *[b"no picture"] * 8),
        r"dag prepare: \S+bedroom_val_lmdb: 0+\d: not a readable picture .* domain\.corrupt = 0\.001 of 4 allows",
    ),
    "splits for labels": (
        lambda assets, _: shutil.copy(assets / "nyu" / "splits.mat", assets / "nyu" / "nyu_depth_v2_labeled.mat"),
        r"dag prepare: \S+nyu_depth_v2_labeled\.mat: not a readable HDF5 file \(a MATLAB 5 file, as splits\.mat is\); expected the labelled set, .*",
    ),
    "hub out of reach": (
        lambda _, config: config["judge"].update(model="no-one/has-this"),
        r"dag judge: no-one/has-this: no such file or folder, and the hub does not give .* give the path of their folder",
    ),
    "hash of an asset": (
        lambda _, config: config["assets"]["inception"].update(sha256="0" * 64),
        r"dag asset: \S+inception-2015-12-05\.pt: SHA-256 is \w+, expected 0+; .*",
    ),
    "hash of the weights": (
        lambda _, config: config["evaluation"].update(sha256="0" * 64),
        r"dag describe: \S+inception-2015-12-05\.pt: SHA-256 is \w+, expected 0+; .*",
    ),
}


# Each fault has a quick test where it is found; that none of them reaches the samples is shown here, by two quickly, by all slowly.
QUICK = {"truncated checkpoint", "hash of an asset"}


@pytest.mark.parametrize("spoilt", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SPOILT])
def test_whatever_is_wrong_shows_in_one_line_before_any_sampling(mini, tmp_path, spoilt):
    """In a study that has made all but its samples; what it checks of assets it checks anew."""
    folder, (spoil, line) = tmp_path / "study", SPOILT[spoilt]
    shutil.copytree(mini, folder, symlinks=True)
    results = folder / "results" / "paper-mini"
    for made in (results / "samples", results / "logs", results / "assets"):
        shutil.rmtree(made)
    config = yaml.safe_load((folder / MINI).read_text())
    spoil(folder / "assets" / "mini", config)
    (folder / MINI).write_text(yaml.safe_dump(config))
    done = snakemake(folder, "--cores", "2", "results/paper-mini/samples/baseline.npz", config=MINI)
    assert done.returncode != 0
    logs = [file.read_text() for file in (results / "logs").rglob("*.log")]
    assert [re.fullmatch(line + r"\n", text) is not None for text in logs if text.startswith("dag ")] == [True], logs
    assert not (results / "logs" / "sample").exists()
