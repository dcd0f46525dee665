"""What a config or run sheet may not say, and what a run depends on."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dag.stages.study import Study, StudyError

ROOT = Path(__file__).parent.parent
HEADER, *ROWS = [line.split("\t") for line in (ROOT / "config" / "runs" / "smoke.tsv").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def study(**changes) -> Study:
    """The smoke study with other values at keys like figures__seeds."""
    config = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        section = config
        for part in path:
            section = section[part]
        section[last] = value
    return Study(config, "smoke.yaml")


WHOLE = {"shape": [64, 96], "architecture": {"imagenet": 4}, "training": {"steps": 1, "batch_size": 1}}


def test_a_guided_source_of_table_4_is_compared_with_likewise_labelled_unguided_samples():
    sources = {
        "unguided": "baseline",
        "more": "equal_compute",
        "dag": "both",
        "dag_judged": {"run": "both", "labels": "judged"},
        "u_judged": {"run": "baseline", "labels": "judged"},
    }
    made = study(downstream__sources=sources)
    found = {source: made.baseline_source(source) for source in made.sources}
    assert found == {"reference": None, "unguided": None, "more": None, "dag": "unguided", "dag_judged": "u_judged", "u_judged": None, "constant": None}
    del made["downstream"]["sources"]["u_judged"]
    assert made.baseline_source("dag_judged") is None


def with_sheet(folder: Path, run: str = "", without: str = "", config: dict | None = None, **cells) -> Study:
    """The smoke study with other cells in one row of its sheet, or without a row."""
    rows = [[cells.get(key, cell) if row[0] == run else cell for key, cell in zip(HEADER, row, strict=True)] for row in ROWS if row[0] != without]
    path = folder / "runs.tsv"
    path.write_text("\n".join("\t".join(row) for row in [HEADER, *rows]) + "\n")
    return study(runs=str(path), **(config or {}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"figures__guided": "none"}, ["figures.guided", "'none'", "baseline"]),
        ({"figures__runs": ["baseline", "none"]}, ["figures.runs", "'none'"]),
        ({"figures__seeds": 40}, ["figures.seeds", "40", "16"]),
        ({"downstream__sources": {"dag": "none"}}, ["downstream.sources.dag", "'none'"]),
        ({"downstream__sources": {"reference": "both"}}, ["downstream.sources", "reference"]),
        ({"heads__labels": {"10": 8}}, ["heads.labels", "'10'"]),
        ({"domain__size": 20}, ["unet", "20", "multiple of 16"]),
        ({"prior__resolutions": [8, 10]}, ["prior", "10", "multiple of 4"]),
        ({"heads__validation_t": [1000]}, ["heads.validation_t", "1000"]),
        ({"unet__training__processes": 3}, ["unet.training.processes", "3", "batch_size 16"]),
        ({"prior__training__processes": 3}, ["prior.training.processes is 3", "a divisor of prior.training.batch_size 16"]),
        ({"judge__training__processes": 2}, ["judge.training.processes is 2", "expected 1"]),
        ({"heads__training__gradient_accumulation_steps": 2}, ["heads.training.gradient_accumulation_steps is 2", "expected 1"]),
        ({"judge__architecture__norm_num_groups": 6}, ["judge.architecture.norm_num_groups", "6", "16"]),
        ({"unet__architecture__block_out_channels": [16, 16, 16, 16]}, ["unet.architecture.down_block_types", "5 levels", "expected 4"]),
        ({"downstream__training__seed": 3}, ["downstream.training.seed", "downstream.seeds"]),
        ({"downstream__whole": True, "estimator": {"model": "assets/dpt-large"}}, ["downstream.whole is true where an estimator gives", "expected a dataset"]),
        ({"downstream__reference_whole": WHOLE}, ["downstream.reference_whole is set without downstream.whole: true"]),
        (
            {"downstream__whole": True, "downstream__reference_whole": {**WHOLE, "training": {"steps": 1, "batch_size": 1, "seed": 1}}},
            ["reference_whole.training.seed"],
        ),
        (
            {"downstream__whole": True, "downstream__reference_whole": {**WHOLE, "architecture": {"imagenet": 4, "enlarge": 1}, "shape": [96, 80]}},
            ["downstream.reference_whole works at 80 pixels, expected a multiple of 32"],
        ),
        ({"downstream__reference_whole": {**WHOLE, "shape": [64]}}, ["downstream.reference_whole.shape", "[64]"]),
        ({"variants": {"fast": {"sampling.clip": False}}}, ["variants.fast changes sampling.clip, expected ", "heads.layers", "depth.coding"]),
        ({"variants": {"fast": {"heads.labels": {10: 4}}}}, ["variants.fast changes heads.labels, expected "]),
        ({"variants": {"flat": {"heads.layers": 0}}}, ["variants.flat: heads.layers: 0"]),
        ({"variants": {"high": {"heads.weak": [20]}}}, ["variants.high: heads.weak", "[20]", "0 to 9"]),
        ({"variants": {"odd": {"prior.architecture.colour": 3}}}, ["variants.odd: prior.architecture", "'colour'"]),
        ({"variants": {"near": {"depth.near": 20.0}}}, ["variants.near: depth.near is 20.0", "near < far"]),
        ({"variants": {"shuffled": {"heads.layers": 1}}}, ["variants", "'shuffled'"]),
        ({"variants": {"same": {}}}, ["variants.same", "{}"]),
        ({"second_judge": {"training": {"steps": 1, "batch_size": 1}}}, ["second_judge.architecture is missing"]),
        ({"second_judge__architecture__norm_num_groups": 6}, ["second_judge.architecture.norm_num_groups is 6"]),
        ({"data__downstream": [1600000, 17]}, ["data.downstream has 17 pictures", "the run 'baseline' of downstream.sources.unguided 16 samples"]),
        ({"evaluation__permutations": 9}, ["evaluation", "'permutations' was unexpected", "allowed: dims, extractor"]),
        ({"gain": {"images": [4]}}, ["gain.images has 4, expected at least unet.training.batch_size 16"]),
        ({"figures__unguided": "sweep_baseline", "figures__seeds": 1}, ["figures.guided 'both'", "figures.unguided"]),
    ],
)
def test_a_config_that_cannot_run_is_refused(changes, expected):
    with pytest.raises(StudyError) as error:
        study(**changes)
    assert all(part in str(error.value) for part in ["smoke.yaml", *expected])


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({"run": "dpg", "tau": "-5"}, ["'dpg'", "tau", "-5"]),
        ({"run": "dpg", "window": "500-100"}, ["'dpg'", "window", "500-100"]),
        ({"run": "dpg", "w_dp": "nan"}, ["'dpg'", "w_dp", "nan"]),
        ({"run": "dpg", "w_dp": "bset"}, ["'dpg'", "w_dp", "'bset'", "a number from 0, or best"]),
        ({"run": "dpg", "n": "2"}, ["'dpg'", "n", "2"]),
        ({"run": "dpg", "steps": "60"}, ["'dpg'", "steps", "60"]),
        ({"run": "dpg", "tables": "tabel1"}, ["'dpg'", "tables", "tabel1"]),
        ({"run": "sweep_dc30", "w_dc": "best"}, ["'sweep_dc30'", "best", "fig8"]),
        ({"without": "sweep_dc30"}, ["'dcg'", "best", "fig8"]),
        ({"run": "dpg", "first_seed": "10000"}, ["'dpg'", "sweep_baseline", "seeds"]),
        ({"run": "dpg", "variant": "layers9"}, ["'dpg'", "variant is 'layers9'", "layers1, linear"]),
        ({"run": "dpg", "tables": "table2"}, ["rows are of table1 and of table2", "expected one of them"]),
    ],
)
def test_a_run_that_cannot_run_is_refused(tmp_path, edit, expected):
    with pytest.raises(StudyError) as error:
        with_sheet(tmp_path, **edit)
    assert all(part in str(error.value) for part in ["runs.tsv", *expected])


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"extractor": "efficientnet_lite0", "dims": 81, "resolution": 64}, "evaluation.dims is 81, expected one of 16, 24, 40"),
        ({"extractor": "efficientnet_lite0", "dims": 16, "resolution": 100}, "evaluation.resolution is 100, expected a multiple of 32"),
        ({"extractor": "efficientnet_lite0", "dims": 16, "resolution": 64, "weights": "w"}, "evaluation.weights is w, expected no such key for efficientnet"),
        ({"extractor": "efficientnet_lite0", "dims": 16, "resolution": 64, "sha256": "0" * 64}, "evaluation.sha256 is set, expected no such key"),
        ({"extractor": "inception", "dims": 2048, "resolution": 128}, "evaluation has 2048 dims at resolution 128, expected 2048 at 299"),
        ({"extractor": "dinov2", "dims": 768, "resolution": 128}, "evaluation.resolution is 128, expected a multiple of 14 for dinov2"),
        ({"extractor": "dinov2", "dims": 40, "resolution": 224}, "evaluation.dims is 40, expected 768, the hidden size of dinov2 facebook/dinov2-base"),
        ({"extractor": "pixels", "dims": 40, "resolution": 8}, "evaluation.dims is 40, expected 192 for pixels at resolution 8"),
        ({"extractor": "vgg", "dims": 40, "resolution": 8}, "evaluation.extractor: 'vgg' is not one of"),
    ],
)
def test_an_extractor_that_cannot_be_is_refused_before_anything_is_drawn(section, expected):
    with pytest.raises(StudyError, match=re.escape(expected)):
        study(evaluation={**section, "resamples": 20})


def test_every_extractor_may_be_asked_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 24}))
    for name, dims, resolution, more in (
        ("inception", 2048, 299, {}),
        ("dinov2", 768, 224, {}),
        ("dinov2", 24, 28, {"weights": str(tmp_path)}),
        ("pixels", 192, 8, {}),
    ):
        found = study(evaluation={"extractor": name, "dims": dims, "resolution": resolution, "resamples": 20, **more})["evaluation"]
        assert (found["extractor"], found["dims"], found["resolution"]) == (name, dims, resolution)


def test_a_variant_changes_its_keys_and_what_they_make(tmp_path):
    plain = study()
    linear, shallow = plain.varied("linear"), plain.varied("layers1")
    assert (linear["depth"]["coding"], plain["depth"]["coding"]) == ("linear", "log")
    assert plain.varied("none") is plain
    # Depth is coded for both networks; the layers are the heads' alone, and the prior stays the study's.
    assert [plain.variant_of("s_linear", network) for network in ("heads", "prior")] == ["linear", "linear"]
    assert [plain.variant_of("s_layers1", network) for network in ("heads", "prior")] == ["layers1", ""]
    assert plain.variant_of("both", "heads") == ""
    assert shallow.section_hash("prior", "depth") == plain.section_hash("prior", "depth") != linear.section_hash("prior", "depth")
    assert shallow.section_hash("heads.layers") != plain.section_hash("heads.layers")
    short = study(variants={**plain["variants"], "short": {"heads.training.steps": 3}}).varied("short")
    assert short["heads"]["training"] == {**plain["heads"]["training"], "steps": 3}
    with pytest.raises(StudyError, match="no variant 'deep'; there are layers1, linear"):
        plain.varied("deep")


def test_other_blocks_need_the_features_of_the_heads_that_guide(tmp_path):
    config = {"variants": {"layers1": {"heads.weak": [3]}, "linear": {"depth.coding": "linear"}}}
    assert study(**config).variant_of("s_layers1", "heads") == "layers1"
    with pytest.raises(StudyError, match=r"row 's_layers1': heads is 1, expected 'guide' with variant 'layers1'"):
        with_sheet(tmp_path, "s_layers1", heads="1", config=config)


def test_a_row_does_not_change_with_another(tmp_path):
    """A fraction in one row must not turn the zeros of other rows, which say that a run is unguided, into floats."""
    plain = study()
    changed = with_sheet(tmp_path, "sweep_dc30", w_dc="0.5", n="16.0")
    assert changed.run("sweep_dc30")["n"] == 16
    assert all(changed.run_hash(run) == plain.run_hash(run) for run in plain.runs.index if run != "sweep_dc30")
    assert changed.baseline_of("dpg") == "baseline"
    assert changed.baseline_of("sweep_dc30") == "sweep_baseline"
    assert changed.baseline_of("baseline") is None


def test_an_unknown_run_is_named():
    with pytest.raises(StudyError, match="no run 'none'; there are baseline"):
        study().run("none")


def test_groups_are_thirty_two_where_the_config_does_not_say():
    architecture = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())["prior"]["architecture"]
    del architecture["norm_num_groups"]
    with pytest.raises(StudyError, match="prior.architecture.norm_num_groups is 32, expected a divisor"):
        study(prior__architecture=architecture)


def test_a_pretrained_unet_is_what_the_config_says_or_says_nothing(tmp_path):
    """`unet.architecture` and the rest are for training: beside a U-Net that is there they may be left out, but not be another's."""
    config = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    described = config["unet"]
    (tmp_path / "unet").mkdir()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({**described["architecture"], "sample_size": 16}))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "v_prediction"}))
    path = str(tmp_path)
    assert study(unet={"path": path}).unet_architecture()["layers_per_block"] == 1
    assert study(unet={**described, "path": path}).unet_architecture()["sample_size"] == 16
    for other, expected in (
        ({"prediction_type": "epsilon"}, "unet.prediction_type is epsilon, expected v_prediction"),
        ({"architecture": {**described["architecture"], "layers_per_block": 2}}, "unet.architecture.layers_per_block is 2, expected 1"),
    ):
        with pytest.raises(StudyError, match=expected):
            study(unet={**described, **other, "path": path})


