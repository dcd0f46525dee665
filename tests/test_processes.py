"""Trainings that several processes share through accelerate: the same as one process's up to rounding, exact resume, errors and signals of any of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn

from dag.interruption import Interrupted
from dag.processes import in_processes, place, team
from dag.training import Recipe, fit

ROOT = Path(__file__).parent.parent
RECIPE = Recipe(steps=12, batch_size=4, learning_rate=1e-2, warmup=3, weight_decay=0.01, ema=0.9, seed=3, save_every=3)


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(100 + step))


def objective(model: nn.Module, data: torch.Tensor, numbers: torch.Generator) -> torch.Tensor:
    """A loss without noise, and a mean over samples, so that shares of a batch add up to it."""
    return (model(data) - data.flip(-1)).square().mean()


def train(folder: Path, data, loss=objective, **changes) -> nn.Module:
    """No batch norm: each process would have its own statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.ConvTranspose2d(4, 1, 3))
    return fit(model, loss, data, Recipe(**{**vars(RECIPE), **changes}), state=folder / "net.state.pt", log=folder / "net.log.jsonl", name="net")


def member(rank: int, folder: Path, loss, steps: int) -> None:
    """One process's part, and an error of the second at its end."""
    trained = train(folder, lambda step: batch(step).chunk(2)[rank], loss, processes=2, steps=steps)
    torch.save(trained.state_dict(), folder / f"rank{rank}.pt")
    dist.barrier()
    if rank == 1:
        raise ValueError("depth.far is 0, expected more")


def test_two_processes_equal_one_to_1e_5(tmp_path):
    """At the same global batch: the mean of two means is the mean, up to the order of float32 sums. Both end with the same bits.

    And a user's error in one of them arrives as it was.
    """
    expected = train(tmp_path, batch, steps=6).state_dict()
    folder = tmp_path / "two"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"^depth\.far is 0, expected more$"):
        in_processes(member, 2, folder, objective, 6)
    first, second = (torch.load(folder / f"rank{rank}.pt") for rank in range(2))
    for key, value in expected.items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], value, rtol=0, atol=1e-5)
    assert len((folder / "net.log.jsonl").read_text().splitlines()) == 6  # one of them writes


def asked_to_stop(rank: int, folder: Path) -> None:
    """The parent is asked to stop while its second member computes step 5: whoever hands it on must leave a whole state behind."""

    def signalled(model, data, numbers):
        if rank == 1 and float(data[0, 0, 0, 0]) == float(batch(5).chunk(2)[1][0, 0, 0, 0]):
            os.kill(os.getppid(), signal.SIGTERM)
        return objective(model, data, numbers)

    member(rank, folder, signalled, 12)


