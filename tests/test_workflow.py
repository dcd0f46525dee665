"""The workflow: the smoke study end to end in a folder of its own, what a change re-runs, and what is refused before anything runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import checkout, snakemake

from dag.metrics.extractors import load_extractor
from dag.stages import evaluation
from dag.stages.artefacts import content_hash
from dag.stages.evaluation import FEATURES
from dag.stages.shards import together
from dag.stages.study import Study

ROOT = Path(__file__).parent.parent
SMOKE = ROOT / "config" / "smoke.yaml"


def jobs(output: str) -> set[str]:
    """Rules in the job table of a dry run."""
    table = re.search(r"Job stats:\n(.*?)\ntotal", output, re.S)
    return {line.split()[0] for line in table.group(1).splitlines()[2:]} if table else set()


def test_smoke_study_makes_every_table_and_figure(smoke):
    results = smoke / "results" / "smoke"
    for name in ("fig4a_blocks", "fig4b_labels", "table1_guidance", "table3_prior_resolution", "fig8_scale", "table4_downstream"):
        for kind in ("csv", "md", "tex"):
            assert (results / "tables" / f"{name}.{kind}").stat().st_size > 0
    for name in ("fig3", "fig4a", "fig4b", "fig5", "fig6", "fig8", "samples"):
        for kind in ("png", "svg"):
            assert (results / "figures" / f"{name}.{kind}").stat().st_size > 0
    assert "<title>Depth-aware guidance: study smoke</title>" in (results / "index.html").read_text()
    table = pd.read_csv(results / "tables" / "table1_guidance.csv")
    assert {"dfid", "dfid_low", "dfid_high", "fid", "fid_low", "fid_high", "n", "seconds_per_sample"} <= set(table.columns)
    assert {"baseline", "dpg", "dcg"} <= set(table.run)
    assert (table.dfid_low <= table.dfid).all()
    assert (table.dfid <= table.dfid_high).all()


def test_a_finished_study_has_nothing_to_do(smoke):
    again = snakemake(smoke, "--cores", "2")
    assert again.returncode == 0
    assert "Nothing to be done" in again.stderr + again.stdout


def test_a_finished_study_is_whole(smoke):
    done = subprocess.run([sys.executable, "-m", "dag", "verify", "results/smoke"], cwd=smoke, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_changed_row_reruns_what_depends_on_it_alone(smoke):
    sheet = smoke / "config" / "runs" / "smoke.tsv"
    text = sheet.read_text()
    rows = [line.split("\t") for line in text.splitlines()]
    changed = [row[: rows[0].index("tau")] + ["250"] + row[rows[0].index("tau") + 1 :] if row[0] == "prior8" else row for row in rows]
    sheet.write_text("\n".join("\t".join(row) for row in changed) + "\n")
    try:
        plan = snakemake(smoke, "-n")
    finally:
        sheet.write_text(text)
    assert plan.returncode == 0, plan.stderr
    stats = re.findall(r"^(sample|describe)\s+(\d+)$", plan.stdout + plan.stderr, re.M)
    assert set(stats) == {("sample", "1"), ("describe", "1")}
    assert not jobs(plan.stdout + plan.stderr) & {"prepare", "train_unet", "heads", "prior", "judge", "measure_sweep", "downstream"}


def test_a_changed_plot_redraws_the_plot_alone(smoke):
    script = smoke / "workflow" / "scripts" / "figure_scale.py"
    text, date = script.read_text(), script.stat().st_mtime_ns
    script.write_text(text + "\n# drawn anew\n")
    try:
        plan = snakemake(smoke, "-n")
    finally:
        script.write_text(text)
        os.utime(script, ns=(date, date))  # Snakemake goes by a script's date
    assert jobs(plan.stdout + plan.stderr) == {"all", "figure_scale", "page", "manifest"}


def test_a_changed_config_key_reruns_only_its_readers(smoke):
    config = yaml.safe_load(SMOKE.read_text())
    config["downstream"]["seeds"] += 1
    (smoke / "config" / "other.yaml").write_text(yaml.safe_dump(config))
    plan = snakemake(smoke, "-n", config="config/other.yaml")
    assert jobs(plan.stdout + plan.stderr) == {"all", "downstream", "table_downstream", "timings", "page", "manifest"}


def test_gain_sets_unets_of_fewer_images_beside_the_studys_own(smoke):
    results = smoke / "results" / "smoke"
    done = snakemake(smoke, "--cores", "2", "gain")
    assert done.returncode == 0, done.stderr[-4000:]
    table = pd.read_csv(results / "tables" / "gain.csv")
    # The study's own U-Net is that of table 1, number for number.
    assert list(zip(table.images, table.run, strict=True)) == [(320, "baseline"), (320, "both"), (640, "baseline"), (640, "both")]
    first = pd.read_csv(results / "tables" / "table1_guidance.csv").set_index("run").loc[["baseline", "both"]]
    assert table.dfid[2:].tolist() == first.dfid.tolist()
    assert (table.dfid[:2].to_numpy() != first.dfid.to_numpy()).all()
    assert table.dfid_diff.isna().tolist() == [True, False, True, False]
    assert "20 steps of 16" in (results / "gain" / "320" / "unet" / "README.md").read_text()
    assert "warm-up over 2 steps" in (results / "gain" / "320" / "unet" / "README.md").read_text()
    for kind in ("png", "svg"):
        assert (results / "figures" / f"gain.{kind}").stat().st_size > 0
    again = snakemake(smoke, "-n", "gain")
    assert "Nothing to be done" in again.stderr + again.stdout


def test_gain_without_its_section_is_refused_in_one_line(smoke):
    config = yaml.safe_load(SMOKE.read_text())
    del config["gain"]
    (smoke / "config" / "without.yaml").write_text(yaml.safe_dump(config))
    done = snakemake(smoke, "-n", "gain", config="config/without.yaml")
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("snakemake: ")][0].endswith(
        "gain is missing; `snakemake gain` trains U-Nets on its `images`"
    )


@pytest.mark.parametrize("name", ["dinov2", "pixels"])
def test_a_study_describes_its_pictures_by_any_extractor(smoke, tiny_dinov2, tmp_path, monkeypatch, name):
    monkeypatch.chdir(smoke)
    sections = {"dinov2": {"dims": 24, "resolution": 28, "weights": str(tiny_dinov2)}, "pixels": {"dims": 48, "resolution": 4}}
    config = yaml.safe_load(Path("config/smoke.yaml").read_text())
    other = Study({**config, "evaluation": {"extractor": name, "resamples": 20, **sections[name]}}, "smoke.yaml")
    models, heldout = Path("results/smoke/models"), Path("results/smoke/data/heldout.npz")
    networks = {"unet": models / "unet", "heads": models / "heads" / "labels10.safetensors", "judge": models / "judge.safetensors"}
    evaluation.describe(other, pictures=heldout, **networks, second_judge=models / "second_judge.safetensors", out=tmp_path / "real.npz")
    with np.load(tmp_path / "real.npz") as found, np.load(heldout) as pictures:
        dims, resolution = sections[name]["dims"], sections[name]["resolution"]
        assert str(found["extractor"]) == f"{name}-{dims}@{resolution}"
        assert {found[key].shape for key in FEATURES.values()} == {(16, dims)}
        options = {"resolution": resolution, "weights": sections[name].get("weights")}
        np.testing.assert_array_equal(found["image_features"], load_extractor(name, **options)(pictures["images"]))


def test_variants_have_heads_and_priors_of_their_own(smoke):
    from safetensors.torch import load_file

    models = smoke / "results" / "smoke" / "models"
    layers = {
        name: sum(key.startswith("strong.layers.") and key.endswith("norm.weight") for key in load_file(models / "heads" / f"{name}.safetensors"))
        for name in ("labels10", "labels10_layers1")
    }
    assert layers == {"labels10": 2, "labels10_layers1": 1}
    assert (models / "prior16_linear").is_dir()
    assert not (models / "prior16_layers1").exists()  # the prior does not read that key
    table = pd.read_csv(smoke / "results" / "smoke" / "tables" / "sensitivity.csv").set_index("run")
    assert table.changed["s_layers1"] == "heads.layers 1"
    assert table.changed["s_linear"] == "depth.coding linear"
    assert table.dfid_second.notna().all()


def test_several_runs_in_one_process_have_the_bits_of_jobs_of_their_own(smoke, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(smoke, folder, symlinks=True)
    config = yaml.safe_load(SMOKE.read_text())
    (folder / "config" / "several.yaml").write_text(yaml.safe_dump({**config, "compute": {"runs_per_job": 3}}))
    names = ["baseline", "equal_compute"]
    runs = together(Study.load(folder / "config" / "several.yaml").runs, 3)
    assert names in runs, runs
    files = [f"results/smoke/samples/{name}.npz" for name in names]
    for file in files:
        (folder / file).unlink()
    done = snakemake(folder, "--cores", "1", *files, config="config/several.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"^(sample\S*)\s+(\d+)$", done.stdout + done.stderr, re.M) == [("sample_from_baseline", "1")]
    # Snakemake dates every output of a job anew; what is written anew is another file, and its record tells another time.
    beside = (folder / files[0]).stat().st_ino, (folder / files[0]).with_suffix(".json").read_text()
    for file in files:
        assert content_hash(folder / file) == content_hash(smoke / file)
        one, other = (json.loads((place / file).with_suffix(".json").read_text()) for place in (folder, smoke))
        for key in ("run", "seeds", "recipe", "inputs", "outputs", "unet_evaluations"):
            assert one[key] == other[key], (file, key)
    # A changed row: the process is started again, and draws that run alone.
    sheet = folder / "config" / "runs" / "smoke.tsv"
    rows = [line.split("\t") for line in sheet.read_text().splitlines()]
    sheet.write_text("\n".join("\t".join([*row[:2], "5", *row[3:]] if row[0] == "equal_compute" else row) for row in rows) + "\n")
    judged = [f"results/smoke/judged/{name}.npz" for name in names]
    plan = snakemake(folder, "-n", *judged, config="config/several.yaml")
    # The price: what stands on the runs beside it is made again, too (config/README.md, compute.runs_per_job).
    assert set(re.findall(r"^(sample\S*|describe)\s+(\d+)$", plan.stdout + plan.stderr, re.M)) == {("sample_from_baseline", "1"), ("describe", "2")}
    done = snakemake(folder, "--cores", "1", *files, config="config/several.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    changed = [file for file in files if content_hash(folder / file) != content_hash(smoke / file)]
    assert changed == files[1:]
    assert ((folder / files[0]).stat().st_ino, (folder / files[0]).with_suffix(".json").read_text()) == beside


def edited(folder: Path, **changes) -> Path:
    """A checkout whose smoke config has other values at dotted keys."""
    checkout(folder)
    config = yaml.safe_load(SMOKE.read_text())
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        section = config
        for key in path:
            section = section[key]
        section[last] = value
    (folder / "config" / "smoke.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"heads.colour": 3}, ["smoke.yaml", "heads", "colour"]),
        ({"heads.strong": [2, 14]}, ["heads.strong", "[14]", "0 to 9"]),
        ({"heads.labels": {10: 8, 5000: 8}}, ["heads.labels", "5000", "10"]),
        ({"unet.path": "models/nowhere"}, ["unet.path", "models/nowhere", "does not exist"]),
        ({"data.test": [1400010, 16]}, ["data.test", "data.reference", "share"]),
        ({"runs": "config/runs/none.tsv"}, ["config/runs/none.tsv", "does not exist"]),
        ({"depth.near": 20.0}, ["depth.near", "20", "near < far"]),
        ({"depth.near": float("nan")}, ["depth.near", "nan", "finite"]),
    ],
)
def test_a_bad_config_is_refused_in_one_line(tmp_path, changes, expected):
    done = snakemake(edited(tmp_path, **changes), "-n")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("snakemake: ")]
    assert len(lines) == 1, done.stderr
    assert all(part in lines[0] for part in expected), lines[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("lost", ["study", None])
def test_what_a_config_lacks_does_not_come_from_the_default_one(tmp_path, lost):
    """lost: a key, or None for all of them."""
    config = yaml.safe_load((edited(tmp_path) / "config" / "smoke.yaml").read_text())
    rest = {key: value for key, value in config.items() if lost not in (key, None)}
    (tmp_path / "config" / "smoke.yaml").write_text(yaml.safe_dump(rest))
    done = snakemake(tmp_path, "-n")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("snakemake: ")]
    assert len(lines) == 1, done.stderr
    assert "smoke.yaml: top level: " in lines[0]
    assert "is a required property" in lines[0]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_refuses_a_config_that_is_not_there_before_it_sets_up():
    command = ["make", "--no-print-directory", "--dry-run", "study", "CONFIG=config/none.yaml"]  # within `make test`, it would name its folder
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == ""
    assert re.fullmatch(r"Makefile:\d+: \*\*\* CONFIG=config/none\.yaml: no such file; .*\n", done.stderr)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda rows: [*rows, rows[1]], ["baseline", "more than once"]),
        (lambda rows: [rows[0], *([*row[:8], "64", *row[9:]] for row in rows[1:])], ["row 'baseline'", "prior is 64", "[8, 16]"]),
        (lambda rows: [rows[0], [rows[1][0], "euler", *rows[1][2:]], *rows[2:]], ["row 'baseline'", "sampler", "euler"]),
        (lambda rows: [row[:-1] for row in rows], ["row 'baseline'", "tables"]),
        (lambda rows: [rows[0], [*rows[1][:2], "many", *rows[1][3:]], *rows[2:]], ["row 'baseline'", "steps", "many"]),
    ],
)
def test_a_bad_run_sheet_is_refused_in_one_line(tmp_path, edit, expected):
    checkout(tmp_path)
    sheet = tmp_path / "config" / "runs" / "smoke.tsv"
    rows = [line.split("\t") for line in sheet.read_text().splitlines()]
    sheet.write_text("\n".join("\t".join(row) for row in edit(rows)) + "\n")
    done = snakemake(tmp_path, "-n")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("snakemake: ")]
    assert len(lines) == 1, done.stderr
    assert all(part in lines[0] for part in ["smoke.tsv", *expected]), lines[0]


def test_truncated_weights_are_refused_before_any_job(tmp_path, smoke):
    shutil.copytree(smoke / "results" / "smoke" / "models" / "unet", tmp_path / "models" / "cut")
    weights = tmp_path / "models" / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = snakemake(edited(tmp_path, **{"unet.path": "models/cut"}), "-n")
    assert done.returncode != 0
    assert "damaged" in done.stderr
    assert str(Path("models/cut/unet/diffusion_pytorch_model.safetensors")) in done.stderr


def test_a_stage_says_in_one_line_what_is_wrong(smoke):
    command = [sys.executable, "-m", "dag", "describe", "--config", "config/smoke.yaml", "--pictures", "nowhere.npz"]
    command += ["--unet", "results/smoke/models/unet", "--heads", "x.safetensors", "--judge", "y.safetensors", "--out", "z.npz"]
    done = subprocess.run(command, cwd=smoke, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("dag describe: nowhere.npz: ")
    assert done.stderr.count("\n") == 1


def test_nan_in_the_weights_stops_the_features(smoke, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(smoke / "results" / "smoke" / "models" / "unet", tmp_path / "unet")
    weights = tmp_path / "unet" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_in.bias"][0] = torch.nan
    save_file(state, weights)
    command = [sys.executable, "-m", "dag", "features", "--config", "config/smoke.yaml", "--unet", str(tmp_path / "unet"), "--levels", "2", "--blocks", "all"]
    command += ["--data", "results/smoke/data/labels.npz", "--count", "2", "--out", str(tmp_path / "f.npy")]
    done = subprocess.run(command, cwd=smoke, capture_output=True, text=True)
    assert done.returncode == 2
    assert "not finite" in done.stderr
    assert not (tmp_path / "f.npy").exists()
