"""The stages moments and measure: what of described pictures they compare, and what they refuse to compare."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from dag.metrics.distances import frechet_distance, paired_bootstrap
from dag.metrics.distances import moments as moments_of
from dag.stages.evaluation import FEATURES, measure, moments
from dag.stages.study import Study

ROOT = Path(__file__).parent.parent
LABEL, D = "efficientnet_lite0-16@64", 16


def described(path: Path, n: int, seed: int, **changes) -> Path:
    """What `describe` writes of n pictures, with features of one spread and some arrays changed (None: left out)."""
    rng = np.random.default_rng(seed)
    arrays = {"seeds": np.arange(n), "extractor": LABEL, **{key: rng.normal(seed / 10, 1, (n, D)).astype(np.float32) for key in FEATURES.values()}}
    np.savez(path, **{key: value for key, value in {**arrays, **changes}.items() if value is not None})
    return path


@pytest.fixture
def study(monkeypatch) -> Study:
    monkeypatch.chdir(ROOT)
    return Study(yaml.safe_load(Path("config/smoke.yaml").read_text()), "smoke.yaml")


@pytest.fixture
def measured(study, tmp_path):
    """The distances of baseline and both, of files that differ from good ones as told."""

    def run(both=None, reference=None, moments_file=None, real=None, of=study) -> pd.DataFrame:
        files = {"baseline": described(tmp_path / "baseline.npz", 16, 1), "both": described(tmp_path / "both.npz", 16, 2, **(both or {}))}
        truth = described(tmp_path / "reference.npz", 64, 0)
        moments(study, reference=truth, out=tmp_path / "moments.npz")
        if moments_file:
            np.savez(tmp_path / "moments.npz", **{**np.load(tmp_path / "moments.npz"), **moments_file})
        described(truth, 64, 0, **(reference or {}))
        options = {"reference": truth, "moments": tmp_path / "moments.npz", "out": tmp_path / "distances.csv"}
        measure(of, runs=list(files), judged=list(files.values()), real=real, **options)
        return pd.read_csv(tmp_path / "distances.csv")

    return run


def test_every_judge_is_measured_against_the_reference(measured, tmp_path):
    table = measured().set_index(["run", "metric"])
    assert set(FEATURES) <= set(table.index.get_level_values("metric"))
    with np.load(tmp_path / "both.npz") as both, np.load(tmp_path / "reference.npz") as reference:
        for metric, key in FEATURES.items():
            expected = frechet_distance(*moments_of(both[key]), *moments_of(reference[key]))
            assert table.loc[("both", metric), "value"] == pytest.approx(expected, rel=1e-6)
    assert set(table.extractor) == {LABEL}
    assert set(table.n) == {16}


def test_real_pictures_are_measured_as_many_as_samples(measured, tmp_path):
    """A Fréchet distance falls with n: the floor is that of the unguided run's n, of the first of more pictures."""
    table = measured(real=described(tmp_path / "real.npz", 40, 3)).set_index(["run", "metric"])
    with np.load(tmp_path / "real.npz") as real, np.load(tmp_path / "reference.npz") as reference:
        expected = frechet_distance(*moments_of(real[FEATURES["fid"]][:16]), *moments_of(reference[FEATURES["fid"]]))
    assert table.loc[("real", "fid"), "value"] == pytest.approx(expected, rel=1e-6)
    assert table.loc[("real", "fid"), "n"] == 16


def test_dfid_beyond_that_of_the_own_head_compares_their_factors(measured):
    table = measured().set_index(["run", "metric"])
    for run, number in (("baseline", "value"), ("both", "value"), ("both", "diff")):
        of = {metric: table.loc[(run, metric)] for metric in ("dfid", "dfid_strong", "dfid_gap")}
        judge, head = (of[metric].value / (of[metric].value - of[metric]["diff"] if number == "diff" else 1) for metric in ("dfid", "dfid_strong"))
        assert of["dfid_gap"][number] == pytest.approx(np.log(judge / head), rel=1e-6)
    assert table.loc[("both", "dfid_gap"), "diff_low"] < table.loc[("both", "dfid_gap"), "diff_high"]