def test_a_unet_to_be_trained_is_described():
    with pytest.raises(StudyError, match="unet.architecture is missing; with unet.path null"):
        study(unet={"path": None})
    with pytest.raises(StudyError, match="unet.path is nowhere, which does not exist"):
        study(unet={"path": "nowhere"})


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "unet").mkdir()
    with pytest.raises(StudyError, match="folder without weights"):
        study(unet__path=str(tmp_path)).check_weights()


def test_weights_are_known_by_their_content(tmp_path):
    weights, hashes = tmp_path / "unet.safetensors", []
    for content in (b"one", b"two", b"one"):
        weights.write_bytes(content)
        hashes.append(study(unet__path=str(tmp_path)).weights_hash())
    assert hashes[0] == hashes[2] != hashes[1]


def test_a_study_is_made_by_one_process_at_a_time(tmp_path, monkeypatch):
    made, other = study(), study(downstream__seeds=3)
    monkeypatch.chdir(tmp_path)
    made.save()
    saved = made.saved_config.read_text()
    with pytest.raises(StudyError, match="results/smoke: another Snakemake is making this study; wait for its end, or give yours another `study` name"):
        other.save()
    assert made.saved_config.read_text() == saved
    del made
    other.save()
    assert yaml.safe_load(other.saved_config.read_text())["downstream"]["seeds"] == 3


