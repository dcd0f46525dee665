"""Samples of a run in parts: kept batches, runs that grow, shards, and what is refused. Bits must not tell how a run was drawn."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dag.diffusion import Diffusion
from dag.estimators import depth_network
from dag.heads import build_heads
from dag.interruption import Interrupted
from dag.metrics.extractors import load_extractor
from dag.sampling import SampleRNG
from dag.stages import evaluation, sampling
from dag.stages.arrays import rows_of
from dag.stages.artefacts import content_hash
from dag.stages.shards import join, split, together
from dag.stages.study import Study, StudyError
from dag.unet import feature_shapes
from dag.weights import load_unet, save_module, save_unet

ROOT = Path(__file__).parent.parent


def study(n: int = 20, *, study_seed: int = 3, **row) -> Study:
    """The smoke study, whose run `both` has n samples from seed 3 in batches of 4; other columns as given."""
    os.chdir(ROOT)
    config = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    config["sampling"]["batch_size"] = 4
    made = Study(config)
    for key, value in {"n": n, "first_seed": study_seed, "steps": 2, "w_dc": 30, "w_dp": 30, "prior": 8, **row}.items():
        made.runs.at["both", key] = value
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Networks with random weights."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    folder, made = tmp_path_factory.mktemp("networks"), study()
    torch.manual_seed(0)
    save_unet(UNet2DModel(sample_size=16, **made["unet"]["architecture"]), folder / "unet", prediction_type="v_prediction", diffusion=Diffusion())
    prior = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **made["prior"]["architecture"])
    save_unet(prior, folder / "prior", prediction_type="v_prediction", diffusion=Diffusion())
    channels = {b: shape[0] for b, shape in feature_shapes(load_unet(folder / "unet")[0], 16).items()}
    blocks = {"strong": made["heads"]["strong"], "weak": made["heads"]["weak"]}
    sizes = {"width": 4, "layers": 1, "time_width": 4}
    used = {b: channels[b] for b in sorted({*blocks["strong"], *blocks["weak"]})}
    save_module(build_heads(blocks, used, **sizes), {"blocks": blocks, "channels": used, "sizes": sizes}, folder / "heads.safetensors")
    return {"unet": folder / "unet", "prior": folder / "prior", "heads": folder / "heads.safetensors"}


def draw(files: dict, out: Path, made: Study | None = None, **seeds) -> dict[str, np.ndarray]:
    sampling.sample(made or study(), run=["both"], out=[out], unet=files["unet"], heads=[files["heads"]], prior=[files["prior"]], **seeds)
    with np.load(out) as file:
        return dict(file)


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> dict[str, np.ndarray]:
    return draw(files, tmp_path_factory.mktemp("whole") / "both.npz")


@pytest.fixture
def traced(monkeypatch):
    """First seeds of the batches that are really drawn."""
    firsts, trace = [], sampling.trace

    def watched(row, predict, diffusion, size, seeds, *rest):
        firsts.append(seeds[0])
        return trace(row, predict, diffusion, size, seeds, *rest)

    monkeypatch.setattr(sampling, "trace", watched)
    return firsts


def test_a_run_has_its_seeds_and_telemetry(whole):
    assert whole["images"].shape == (20, 16, 16, 3)
    assert whole["seeds"].tolist() == list(range(3, 23))
    assert whole["grad_rms"].shape == (len(whole["t"]), 20) == (2, 20)
    assert (whole["grad_rms"] > 0).all()


def interrupted(files: dict, out: Path, monkeypatch, at: int, **seeds) -> None:
    """Draw until the batch of seed `at`, in whose first step a signal comes."""
    watch = sampling._telemetry

    def telemetry(step):
        if step.x_t.shape and draws[-1] == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return watch(step)

    draws, trace = [], sampling.trace
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_telemetry", telemetry)
        patch.setattr(sampling, "trace", lambda row, p, d, s, batch, *rest: draws.append(batch[0]) or trace(row, p, d, s, batch, *rest))
        with pytest.raises(Interrupted, match="SIGTERM"):
            draw(files, out, **seeds)


def test_an_interrupted_run_keeps_its_batches_and_its_bits(files, whole, tmp_path, monkeypatch, traced):
    out = tmp_path / "both.npz"
    for at in (7, 15):
        interrupted(files, out, monkeypatch, at)
        assert not out.exists()
    done, traced[:] = list(traced), []
    assert done == [3, 7, 7, 11, 15]
    assert same(draw(files, out), whole)
    assert traced == [15, 19]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["both.json", "both.npz"]


def test_a_torn_batch_is_drawn_again(files, whole, tmp_path, monkeypatch, traced):
    out = tmp_path / "both.npz"
    interrupted(files, out, monkeypatch, 19)
    batches = sorted((tmp_path / ".both").glob("*.npz"))
    assert len(batches) == 4
    data = bytearray(batches[0].read_bytes())
    data[len(data) // 2] ^= 1  # one bit, which zip's checksum finds
    batches[0].write_bytes(data)
    batches[1].write_bytes(batches[1].read_bytes()[:100])
    batches[2].with_suffix(".json").write_text("{")
    traced.clear()
    with pytest.warns(UserWarning, match="drawn again"):
        assert same(draw(files, out), whole)
    assert len(traced) == 4


def test_batches_of_other_settings_are_not_taken(files, whole, tmp_path, monkeypatch, traced):
    out = tmp_path / "both.npz"
    interrupted(files, out, monkeypatch, 19)
    traced.clear()
    with pytest.warns(UserWarning, match="another recipe; drawn again"):
        other = draw(files, out, study(w_dc=31))
    assert len(traced) == 5
    assert not np.array_equal(other["images"], whole["images"])


@pytest.mark.parametrize(("before", "again"), [(8, [11, 15, 19]), (10, [11, 15, 19]), (20, [])])
def test_a_run_that_grows_draws_only_new_batches(files, whole, tmp_path, traced, before, again):
    """An unfinished last batch (seeds 11 and 12 of ten) is drawn as the whole one that an undisturbed run has."""
    out = tmp_path / "both.npz"
    first = draw(files, out, study(before))
    assert np.array_equal(first["seeds"], whole["seeds"][:before])
    traced.clear()
    assert same(draw(files, out), whole)
    assert traced == again
    record = json.loads((tmp_path / "both.json").read_text())
    assert record["seeds"] == [3, 20]
    assert record["seconds_per_sample"] > 0


def test_a_run_that_shrinks_draws_nothing(files, whole, tmp_path, traced):
    out = tmp_path / "both.npz"
    draw(files, out)
    traced.clear()
    fewer = draw(files, out, study(8))
    assert traced == []
    assert np.array_equal(fewer["images"], whole["images"][:8])
    assert np.array_equal(fewer["grad_rms"], whole["grad_rms"][:, :8])


def test_a_run_that_is_there_stays_and_its_record_follows_its_inputs(files, tmp_path, traced):
    """The optimum of another kind of run moves: this one is not drawn again, but its record must not tell of a file that is gone."""
    out, scale, made = tmp_path / "both.npz", tmp_path / "scale.json", study(8, w_dc="best")
    scale.write_text(json.dumps({"dcg+dpg": {"w_dc": 30}, "dcg": {"w_dc": 10}}))
    first = draw(files, out, made, scale=scale)
    inode = out.stat().st_ino
    assert same(draw(files, out, made, scale=scale), first)
    assert out.stat().st_ino == inode
    scale.write_text(json.dumps({"dcg+dpg": {"w_dc": 30}, "dcg": {"w_dc": 20}}))
    assert same(draw(files, out, made, scale=scale), first)
    assert traced == [3, 7]
    assert json.loads((tmp_path / "both.json").read_text())["inputs"][str(scale)] == content_hash(scale)
    out.write_bytes(out.read_bytes()[:-50])
    with pytest.warns(UserWarning, match="drawn again"):
        assert same(draw(files, out, made, scale=scale), first)
    assert traced == [3, 7] * 2


@pytest.mark.parametrize("size", [4, 12])
def test_shards_join_to_the_same_bits(files, whole, tmp_path, size):
    parts = []
    for first, stop in split(3, 20, size):
        parts.append(tmp_path / "both" / f"{first}.npz")
        draw(files, parts[-1], first=first, stop=stop)
    out = tmp_path / "both.npz"
    join(study(), run="both", parts=parts[::-1], out=out)
    with np.load(out) as file:
        assert same(dict(file), whole)
    one, other = (json.loads(p.with_suffix(".json").read_text()) for p in (parts[0], out))
    assert other["run"] == one["run"]
    assert other["unet_gradients"] == 2


def test_shards_that_do_not_fit_are_refused(files, tmp_path):
    parts = [tmp_path / f"{first}.npz" for first in (3, 11, 15)]
    for path, (first, stop) in zip(parts, [(3, 15), (11, 15), (15, 23)], strict=True):
        draw(files, path, first=first, stop=stop)
    with pytest.raises(ValueError, match=r"11\.npz: its seeds 11 to 14 overlap those of .*3\.npz, 3 to 14; shards must not share seeds"):
        join(study(), run="both", parts=parts, out=tmp_path / "out.npz")
    with pytest.raises(ValueError, match=r"out\.npz: its shards have the seeds 11 to 14, 15 to 22, expected 3 to 22 of run 'both'"):
        join(study(), run="both", parts=parts[1:], out=tmp_path / "out.npz")
    with pytest.warns(UserWarning, match="drawn again"):
        draw(files, parts[2], study(rule="mean"), first=15, stop=23)
    with pytest.raises(ValueError, match=r"15\.npz: drawn by another recipe than .*3\.npz; remove it"):
        join(study(), run="both", parts=[parts[0], parts[2]], out=tmp_path / "out.npz")
    parts[2].write_bytes(parts[2].read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"15\.npz: not a whole \.npz file"):
        join(study(), run="both", parts=[parts[0], parts[2]], out=tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


def test_a_shard_of_half_batches_is_refused():
    config = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    with pytest.raises(StudyError, match=r"compute\.shard_size is 12, expected a multiple of sampling\.batch_size 8"):
        Study({**config, "compute": {"shard_size": 12}})


def computed(files: dict, **ways) -> tuple[list[tuple], torch.Tensor, str]:
    """How a study computes its networks (layout, checkpointing, precision of each), the gradient of one step, and the recipe of its samples."""
    made = study()
    made["sampling"].update(ways)
    row, (plain, _, size) = made.run("both"), sampling.predictor(made, files["unet"])
    predict = sampling.guided(made, row, plain, files["heads"], files["prior"])
    networks = (plain, predict.terms[1].prior.__self__)
    how = [(n.unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last), n.checkpoint, n.precision) for n in networks]
    rng = SampleRNG([1, 2])
    grad = predict(rng.randn("init", (3, size, size)), torch.tensor([500, 500]), rng).grad
    return how, grad, sampling.sample_recipe(made, row, list(files.values()))


@pytest.mark.parametrize(
    ("ways", "expected", "cosine"),
    [
        ({"channels_last": False}, (False, False, "fp32"), 1 - 1e-6),
        ({"checkpoint": True}, (True, True, "fp32"), 1 - 1e-6),
        ({"precision": "bf16"}, (True, False, "bf16"), 0.9),
    ],
)
def test_networks_are_computed_as_the_config_says(files, ways, expected, cosine):
    """U-Net and prior both, with the same gradient up to rounding; such samples are another recipe's and are not joined with the usual ones."""
    how, grad, recipe = computed(files, **ways)
    usual, usual_grad, usual_recipe = computed(files)
    assert usual == [(True, False, "fp32")] * 2
    assert how == [expected] * 2
    assert recipe != usual_recipe
    assert float(torch.nn.functional.cosine_similarity(grad.flatten(), usual_grad.flatten(), dim=0)) > cosine