def test_distances_do_not_depend_on_the_threads_that_measure_them(study, measured, tmp_path):
    alone = measured()
    files = {"judged": [tmp_path / "baseline.npz", tmp_path / "both.npz"], "reference": tmp_path / "reference.npz", "moments": tmp_path / "moments.npz"}
    measure(study, runs=["baseline", "both"], **files, out=tmp_path / "threads.csv", threads=3)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "threads.csv"), alone, check_exact=True)


def test_resamples_are_those_of_the_config(study, measured, tmp_path):
    table = measured().set_index(["run", "metric"])
    images, baseline, reference = (np.load(described(tmp_path / "some.npz", n, seed))["image_features"] for n, seed in ((16, 2), (16, 1), (64, 0)))
    expected = paired_bootstrap(moments_of(reference), images, baseline, resamples=study["evaluation"]["resamples"])
    assert tuple(table.loc[("both", "fid"), ["low", "high", "diff_low", "diff_high", "p"]]) == pytest.approx(
        (expected.low, expected.high, expected.diff_low, expected.diff_high, expected.p)
    )
    assert table.loc["both"].p.notna().all()


def test_without_a_second_judge_none_is_measured(study, measured, tmp_path):
    alone = Study({key: value for key, value in study.config.items() if key != "second_judge"}, "smoke.yaml")
    table = measured(both={"second_features": None}, of=alone)
    assert "dfid_second" not in set(table.metric)


def test_runs_without_their_baseline_or_their_file_are_refused(study, measured, tmp_path):
    measured()
    files = {"reference": tmp_path / "reference.npz", "moments": tmp_path / "moments.npz", "out": tmp_path / "alone.csv"}
    with pytest.raises(ValueError, match="'both' has the baseline 'baseline', which is not among both; name it"):
        measure(study, runs=["both"], judged=[tmp_path / "both.npz"], **files)
    with pytest.raises(ValueError, match="judged: 1 files for 2 runs"):
        measure(study, runs=["baseline", "both"], judged=[tmp_path / "both.npz"], **files)
    assert not files["out"].exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"both": {"extractor": "pixels-16@64"}}, r"both\.npz: is of the extractor pixels-16@64, expected efficientnet_lite0-16@64, .* stage `describe`"),
        ({"both": {"extractor": None}}, r"both\.npz: has no extractor"),
        ({"both": {"depth_features": np.zeros((16, 8))}}, "all 16 rows of features are equal"),
        ({"both": {"depth_features": np.random.default_rng(0).normal(size=(16, 8))}}, "features and reference: features of different width, 8 and 16"),
        ({"both": {"depth_features": np.full((16, D), np.nan)}}, "features hold NaN or infinity in 16 of 16 rows"),
        ({"both": {"second_features": None}}, r"both\.npz: has no second_features"),
        ({"both": {"seeds": np.arange(12)}}, r"both\.npz: is of 12 pictures, expected 16; run the stage `describe`"),
        ({"both": {"seeds": np.arange(16)[::-1]}}, r"both\.npz: its seeds are not those of .*baseline\.npz, its baseline"),
        ({"reference": {"extractor": "inception-2048@299"}}, r"reference\.npz: is of the extractor inception-2048@299"),
        ({"reference": {"seeds": np.arange(60)}}, r"reference\.npz: is of 60 pictures, expected 64"),
        ({"moments_file": {"extractor": "inception-2048@299"}}, r"moments\.npz: is of the extractor inception-2048@299, .* stage `moments`"),
        ({"moments_file": {"n": 60}}, r"moments\.npz: is of 60 pictures, expected 64; run the stage `moments`"),
        ({"moments_file": {"depth_features_sigma": -np.eye(D)}}, "smallest eigenvalue of sigma is -1"),
    ],
)
def test_files_that_do_not_belong_together_are_refused_by_name(measured, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        measured(**changes)
    assert not (tmp_path / "distances.csv").exists()
