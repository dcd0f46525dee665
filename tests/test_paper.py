"""The paper's own study: planned with nothing of it here, and run whole in miniature on stand-ins of every file it reads."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import checkout
from standins import write_all

from dag.weights import sha256

ROOT = Path(__file__).parent.parent
MINI = "config/paper-mini.yaml"


def snakemake(folder: Path, *arguments: str, config: str | list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "snakemake", "--configfile", *([config] if isinstance(config, str) else config), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def counts(output: str) -> dict[str, int]:
    """{rule: jobs} of a dry run."""
    table = re.search(r"Job stats:\n(.*?)\ntotal", output, re.S)
    return {line.split()[0]: int(line.split()[1]) for line in table.group(1).splitlines()[2:]}


def test_50000_samples_are_the_same_runs():
    for study in ("paper", "paper-church"):
        few, many = (pd.read_csv(ROOT / "config" / "runs" / f"{study}{more}.tsv", sep="\t") for more in ("", "50k"))
        assert few.drop(columns="n").equals(many.drop(columns="n"))
        assert dict(zip(few.n, many.n, strict=True)) == {5000: 50000, 1000: 5000}


@pytest.mark.parametrize(
    ("study", "more", "options"),
    [("paper", "", []), ("paper", "50k", []), ("paper", "50k", ["--profile", "slurm"]), ("paper-church", "", []), ("paper-church", "50k", [])],
)
def test_the_study_is_planned_with_no_asset_present(tmp_path, study, more, options):
    configs = [f"config/{study}.yaml", *([f"config/runs/{study}{more}.yaml"] if more else [])]
    plan = snakemake(checkout(tmp_path), "-n", *options, config=configs)
    assert plan.returncode == 0, plan.stderr[-2000:]
    found, runs = counts(plan.stdout + plan.stderr), pd.read_csv(ROOT / "config" / "runs" / f"{study}{more}.tsv", sep="\t")
    config = yaml.safe_load((ROOT / "config" / f"{study}.yaml").read_text())
    parts = [math.ceil(n / config["compute"]["shard_size"]) for n in runs["n"]]
    assert found["asset"] == len(config["assets"])
    assert (found.get("sample", 0), found["sample_shard"], found["join"]) == (parts.count(1), sum(n for n in parts if n > 1), sum(n > 1 for n in parts))
    assert (found["describe"], found["convert_unet"], found["prior"]) == (len(runs) + 2, 1, 5)
    assert not {"fetch", "fetch_asset", "train_unet"} & found.keys()
    assert set(runs.query("tables.str.contains('table[12]')")["n"]) == {50000 if more else 5000}


def test_the_study_in_miniature_has_every_rule_of_the_whole(tmp_path):
    checkout(tmp_path)
    write_all(tmp_path / "assets" / "mini")
    whole, mini = (snakemake(tmp_path, "-n", config=config) for config in ("config/paper.yaml", MINI))
    assert counts(whole.stdout).keys() == counts(mini.stdout).keys()


def test_both_readings_of_40_and_every_resolution_of_the_prior_are_runs():
    runs = pd.read_csv(ROOT / "config" / "runs" / "paper.tsv", sep="\t").set_index("run")
    assert {"mean", "mean_variance"} <= set(runs[(runs.w_dc == 40) & (runs.w_dp == 40)].rule)
    table3 = runs[runs.tables.str.contains("table3") & (runs.w_dp > 0)]
    assert set(table3.prior) == {32, 64, 128, 256}


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
    assert "15.71" in (results / "tables" / "table1_guidance.md").read_text()
    assert json.loads((results / "models" / "unet" / "source.json").read_text())["source"] == "assets/mini/lsun_bedroom.pt"
    assert set(pd.read_csv(results / "metrics" / "downstream" / "reference.csv").image) == {2, 4}
    records = [json.loads((results / "models" / f"prior{side}.json").read_text()) for side in (8, 16)]
    assert [record["resolution"] for record in records] == [8, 16]
    moments = json.loads((results / "metrics" / "moments.json").read_text())["outputs"]
    assert moments["results/paper-mini/metrics/moments.npz"]["sha256"] == sha256(results / "metrics" / "moments.npz")
    again = snakemake(mini, "--cores", "2", config=MINI)
    assert "Nothing to be done" in again.stderr + again.stdout


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


def test_whatever_is_wrong_with_an_asset_shows_before_any_sampling(mini, tmp_path):
    folder = checkout(tmp_path)
    shutil.copytree(mini / "assets", folder / "assets")
    weights = folder / "assets" / "mini" / "inception-2015-12-05.pt"
    config = yaml.safe_load((folder / MINI).read_text())
    config["assets"]["inception"]["sha256"] = "0" * 64
    shutil.rmtree(folder / "assets" / "mini" / "lsun")
    (folder / MINI).write_text(yaml.safe_dump(config))
    done = snakemake(folder, "--cores", "2", "--keep-going", *(f"results/paper-mini/assets/{name}.json" for name in ("inception", "lsun")), config=MINI)
    assert done.returncode != 0
    logs = folder / "results" / "paper-mini" / "logs" / "asset"
    assert re.fullmatch(rf"dag asset: {re.escape(str(weights.relative_to(folder)))}: SHA-256 is \w+, expected 0+; .*\n", (logs / "inception.log").read_text())
    assert (logs / "lsun.log").read_text() == (
        "dag asset: assets/mini/lsun: missing; python tests/standins.py writes it; put it at assets/mini/lsun (licence MIT)\n"
    )
    plan = snakemake(folder, "-n", "results/paper-mini/samples/baseline.npz", config=MINI)
    assert counts(plan.stdout + plan.stderr)["asset"] == len(config["assets"])


def test_fetch_looks_at_every_asset_anew_and_says_what_to_put_where(tmp_path):
    folder = checkout(tmp_path)
    write_all(folder / "assets" / "mini")

    def fetch() -> tuple[int, set[str], str]:
        done = snakemake(folder, "--cores", "2", "--keep-going", "fetch", config=MINI)
        return done.returncode, set(re.findall(r"wildcards: name=(\w+)", done.stderr)), done.stderr

    every = {"unet", "lsun", "dpt", "nyu", "inception"}
    assert fetch()[:2] == (0, every)
    shutil.move(folder / "assets" / "mini" / "dpt", folder / "dpt")
    status, _, said = fetch()
    assert status != 0
    assert "dag fetch: dpt: python tests/standins.py writes it; put it at assets/mini/dpt (licence MIT)\n" in said
    (folder / "assets" / "mini" / "lsun_bedroom.pt").unlink()  # which the last call has found
    shutil.move(folder / "dpt", folder / "assets" / "mini" / "dpt")
    status, looked, said = fetch()
    assert status != 0
    assert looked >= {"dpt", "unet"}
    assert "dag fetch: unet: " in said
    assert not (folder / "results" / "paper-mini" / "samples").exists()