def test_runs_share_a_process_with_those_that_wait_for_the_same():
    os.chdir(ROOT)
    config = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    runs = Study(config).runs
    alone, by_three = together(runs, 1), together(runs, 3)
    assert sorted(name for names in alone for name in names) == sorted(name for names in by_three for name in names) == sorted(runs.index)
    assert all(len(names) == 1 for names in alone)
    assert len(by_three) < len(alone)
    for names in by_three:
        assert len(names) <= 3
        assert len({("fig8" in runs.tables[name], "best" in tuple(runs.loc[name, ["w_dc", "w_dp"]])) for name in names}) == 1


def test_runs_and_files_that_do_not_fit_are_refused(files, tmp_path):
    both = {"unet": files["unet"], "heads": [files["heads"]] * 2, "prior": [files["prior"]] * 2}
    with pytest.raises(ValueError, match="2 runs, 2 files of heads, 2 priors and 1 files to write"):
        sampling.sample(study(), run=["baseline", "both"], out=[tmp_path / "a.npz"], **both)
    with pytest.raises(ValueError, match="a shard of one run, but there are 2: baseline, both"):
        sampling.sample(study(), run=["baseline", "both"], out=[tmp_path / "a.npz", tmp_path / "b.npz"], first=3, **both)


def test_several_runs_are_drawn_as_each_alone(files, whole, tmp_path, monkeypatch, traced):
    """A job that ends in its second run keeps both runs' batches, also where the first one's file is removed after it."""
    made, outs = study(), [tmp_path / "both.npz", tmp_path / "dcg.npz"]
    for key in ("n", "first_seed", "steps", "w_dc", "prior"):
        made.runs.at["dcg", key] = made.runs.at["both", key]
    arguments = {"unet": files["unet"], "heads": [files["heads"]] * 2, "prior": [files["prior"]] * 2}
    telemetry = sampling._telemetry

    def stopped(step):
        if len(traced) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return telemetry(step)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_telemetry", stopped)
        with pytest.raises(Interrupted, match=r"dcg\.npz keeps its 1 finished batches"):
            sampling.sample(made, run=["both", "dcg"], out=outs, **arguments)
    outs[0].unlink()
    outs[0].with_suffix(".json").unlink()
    done = len(traced)
    sampling.sample(made, run=["both", "dcg"], out=outs, **arguments)
    assert len(traced) - done == 4  # of dcg; five batches each
    with np.load(outs[0]) as file:
        assert same(dict(file), whole)
    sampling.sample(made, run=["dcg"], unet=files["unet"], heads=[files["heads"]], prior=[files["prior"]], out=[tmp_path / "alone.npz"])
    with np.load(outs[1]) as one, np.load(tmp_path / "alone.npz") as other:
        assert same(dict(one), dict(other))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.json", "alone.npz", "both.json", "both.npz", "dcg.json", "dcg.npz"]


