"""The training loop: the arithmetic of a loop written out, parts of a batch, exact resume after any death, and what it refuses."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from dag.diffusion import Diffusion
from dag.interruption import Interrupted
from dag.training import Ema, OtherState, Recipe, denoising_loss, fit, generator, noised

RECIPE = Recipe(steps=12, batch_size=4, learning_rate=1e-2, warmup=3, weight_decay=0.01, ema=0.9, seed=3, save_every=4)


def make_model(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU(), nn.Conv2d(width, 1, 1))


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(100 + step))


def loss(model: nn.Module, data: torch.Tensor, numbers: torch.Generator) -> torch.Tensor:
    """Denoising with noise from the step's own generator."""
    noise = torch.randn(data.shape, generator=numbers)
    return (model(data + noise).float() - noise).square().mean()


def train(folder: Path, recipe: Recipe = RECIPE, *, data=batch, objective=loss, model: nn.Module | None = None, workers: int = 0) -> nn.Module:
    files = {"state": folder / "net.state.pt", "log": folder / "net.log.jsonl", "name": "net"}
    return fit(model or make_model(), objective, data, recipe, **files, workers=workers)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Killed(Exception):
    pass


def killed_at(last: int):
    def data(step: int) -> torch.Tensor:
        if step == last:
            raise Killed
        return batch(step)

    return data


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> nn.Module:
    """The network of an undisturbed training."""
    return train(tmp_path_factory.mktemp("whole"))


