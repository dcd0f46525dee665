"""The plan of a study: operations and kept activations, counted by hand and by the counter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dag.stages.planning import Counted, costs, count
from dag.stages.study import Study


def test_operations_and_kept_activations_are_those_of_paper_and_pencil():
    with torch.device("meta"):
        network, x = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 1)), torch.empty(2, 3, 16, 16)
    network.requires_grad_(False)
    forward = 2 * 2 * 256 * (8 * 3 * 9 + 8)  # a multiplication and an addition, two pictures of 256 pixels
    assert count(lambda: network(x)) == (forward, 0)
    x.requires_grad_()
    # The gradient to x costs as much as the forward pass; every layer keeps what it was given, frozen or not.
    assert count(lambda: network(x).sum().backward()) == (2 * forward, 4 * 2 * (3 + 8 + 8) * 256)


def test_every_network_of_a_study_is_counted_without_weights(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    counted = Counted(Study.load("config/smoke.yaml"))
    assert 0 < counted.to_taps < counted.forward
    assert min(counted.head, counted.judge, counted.down, counted.extractor, *counted.prior.values()) > 0
    jobs = {cost.stage: cost.jobs for cost in costs(counted.study, counted)}
    # Two label counts, single blocks and two variants; the prior, the shuffled one and that of another coding.
    assert (jobs["heads"], jobs["prior 16"], jobs["prior 8"]) == (5, 3, 1)
    step, kept = counted.guided[True, 16]
    assert step > counted.to_taps + counted.head
    assert kept > 0