def test_pictures_are_described_the_same_in_parts(files, tmp_path, monkeypatch):
    """Of a large run neither the pictures nor their depth are ever in memory together."""
    made, numbers = study(), np.random.default_rng(0)
    made["evaluation"].update(extractor="pixels", dims=48, resolution=4)
    torch.manual_seed(0)
    save_module(depth_network(made["judge"]["architecture"], 16), {"architecture": {"sample_size": 16, **made["judge"]["architecture"]}}, tmp_path / "judge")
    np.savez(tmp_path / "both.npz", images=numbers.integers(0, 256, (200, 16, 16, 3), np.uint8), seeds=np.arange(3, 203), t=np.arange(2))
    networks = {"unet": files["unet"], "heads": files["heads"], "judge": tmp_path / "judge", "second_judge": tmp_path / "judge"}
    found = {}
    for most in (1024, 1):
        monkeypatch.setattr(evaluation, "PART", most)
        read = []
        monkeypatch.setattr(evaluation, "rows_of", lambda *how, read=read: read.append(how[-1]) or rows_of(*how))
        evaluation.describe(made, pictures=tmp_path / "both.npz", **networks, out=tmp_path / f"{most}.npz")
        assert read == [max(most, 128)]
        found[most] = (tmp_path / f"{most}.npz").read_bytes()
    assert found[1] == found[1024]
    with np.load(tmp_path / "1.npz") as arrays, np.load(tmp_path / "both.npz") as pictures:
        assert arrays.files == ["seeds", "extractor", "judged", "strong", "image_features", "depth_features", "strong_features", "second_features"]
        assert arrays["seeds"].tolist() == pictures["seeds"].tolist()
        assert {arrays[name].shape for name in ("judged", "strong")} == {(200, 16, 16)}
        np.testing.assert_array_equal(arrays["image_features"], load_extractor("pixels", resolution=4)(pictures["images"]))
        np.testing.assert_array_equal(arrays["second_features"], arrays["depth_features"])


def test_a_part_is_whole_batches():
    assert [evaluation.part_size(size) for size in (1, 8, 32, 48, 96, 2000)] == [1024, 1024, 1024, 1152, 1152, 16000]