def test_a_signal_reaches_all_processes_and_changes_no_bit(tmp_path):
    for folder in (tmp_path / "whole", tmp_path / "stopped"):
        folder.mkdir()
    with pytest.raises(ValueError, match="depth"):
        in_processes(member, 2, tmp_path / "whole", objective, 12)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM; net saved its state after step \d+ of 12"):
        in_processes(asked_to_stop, 2, tmp_path / "stopped")
    assert 5 <= torch.load(tmp_path / "stopped" / "net.state.pt")["step"] < 12
    with pytest.raises(ValueError, match="depth"):
        in_processes(member, 2, tmp_path / "stopped", objective, 12)
    ends = [torch.load(tmp_path / folder / "rank0.pt") for folder in ("whole", "stopped")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_one_process_is_this_one():
    seen = []
    in_processes(lambda rank, pid: seen.append((rank, pid == os.getpid())), 1, os.getpid())
    assert seen == [(0, True)]


def test_a_training_without_its_other_processes_is_refused():
    with pytest.raises(ValueError, match=r"the process group has 1 members, expected processes = 2"):
        team(2)


def test_every_process_has_a_gpu_of_its_own_where_there_are_enough():
    assert [place(rank, 4, 4) for rank in range(4)] == [(0, "nccl"), (1, "nccl"), (2, "nccl"), (3, "nccl")]
    assert [place(rank, 4, 8)[0] for rank in range(4)] == [0, 1, 2, 3]
    assert [place(rank, 3, 2) for rank in range(3)] == [(0, "gloo"), (1, "gloo"), (0, "gloo")]
    assert [place(rank, 2, 0) for rank in range(2)] == [(0, "gloo"), (1, "gloo")]


# ---- priors


def prior_study(monkeypatch, **training):
    """The smoke study with another training of its priors."""
    from dag.stages.study import Study

    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    config["prior"]["training"] = {"steps": 20, "batch_size": 8, "learning_rate": 1e-3, "warmup": 5, "save_every": 5, **training}
    return Study(config)


@pytest.fixture(scope="module")
def depth(tmp_path_factory) -> Path:
    """Depth maps of 24 pictures, smooth ones."""
    coarse = np.random.default_rng(0).uniform(0.6, 9, (24, 1, 2, 2)).astype(np.float32)
    maps = nn.functional.interpolate(torch.from_numpy(coarse), (16, 16), mode="bilinear")[:, 0].numpy()
    path = tmp_path_factory.mktemp("depth") / "prior.npz"
    np.savez(path, images=np.zeros((24, 16, 16, 3), np.uint8), ids=np.arange(24), depth=maps)
    return path


def curve(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in out.with_name(f"{out.name}.log.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 5e-3)])
def test_priors_of_one_process_of_two_and_of_parts_have_the_same_loss_curve(depth, tmp_path, monkeypatch, precision, tolerance):
    """At equal global batch, noise and t included: every step's loss within `tolerance` of one process's, relative."""
    from dag.stages.models import prior

    for name, training in {"one": {}, "two": {"processes": 2}, "two_parts": {"processes": 2, "gradient_accumulation_steps": 2}}.items():
        prior(prior_study(monkeypatch, precision=precision, **training), resolution=8, data=depth, out=tmp_path / name)
    one, two, parts = (curve(tmp_path / name) for name in ("one", "two", "two_parts"))
    assert len(one) == 20
    assert one[-1] != one[0]
    assert two == pytest.approx(one, rel=tolerance)
    assert parts == pytest.approx(one, rel=tolerance)
    assert two != one  # it was another computation


def test_a_prior_of_two_processes_that_was_stopped_ends_with_the_same_bits(depth, tmp_path, monkeypatch):
    study = prior_study(monkeypatch, steps=100, processes=2, gradient_accumulation_steps=2)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study.config))
    whole, stopped = (tmp_path / name / "prior" for name in ("whole", "stopped"))

    def command(out: Path) -> subprocess.Popen:
        words = ["prior", "--config", str(tmp_path / "study.yaml"), "--resolution", "8", "--data", str(depth), "--out", str(out)]
        return subprocess.Popen([sys.executable, "-m", "dag", *words], stderr=subprocess.PIPE, text=True)

    # A state of another recipe is dropped, once, and by none of the two while the other still reads it.
    whole.parent.mkdir()
    state = {"recipe": {"steps": 7}, "step": 5, "model": {}, "ema": {}, "optimiser": {}}
    torch.save(state, whole.with_name("prior.state.pt"))
    whole.with_name("prior.log.jsonl").write_text("")
    job = command(whole)
    error = job.communicate()[1]
    assert job.returncode == 0, error
    assert error.count("starting again") == 1
    job = command(stopped)
    while job.poll() is None and not stopped.with_name("prior.state.pt").exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    error = job.communicate()[1]
    assert (job.returncode, error.count("dag prior: stopped by SIGTERM; prior saved its state after step")) == (128 + signal.SIGTERM, 1), error
    job = command(stopped)
    assert job.wait() == 0
    assert weights(stopped).keys() == weights(whole).keys()
    assert all(torch.equal(value, weights(stopped)[key]) for key, value in weights(whole).items())
    assert not stopped.with_name("prior.state.pt").exists()