# ---- arithmetic


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fit_is_the_loop_written_out(tmp_path, precision):
    """AdamW, warm-up and cosine decay, clipping and averaging, bit for bit."""
    recipe = Recipe(**{**vars(RECIPE), "precision": precision})
    model = make_model()
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    for step in range(12):
        rate = 1e-2 * min(1, (step + 1) / 3) * 0.5 * (1 + math.cos(math.pi * step / 12))
        optimiser.param_groups[0]["lr"] = rate
        assert recipe.rate(step) == rate
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss(model, batch(step), torch.Generator().manual_seed((3 * 1_000_003 + step) * 1_009))
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        decay = min(0.9, (1 + step) / (10 + step))
        for key, value in model.state_dict().items():
            average[key] = average[key].lerp(value, 1 - decay) if value.is_floating_point() else value.clone()
    trained = train(tmp_path, recipe)
    assert not trained.training
    assert all(torch.equal(v, average[k]) for k, v in trained.state_dict().items())


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_add_up_to_it(tmp_path, parts):
    """The mean of the parts' means is the mean, up to the order of float32 sums. No batch norm: its statistics are a part's own."""

    def objective(model: nn.Module, data: tuple, numbers: torch.Generator) -> torch.Tensor:
        assert len(data[0]) == len(data[1]) == 4 // count
        return (model(data[0]) - data[1]).square().mean()

    def pairs(step: int) -> tuple:
        return batch(step), batch(step).flip(-1)

    ends = []
    for count in (1, parts):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.ConvTranspose2d(4, 1, 3))
        (tmp_path / str(count)).mkdir()
        ends.append(
            train(tmp_path / str(count), Recipe(**{**vars(RECIPE), "gradient_accumulation_steps": count}), data=pairs, objective=objective, model=model)
        )
    for one, other in zip(*(end.parameters() for end in ends), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    logs = [[json.loads(line) for line in (tmp_path / str(count) / "net.log.jsonl").read_text().splitlines()] for count in (1, parts)]
    assert [row["loss"] for row in logs[0]] == pytest.approx([row["loss"] for row in logs[1]], rel=1e-5)


def test_training_learns_and_logs(tmp_path):
    trained = train(tmp_path, Recipe(**{**vars(RECIPE), "steps": 60}))
    rows = [json.loads(line) for line in (tmp_path / "net.log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(3, 61, 3))
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert all(r["learning_rate"] >= 0 and r["time"] > 0 for r in rows)
    assert not same(trained, make_model())


def test_average_forgets_its_start_at_once_and_then_slowly():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    ema = Ema(model, 0.99)
    model.weight.data.fill_(1.0)
    ema.update(model, 0)
    assert float(ema.weights["weight"]) == pytest.approx(1 - 1 / 10)
    for step in range(1, 400):
        ema.update(model, step)
    assert float(ema.weights["weight"]) == pytest.approx(1)
    model.weight.data.fill_(2.0)
    ema.update(model, 100_000)
    assert float(ema.weights["weight"]) == pytest.approx(1.01)


def test_average_counts_batches_and_averages_running_statistics():
    model = nn.BatchNorm1d(2)
    ema = Ema(model, 0.5)
    model.num_batches_tracked.fill_(7)
    model.running_mean.fill_(4.0)
    ema.update(model, 1000)
    assert int(ema.weights["num_batches_tracked"]) == 7
    assert ema.weights["running_mean"].tolist() == [2.0, 2.0]


def test_steps_and_ranks_have_their_own_numbers():
    starts = {generator(seed, step, rank).initial_seed() & 0xFFFFFFFF for seed in range(3) for step in range(0, 20_000, 7) for rank in range(4)}
    assert len(starts) == 3 * 2858 * 4


class Recorder(nn.Module):
    """A network that writes down what it is given and answers zero."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x_t, t):
        self.seen.append((x_t, t))
        return type("Output", (), {"sample": torch.zeros_like(x_t)})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_denoising_loss_is_that_of_its_target(kind):
    diffusion, model, x_start = Diffusion(), Recorder(), torch.rand(8, 1, 16, 16) * 2 - 1
    value = denoising_loss(diffusion, kind)(model, noised(x_start, diffusion, torch.Generator().manual_seed(1)), generator(0, 0))
    x_t, t = model.seen[0]
    abar = torch.as_tensor(diffusion.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
    noise = (x_t - abar**0.5 * x_start) / (1 - abar) ** 0.5
    target = {"epsilon": noise, "sample": x_start, "v_prediction": abar**0.5 * noise - (1 - abar) ** 0.5 * x_start}[kind]
    assert float(value) == pytest.approx(float(target.square().mean()), rel=1e-3)
    assert float(noise.std()) == pytest.approx(1, abs=0.1)
    assert (t // 125).tolist() == list(range(8))  # one in each eighth of the range
    assert not torch.equal(noised(x_start, diffusion, torch.Generator().manual_seed(2))[1], t)


# ---- resume


@pytest.mark.parametrize("deaths", [(0,), (5,), (8,), (11,), (4, 6, 10)])
def test_killed_and_resumed_training_ends_with_the_same_bits(tmp_path, whole, deaths):
    for last in deaths:
        with pytest.raises(Killed):
            train(tmp_path, data=killed_at(last))
    torch.manual_seed(99)  # nothing outside may matter
    fresh = make_model()
    nn.init.zeros_(fresh[0].weight)
    resumed = train(tmp_path, model=fresh if max(deaths) > 4 else None)
    assert same(resumed, whole)


def test_saving_more_or_less_often_changes_nothing(tmp_path, whole):
    for every, last in ((1, 3), (2, 9)):
        with pytest.raises(Killed):
            train(tmp_path, Recipe(**{**vars(RECIPE), "save_every": every}), data=killed_at(last))
    assert same(train(tmp_path, Recipe(**{**vars(RECIPE), "save_every": 1000})), whole)


def test_finished_training_is_read_from_its_state(tmp_path, whole):
    train(tmp_path)
    assert same(train(tmp_path, data=killed_at(0), model=make_model()), whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.log.jsonl", "net.state.pt"]


def test_only_new_steps_are_computed(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, data=killed_at(9))
    steps = []
    train(tmp_path, data=lambda step: steps.append(step) or batch(step))
    assert steps == [8, 9, 10, 11]


def test_state_of_another_recipe_is_refused(tmp_path):
    train(tmp_path)
    other = Recipe(**{**vars(RECIPE), "learning_rate": 0.5, "steps": 20})
    message = r"net\.state\.pt: saved by another recipe \(steps was 12, is 20, learning_rate was 0\.01, is 0\.5\); remove the file to start again"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, other)


def test_state_of_another_network_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match=r"net\.state\.pt: saved by another network \(0\.weight was \(4, 1, 3, 3\), is \(5, 1, 3, 3\)\); remove") as error:
        train(tmp_path, model=make_model(5))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"saved by another network \(4\.weight was None, is \(1, 1, 1, 1\)\)"):
        train(tmp_path, model=make_model().append(nn.Conv2d(1, 1, 1)))


def test_state_of_a_network_that_was_trained_in_whole_is_refused_where_a_part_is_frozen(tmp_path):
    train(tmp_path)
    partly = make_model()
    partly[0].requires_grad_(False)
    with pytest.raises(OtherState, match=r"saved when \d of the network's parameters were trained, not \d; remove the file to start again"):
        train(tmp_path, model=partly)


def test_a_state_older_than_a_key_of_the_recipe_is_gone_on_from(tmp_path, whole):
    with pytest.raises(Killed):
        train(tmp_path, data=killed_at(9))
    saved = torch.load(tmp_path / "net.state.pt")
    del saved["recipe"]["gradient_accumulation_steps"]
    torch.save(saved, tmp_path / "net.state.pt")
    with pytest.raises(OtherState, match=r"gradient_accumulation_steps was 1, is 2"):
        train(tmp_path, Recipe(**{**vars(RECIPE), "gradient_accumulation_steps": 2}))
    assert same(train(tmp_path), whole)


def test_state_saved_with_other_data_is_refused_by_fit_and_dropped_by_a_stage(tmp_path, whole):
    from dag.stages import models

    def run(function, text: str, data=batch) -> nn.Module:
        torch.manual_seed(0)
        return function(make_model(), loss, data, RECIPE, text)

    def by_fit(model, loss, data, recipe, text):
        return fit(model, loss, data, recipe, state=tmp_path / "net.state.pt", log=tmp_path / "net.log.jsonl", data=text)

    def by_stage(model, loss, data, recipe, text):
        return models.train(model, loss, data, recipe, tmp_path / "net.safetensors", text)

    with pytest.raises(Killed):
        run(by_stage, "first", killed_at(9))
    with pytest.raises(OtherState, match=r"net\.state\.pt: saved with other data \(first, not second\); remove the file to start again"):
        run(by_fit, "second")
    with pytest.warns(UserWarning, match="starting again"):
        again = run(by_stage, "second")
    assert same(again, whole)


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_step_under_way_and_ends_the_training(tmp_path, whole, number):
    def signalled(model, data, numbers):
        if float(data[0, 0, 0, 0]) == float(batch(5)[0, 0, 0, 0]):
            os.kill(os.getpid(), number)
        return loss(model, data, numbers)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=rf"stopped by {number.name}; net saved its state after step 6 of 12; the same command goes on") as stopped:
        train(tmp_path, objective=signalled)
    assert stopped.value.number == number
    assert signal.getsignal(number) is before
    assert torch.load(tmp_path / "net.state.pt")["step"] == 6
    assert same(train(tmp_path), whole)
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    train(undisturbed)
    logs = [[{**json.loads(line), "time": 0} for line in (folder / "net.log.jsonl").read_text().splitlines()] for folder in (tmp_path, undisturbed)]
    assert logs[0] == logs[1]


def test_workers_make_the_same_batches_and_outlive_a_signal_to_all(tmp_path, whole):
    def signalled(model, data, numbers):
        if float(data[0, 0, 0, 0]) == float(batch(5)[0, 0, 0, 0]):
            workers = multiprocessing.active_children()
            assert len(workers) == 2
            for pid in (*(worker.pid for worker in workers), os.getpid()):
                os.kill(pid, signal.SIGTERM)
        return loss(model, data, numbers)

    with pytest.raises(Interrupted, match="net saved its state after step 6 of 12"):
        train(tmp_path, objective=signalled, workers=2)
    assert not multiprocessing.active_children()
    assert same(train(tmp_path, workers=2), whole)


def test_a_state_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    with pytest.raises(Killed):
        train(tmp_path, data=killed_at(5))
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"net\.state\.tmp: could not be written, the disk may be full \(.*unexpected pos"):
        train(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.log.jsonl", "net.state.pt"]


# ---- torn states


def tear(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize("keep", [0, 3, 1000, -20])
def test_torn_state_gives_way_to_the_one_before(tmp_path, whole, keep):
    with pytest.raises(Killed):
        train(tmp_path, data=killed_at(10))
    state, previous = tmp_path / "net.state.pt", tmp_path / "net.state.pt.previous"
    assert [torch.load(p)["step"] for p in (state, previous)] == [8, 4]
    tear(state, keep)
    with pytest.warns(UserWarning, match=r"net\.state\.pt: not a whole training state .*; going on from the state before, at step 4"):
        resumed = train(tmp_path)
    assert same(resumed, whole)
    assert not previous.exists()


@pytest.mark.parametrize("keep", [0, 1000])
def test_torn_state_without_one_before_is_named(tmp_path, keep):
    with pytest.raises(Killed):
        train(tmp_path, data=killed_at(5))
    tear(tmp_path / "net.state.pt", keep)
    if keep:
        (tmp_path / "net.state.pt.previous").write_bytes(b"torn as well")
    with pytest.raises(ValueError, match=r"net\.state\.pt: not a whole training state .*; remove the file to start again") as error:
        train(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_no_state_is_named(tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "net.state.pt")
    with pytest.raises(ValueError, match=r"net\.state\.pt: no training state"):
        train(tmp_path)


def test_a_removed_state_means_a_new_training(tmp_path, whole):
    """Even beside the earlier state of the old one, which belongs to it."""
    with pytest.raises(Killed):
        train(tmp_path, data=killed_at(10))
    (tmp_path / "net.state.pt").unlink()
    with pytest.raises(Killed):
        train(tmp_path, data=killed_at(5))
    assert not (tmp_path / "net.state.pt.previous").exists()
    assert same(train(tmp_path), whole)


# ---- what is not finite, and bad recipes


def poisoned(at: int, value):
    """A loss that goes wrong in one step."""
    return lambda model, data, numbers: value(model, data) if float(data[0, 0, 0, 0]) == float(batch(at)[0, 0, 0, 0]) else loss(model, data, numbers)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_the_training(tmp_path, factor):
    objective = poisoned(6, lambda model, data: model(data).mean().abs() * factor)
    with pytest.raises(FloatingPointError, match=rf"net: the loss is {factor} and .* nan at step 6; lower learning_rate \(now 0\.01\) or check the data"):
        train(tmp_path, objective=objective)
    assert torch.load(tmp_path / "net.state.pt")["step"] == 4


def test_gradient_that_is_not_finite_never_reaches_the_saved_state(tmp_path, whole):
    """The square root of 0 has a finite value and no finite slope. Step 7 would have been saved."""
    with pytest.raises(FloatingPointError, match=r"net: the loss is \S+\d and its gradient's norm nan at step 7"):
        train(tmp_path, objective=poisoned(7, lambda model, data: (model(data) * 0).abs().sqrt().mean()))
    assert same(train(tmp_path), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp16"}, "precision is 'fp16', expected 'fp32' or 'bf16'"),
        ({"processes": 3}, "batch_size 4 does not divide by processes = 3"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"save_every": 0}, "save_every is 0, expected at least 1"),
        ({"processes": 0}, "processes is 0, expected at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0, expected at least 1"),
        ({"processes": 2, "gradient_accumulation_steps": 4}, r"batch_size 4 does not divide by processes x gradient_accumulation_steps = 8"),
    ],
)
def test_bad_recipes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{**vars(RECIPE), **change})


def test_fit_says_nothing_when_all_is_well(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tmp_path)
    assert capsys.readouterr().out == ""
