"""What stages say of files that are not what they need: one line that names the file."""

import numpy as np
import pytest

from dag.estimators import DepthUNet
from dag.heads import build_heads
from dag.stages.data import read
from dag.stages.evaluation import load_judge
from dag.stages.sampling import load_heads
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
