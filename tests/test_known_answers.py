"""The stage that asks the study's instruments what is known: it passes on real depth, and stops the study when an instrument is off."""

import numpy as np
import pandas as pd
import pytest

from dag.data.rooms import render
from dag.metrics import distances
from dag.stages import known_answers
from dag.stages.study import Study


@pytest.fixture(params=[{}, {"extractor": "pixels", "dims": 192, "resolution": 8, "resamples": 20}], ids=["efficientnet_lite0", "pixels"])
def asked(tmp_path, monkeypatch, request):
    monkeypatch.chdir(known_answers.Path(__file__).parents[1])
    images, depth, _ = render(range(24), 16)
    np.savez(tmp_path / "heldout.npz", images=images, depth=depth)
    config = Study.load("config/smoke.yaml").config
    study = Study({**config, "evaluation": request.param or config["evaluation"]}, "smoke.yaml")

    def ask():
        known_answers.known_answers(study, heldout=tmp_path / "heldout.npz", out=tmp_path / "answers.csv")
        return pd.read_csv(tmp_path / "answers.csv", dtype=str)

    return ask


def test_instruments_in_order_give_the_known_answers(asked):
    answers = asked()
    assert set(answers.instrument) == {"Fréchet distance", "dFID", "depth errors"}
    exact = answers[~answers.expected.str.startswith("each")]
    assert (exact.found == exact.expected).all()


def test_an_instrument_that_is_off_stops_the_study(asked, tmp_path, monkeypatch):
    right = distances.frechet_distance
    monkeypatch.setattr(distances, "frechet_distance", lambda *moments: 1.001 * right(*moments))
    with pytest.raises(ValueError, match=r"3 of 14 are off, the first of Fréchet distance: shifted by one .*: 40.04, expected 40"):
        asked()
    assert not (tmp_path / "answers.csv").exists()


@pytest.mark.parametrize("fault", known_answers.FAULTS)
def test_faults_change_depth_and_keep_it_positive(fault):
    depth = render(range(3), 32)[1]
    weak, strong = (known_answers.plant(depth, fault, strength) for strength in (1, 3))
    assert 0 < np.abs(weak - depth).mean() < np.abs(strong - depth).mean()
    assert min(weak.min(), strong.min()) > 0
    assert weak.shape == depth.shape
