"""Memory and time that jobs ask for: what they grow with, against a U-Net of known size, and every stage of both shipped studies."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dag.__main__ import ON_DEVICE
from dag.stages.resources import activations, asked, operations
from dag.stages.study import Study

ROOT = Path(__file__).parent.parent
# guided-diffusion's U-Net for LSUN at 256x256: 4.83 GiB of activations an image, measured with autograd's saved tensors.
ADM = {"block_out_channels": [256, 256, 512, 512, 1024, 1024], "layers_per_block": 2}


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def study(name: str = "smoke", **compute) -> Study:
    config = yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text())
    return Study({**config, "compute": compute})


def test_a_unet_of_known_size_is_estimated_well():
    assert activations(ADM, 256) == pytest.approx(4.83 * 1024, rel=0.1)
    assert activations(ADM, 128) == pytest.approx(activations(ADM, 256) / 4)
    assert operations(ADM, 128) == pytest.approx(operations(ADM, 256) / 4)


STAGES = {"prepare", "train_unet", "join", "moments", "measure", "measure_sweep", *ON_DEVICE} - {"pretrain"}


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_every_further_attempt_asks_for_more(stage):
    for name in ("smoke", "rooms"):
        needs = asked(study(name), stage)
        for key, least in (("mem_mb", 1500), ("runtime", 10)):
            first, third = needs[key](None, 1), needs[key](None, 3)
            assert type(first) is int
            assert first >= least
            assert third == 3 * first


def test_time_shrinks_with_shards_and_speed():
    def minutes(**compute) -> int:
        return asked(study("rooms", **compute), "sample")["runtime"](None, 1)

    assert minutes() > minutes(shard_size=64) > 10
    assert minutes() > minutes(gflops=1000) > 10
    made = study("rooms")
    made["sampling"]["batch_size"] *= 4
    assert asked(made, "sample")["mem_mb"](None, 1) > asked(study("rooms"), "sample")["mem_mb"](None, 1)


def test_trainings_of_small_networks_have_time_for_their_passes():
    """A GPU waits for the host: each of so many passes takes 0.03 s, however few its operations; and a head's step reads what is stored."""
    whole = study("paper", gflops=10**9)  # a GPU that computes in no time
    recipe = whole["prior"]["training"]
    for side in (32, 256):
        assert asked(whole, "prior", side)["runtime"](None, 1) > recipe["steps"] * recipe["gradient_accumulation_steps"] * 0.03 / 60
    assert asked(whole, "downstream")["runtime"](None, 1) > 3 * whole["downstream"]["training"]["steps"] * 0.03 / 60
    recipe, shapes = whole["heads"]["training"], 180e6  # bytes that a picture's features take at one level, as config/paper.yaml says
    assert asked(whole, "blocks")["runtime"](None, 1) > recipe["steps"] * recipe["batch_size"] * shapes / 200e6 / 60
    assert asked(whole, "heads")["runtime"](None, 1) < asked(whole, "blocks")["runtime"](None, 1) / 5


def test_a_small_prior_has_room_for_the_maps_that_it_shrinks():
    """20,000 maps of 256 x 256 float32 values, and three more of each while they are coded."""
    for side in (32, 256):
        assert asked(study("paper"), "prior", side)["mem_mb"](None, 1) > 4 * 20000 * 256**2 * 4 / 2**20


def test_a_downstream_job_has_room_for_the_run_that_it_takes_a_part_of():
    config = yaml.safe_load((ROOT / "config" / "paper.yaml").read_text())
    many = Study({**config, "runs": "config/runs/paper50k.tsv"})
    few, all_of_them = (asked(s, "downstream")["mem_mb"](None, 1) for s in (study("paper"), many))
    assert all_of_them - few == pytest.approx(45000 * 256**2 * 4 / 2**20, abs=2)


def test_distances_of_many_dimensions_ask_for_the_time_that_they_take():
    """A set of 5,000 pictures with 2,048 features takes 1.2 s on one core (measured); all sets of the paper's study, on its cores, take hours."""
    whole = study("paper", cores=1)
    # 23 runs with partners, 9 of them not of the sweep: 3 distances each, of 100 resamples.
    sets = 3 * 2 * 100 * 9
    minutes = asked(whole, "measure")["runtime"](None, 1)
    assert minutes > sets * 1.2 / 60
    assert asked(study("paper", cores=16), "measure")["runtime"](None, 1) < minutes / 10
    assert asked(study("paper", cores=16), "measure")["mem_mb"](None, 1) > asked(whole, "measure")["mem_mb"](None, 1)


def test_a_pretrained_judge_has_room_for_its_weights():
    """344 M parameters of Intel/dpt-large in float32, beside Python and its libraries."""
    for name in ("label", "judge"):
        assert asked(study("paper"), name)["mem_mb"](None, 1) > 1500 + 344e6 * 4 / 2**20
