"""The plan of a study: operations and kept activations, counted by hand and by the counter."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from dag.stages.counting import Counted, count, trained
from dag.stages.planning import costs, plan
from dag.stages.resources import PASS_SECONDS
from dag.stages.study import Study, decoder_block_count

ROOT = Path(__file__).parent.parent


def test_operations_and_kept_activations_are_those_of_paper_and_pencil():
    with torch.device("meta"):
        network, x = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 1)), torch.empty(2, 3, 16, 16)
    network.requires_grad_(False)
    forward = 2 * 2 * 256 * (8 * 3 * 9 + 8)  # a multiplication and an addition, two pictures of 256 pixels
    assert count(lambda: network(x)) == (forward, 0)
    x.requires_grad_()
    # The gradient to x costs as much as the forward pass; every layer keeps what it was given, frozen or not.
    assert count(lambda: network(x).sum().backward()) == (2 * forward, 4 * 2 * (3 + 8 + 8) * 256)
    assert trained(network, lambda: network(x.detach()).sum()) == 4 * 2 * (3 + 8 + 8) * 256
    assert not any(p.requires_grad for p in network.parameters())


def test_every_network_of_a_study_is_counted_without_weights(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    counted = Counted(Study.load("config/smoke.yaml"))
    assert 0 < counted.to_taps < counted.forward
    assert min(counted.head, *counted.judge, *counted.downstream, *counted.extractor, *counted.prior.values()) > 0
    jobs = {cost.stage: cost.jobs for cost in costs(counted.study, counted)}
    # Two label counts, single blocks and two variants; the prior, the shuffled one and that of another coding.
    assert (jobs["heads"], jobs["prior 16"], jobs["prior 8"]) == (5, 3, 1)
    step, kept = counted.guided[True, 16]
    assert step > counted.to_taps + counted.head
    assert kept > 0


def test_networks_on_imagenet_features_and_on_whole_pictures_are_counted_too(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = Study.load("config/nyu.yaml")
    counted = Counted(study)
    # One architecture on 64x64, enlarged twice, and on 128x160 as it is: convolutions cost in proportion to pixels.
    assert counted.downstream_whole[0] / counted.downstream[0] == pytest.approx(128 * 160 / 128**2, rel=0.02)
    assert counted.downstream_whole[1] == counted.downstream[1]
    rows = {cost.stage: cost for cost in costs(study, counted)}
    assert (rows["downstream"].jobs, rows["downstream, whole pictures"].jobs) == (6, 1)


@pytest.mark.parametrize("study", ["paper", "paper-church"])
def test_the_control_of_equal_compute_costs_as_much_as_a_guided_run(study):
    """By the plan that is committed."""
    rows = [line.split("|") for line in (ROOT / "docs" / f"{study}-scale.md").read_text().splitlines() if line.startswith("| sample ")]
    cost = {row[1].strip().removeprefix("sample "): float(row[3].replace(",", "")) for row in rows[: len(rows) // 2]}
    assert cost["equal_compute"] == pytest.approx(cost["both"], rel=0.05)


def test_a_plan_of_two_sizes_follows_their_sheets(tmp_path, monkeypatch):
    """The study in miniature, with a second size: jobs, operations and memory of its rows by hand."""
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    config["prior"]["training"] = {"steps": 10, "batch_size": 16, "processes": 2, "gradient_accumulation_steps": 4, "precision": "bf16"}
    sheet = pd.read_csv(ROOT / config["runs"], sep="\t", dtype=str)
    sheet.assign(n="64").to_csv(tmp_path / "many.tsv", sep="\t", index=False)
    (tmp_path / "many.yaml").write_text(yaml.safe_dump({"study": "many", "runs": str(tmp_path / "many.tsv"), "compute": {"shard_size": 16}}))
    study = Study({**config, "compute": {}})
    plan(study, gpus=ROOT / "config" / "gpus.tsv", out=tmp_path / "plan.md", more=tmp_path / "many.yaml")
    few, many = ((tmp_path / "plan.md").read_text().split("\n## ")[i].splitlines() for i in (2, 3))
    assert many[0] == "64 samples a run"
    rows = {name: next(line for line in text if line.startswith("| sample both |")).split("|") for name, text in (("few", few), ("many", many))}
    n = int(sheet.set_index("run").n["both"])
    assert [int(rows[name][2]) for name in ("few", "many")] == [1, 4]
    counted = Counted(study)
    costs_of = {cost.stage: cost for cost in costs(study, counted)}
    assert costs_of["sample both"].flop == n * study.runs.steps["both"] * counted.guided[True, study.runs.prior["both"]][0]
    prior = costs_of["prior 16"]
    assert prior.flop == prior.jobs * 3 * 10 * 16 * counted.prior[16]
    assert prior.activations == 2 * counted.trained_prior(16)  # 16 / (2 x 4) pictures at once
    assert prior.hours(pd.Series({"bf16_tflops": 1e-5, "tf32_tflops": 1}), (1, 0.5)) == pytest.approx(prior.flop / 5e6 / 3600)
    # A fast GPU waits for the host: 10 steps of 4 parts, for each prior.
    assert prior.hours(pd.Series({"bf16_tflops": 100, "tf32_tflops": 1}), (1, 0.5)) == pytest.approx(prior.jobs * 10 * 4 * PASS_SECONDS / 3600)
    # Heads on single blocks are trained together; a pair has two.
    blocks = decoder_block_count(study.unet_architecture())
    assert costs_of["heads"].activations == study["heads"]["training"]["batch_size"] * counted.trained_heads() * blocks / 2
    assert "64 samples a run" in (tmp_path / "plan.md").read_text()
