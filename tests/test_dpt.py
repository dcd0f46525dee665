"""Depth networks of transformers: a tiny DPT against transformers' own pipeline, the convention of its depth, what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from standins import write_dpt

from dag.data.depth import DepthCoding
from dag.data.images import to_tensor
from dag.estimators import PretrainedDepth, estimate, inverse_to_metres, load_pretrained

transformers = pytest.importorskip("transformers")
CODING = DepthCoding(0.5, 10.0)


@pytest.fixture(scope="module")
def dpt(tmp_path_factory):
    return write_dpt(tmp_path_factory.mktemp("dpt") / "model")


def pictures(n: int, size: int) -> np.ndarray:
    """Smooth coloured pictures, uint8."""
    coarse = np.random.default_rng(0).integers(0, 256, (n, 4, 4, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC)) for c in coarse])


def test_inverse_depth_becomes_metres_from_near_to_far():
    inverse = torch.tensor([[[3.0, 5.0], [4.0, 3.0]], [[7.0, 7.0], [7.0, 7.0]]])[:, None]
    metres = inverse_to_metres(inverse, 0.5, 10.0)
    # Halfway between the extremes in 1 / depth: 1 / ((1 / 10 + 1 / 0.5) / 2).
    torch.testing.assert_close(metres[0, 0], torch.tensor([[10.0, 0.5], [1 / 1.05, 10.0]]))
    torch.testing.assert_close(metres[1, 0], torch.full((2, 2), 10.0))
    fixed = inverse_to_metres(inverse, 0.5, 10.0, (3.0, 7.0))
    torch.testing.assert_close(fixed[:, 0, 0, 0], torch.tensor([10.0, 0.5]))
    torch.testing.assert_close(inverse_to_metres(inverse - 9, 0.5, 10.0, (3.0, 7.0))[0], torch.full((1, 2, 2), 10.0))
    with pytest.raises(ValueError, match=r"bounds of inverse depth are 2 and 2, expected low < high"):
        inverse_to_metres(inverse, 0.5, 10.0, (2, 2))


def test_scale_and_shift_of_inverse_depth_drop_out():
    """The network's own a / depth + b is undone where a picture reaches from near to far."""
    depth = torch.cat([torch.tensor([0.5, 10.0]), torch.rand(62, generator=torch.Generator().manual_seed(0)) * 9.5 + 0.5]).reshape(1, 1, 8, 8)
    for a, b in ((1.0, 0.0), (37.0, -4.0), (0.01, 100.0)):
        torch.testing.assert_close(inverse_to_metres(a / depth.double() + b, 0.5, 10.0), depth.double(), rtol=1e-8, atol=1e-8)


def test_a_dpt_judges_as_its_own_pipeline(dpt):
    model, facts = load_pretrained(dpt, CODING)
    assert facts["model"] == str(dpt)
    assert list(facts["sha256"]) == ["model.safetensors"]
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    images = pictures(3, 24)
    found = estimate(model, images, CODING, batch_size=2)
    assert found.shape == (3, 24, 24)
    assert found.dtype == np.float32
    theirs = transformers.pipeline("depth-estimation", model=str(dpt), device="cpu")
    for image, depth in zip(images, found, strict=True):
        inverse = theirs(Image.fromarray(image))["predicted_depth"].reshape(1, 1, 24, 24)
        assert inverse.std() > 0
        np.testing.assert_allclose(depth, inverse_to_metres(inverse, 0.5, 10.0)[0, 0].numpy(), rtol=1e-4)


def test_metric_networks_keep_their_metres(dpt):
    model, _ = load_pretrained(dpt, CODING, output="metres")
    inverse, _ = load_pretrained(dpt, CODING, bounds=(0.0, 2.0))
    image = to_tensor(pictures(1, 24))
    with torch.inference_mode():
        raw = model.network(pixel_values=model.processor(images=list(pictures(1, 24)), return_tensors="pt")["pixel_values"]).predicted_depth
        metres, other = (CODING.decode(m(image)) for m in (model, inverse))
    raw = torch.nn.functional.interpolate(raw[:, None], (24, 24), mode="bicubic", align_corners=False)
    torch.testing.assert_close(metres, raw.clamp(0.5, 10.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other, inverse_to_metres(raw, 0.5, 10.0, (0.0, 2.0)), rtol=1e-4, atol=1e-4)


def test_loading_is_quiet_where_nobody_looks(dpt, capfd):
    load_pretrained(dpt, CODING)
    assert capfd.readouterr() == ("", "")


def test_a_network_that_gives_nan_is_named(dpt):
    model, _ = load_pretrained(dpt, CODING)
    model.network.head.head[0].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="the depth network gives NaN or infinity for 2 of 2 pictures"):
        estimate(model, pictures(2, 24), CODING)


def test_models_that_are_none_are_one_line(dpt, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="output of a depth network is 'disparity', expected one of inverse, metres"):
        PretrainedDepth(torch.nn.Identity(), None, CODING, "disparity")
    folder = tmp_path / "model"
    shutil.copytree(dpt, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match=r"model: not a depth network of transformers \(") as error:
        load_pretrained(folder, CODING)
    assert "\n" not in str(error.value)
    (folder / "model.safetensors").write_bytes(weights)
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in state.items() if key != "head.head.0.bias" and "layers.0.residual_layer1" not in key}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model: its weights have no head\.head\.0\.bias \(1 missing\)"):
        load_pretrained(folder, CODING)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"model: not a depth network of transformers \("):
        load_pretrained(folder, CODING)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json: no such file, expected the folder of a depth network"):
        load_pretrained(folder, CODING)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"^no-one/has-this-model: .* give the path of their folder$"):
        load_pretrained("no-one/has-this-model", CODING)
    with pytest.raises(FileNotFoundError, match=r"nowhere/at/all: .*a hub name is owner/name.* give the path of their folder$"):
        load_pretrained("nowhere/at/all", CODING)