def test_a_study_is_not_begun_anew_while_jobs_of_a_killed_snakemake_go_on(tmp_path, monkeypatch):
    """On Slurm they run on without it; what they still write must not come among the files of another config."""
    job = """
import os, sys, yaml
from dag.stages.study import Study
study = Study(yaml.safe_load(open("config/smoke.yaml")))
os.chdir(sys.argv[1])
with study.at_work():
    print("at work", flush=True)
    sys.stdin.read()
"""
    made, later = study(), study(downstream__seeds=3)
    (tmp_path / "results" / "smoke").mkdir(parents=True)
    command = [sys.executable, "-c", job, str(tmp_path)]
    jobs = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}) for _ in range(2)]
    monkeypatch.chdir(tmp_path)
    try:
        assert [each.stdout.readline() for each in jobs] == ["at work\n"] * 2
        for each in jobs:
            with pytest.raises(StudyError, match="results/smoke: jobs are at work on this study, of a killed Snakemake or begun by hand; wait .* scancel"):
                made.save()
            assert not made.saved_config.exists()
            each.kill()
            each.wait()
    finally:
        for each in jobs:
            each.kill()
            each.communicate()
    later.save()
    with later.at_work(), later.at_work():  # jobs of a Snakemake that is there
        assert (tmp_path / "results" / "smoke" / ".jobs").exists()
    assert yaml.safe_load(later.saved_config.read_text())["downstream"]["seeds"] == 3


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    made = study()
    monkeypatch.chdir(tmp_path)

    def unknown(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with pytest.warns(UserWarning, match="results/smoke: its file system has no locks .*start no second Snakemake"):
        made.save()
    assert made.saved_config.exists()
