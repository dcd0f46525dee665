"""What stages say of files that are not what they need, in one line that names the file, and how much of large ones they take."""

import hashlib
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dag.estimators import DepthUNet
from dag.heads import build_heads
from dag.stages.data import read
from dag.stages.downstream import downstream
from dag.stages.evaluation import load_judge
from dag.stages.models import contents, prior
from dag.stages.sampling import load_heads
from dag.stages.study import Study
from dag.weights import save_module

ARCHITECTURE = {
    "sample_size": 8,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}


def test_arrays_are_read_or_named(tmp_path):
    path = tmp_path / "pictures.npz"
    with pytest.raises(ValueError, match=r"pictures\.npz: no such file; run the stage that makes it first"):
        read(path)
    np.savez(path, images=np.zeros((2, 4, 4, 3), np.uint8))
    assert read(path, "images")["images"].shape == (2, 4, 4, 3)
    with pytest.raises(ValueError, match=r"pictures\.npz: has no depth, ids; it holds images"):
        read(path, "images", "ids", "depth")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"pictures\.npz: not a whole \.npz file"):
        read(path)


def test_heads_and_judge_are_not_taken_for_each_other(tmp_path):
    heads, judge = build_heads({"strong": [0]}, {0: 3}, width=4, layers=1, time_width=4), DepthUNet(ARCHITECTURE)
    save_module(heads, {"blocks": {"strong": [0]}, "channels": {0: 3}, "sizes": {"width": 4, "layers": 1, "time_width": 4}}, tmp_path / "heads.safetensors")
    save_module(judge, {"architecture": ARCHITECTURE}, tmp_path / "judge.safetensors")
    assert load_heads(tmp_path / "heads.safetensors")["strong"].blocks == (0,)
    assert not any(p.requires_grad for p in load_judge(tmp_path / "judge.safetensors").parameters())
    with pytest.raises(ValueError, match=r"judge\.safetensors: no depth heads"):
        load_heads(tmp_path / "judge.safetensors")
    with pytest.raises(ValueError, match=r"heads\.safetensors: no depth judge"):
        load_judge(tmp_path / "heads.safetensors")


def test_heads_that_do_not_fit_their_description_are_refused(tmp_path):
    heads = build_heads({"strong": [0]}, {0: 3}, width=4, layers=1, time_width=4)
    save_module(heads, {"blocks": {"strong": [0]}, "channels": {0: 5}, "sizes": {"width": 4, "layers": 1, "time_width": 4}}, tmp_path / "heads.safetensors")
    with pytest.raises(ValueError, match=r"heads\.safetensors: .*first"):
        load_heads(tmp_path / "heads.safetensors")


def test_training_data_larger_than_the_memory_are_hashed_where_they_lie(tmp_path):
    """Features of the paper's study are 72 GB, in a job of a few."""
    rows = np.lib.format.open_memmap(tmp_path / "rows.npy", mode="w+", dtype=np.float16, shape=(64, 1 << 17))
    rows[:] = np.arange(64, dtype=np.float16)[:, None]
    rows.flush()
    stored = np.load(tmp_path / "rows.npy", mmap_mode="r")
    tracemalloc.start()
    try:
        found, peak = contents(stored, np.ones(3)), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < stored.nbytes / 16
    assert found == hashlib.sha256(rows.tobytes() + np.ones(3).tobytes()).hexdigest()[:16]


def test_a_downstream_network_takes_no_more_samples_than_the_reference_has(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    study = Study.load("config/smoke.yaml")
    most = study.uses["downstream"].count
    depth = np.full((most + 4, 16, 16), 2, np.float32)
    depth[most:] = 100  # none of these may reach the mean
    images = np.zeros((most + 4, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "pictures.npz", images=images, depth=depth)
    np.savez(tmp_path / "test.npz", images=images[:2], depth=depth[:2], ids=np.arange(2))
    downstream(study, source="constant", pictures=tmp_path / "pictures.npz", test=tmp_path / "test.npz", out=tmp_path / "constant.csv")
    errors = pd.read_csv(tmp_path / "constant.csv")
    assert set(errors.n_train) == {most}
    assert errors.abs_rel.max() < 1e-6


def test_a_prior_of_a_resolution_that_the_study_does_not_have_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    study = Study.load("config/smoke.yaml")
    given = study["prior"]["resolutions"]
    with pytest.raises(ValueError, match=rf"--resolution is 12, expected one of prior\.resolutions, {re.escape(str(given))}$"):
        prior(study, resolution=12, data=tmp_path / "absent.npz", out=tmp_path / "prior12")
    assert not list(tmp_path.iterdir())
