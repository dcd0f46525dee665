"""The U-Net taken apart: same bits as diffusers' own forward pass, same features as guided-diffusion's, and no graph beyond the deepest tap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from dag.unet import decoder_blocks, feature_shapes, forward_with_taps, split_output

SIZE = 16
RESNET = {"downsample_type": "resnet", "upsample_type": "resnet"}
VARIANTS = {
    "attention below": {},
    "two layers": {"layers_per_block": 2},
    "three layers, no attention": {
        "layers_per_block": 3,
        "block_out_channels": (16, 32, 48),
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
        "add_attention": False,
    },
    "attention everywhere": {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2},
    "resampling ResNets, scale and shift, learned variance": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8,
        "out_channels": 6,
        **RESNET,
    },
    "attention with resampling ResNets": {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2, **RESNET},
    "no middle, centred input": {"mid_block_type": None, "center_input_sample": True},
    "learned times": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "skip blocks, Fourier times": {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
        "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "time_embedding_type": "fourier",
        "attention_head_dim": None,
    },
}


def tiny(**changes) -> UNet2DModel:
    torch.manual_seed(0)
    config = {
        "sample_size": SIZE,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**{**config, **changes}).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=VARIANTS)
def unet(request) -> UNet2DModel:
    return tiny(**VARIANTS[request.param])


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


T = torch.tensor([3, 700])


@pytest.mark.parametrize("t", [T, torch.tensor(7), 5], ids=["one each", "scalar tensor", "number"])
def test_output_is_that_of_diffusers_bit_for_bit(unet, x, t):
    expected = unet(x, t).sample
    output, features = forward_with_taps(unet, x, t)
    assert torch.equal(output, expected)
    assert features == {}
    for options in ({}, {"detach_output": True}, {"checkpoint": True}):
        assert torch.equal(forward_with_taps(unet, x.clone().requires_grad_(), t, [1], **options)[0], expected), options


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_bfloat16_and_channels_last_keep_the_bits(unet, x, layout):
    x = x.to(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        expected = unet(x, T).sample
        output, features = forward_with_taps(unet, x.requires_grad_(), T, [0, 2], detach_output=True)
    assert torch.equal(output, expected)
    assert torch.autograd.grad(features[2].float().square().sum(), x)[0].isfinite().all()


def test_table_says_what_the_features_are(unet, x):
    blocks = decoder_blocks(unet)
    assert [b.index for b in blocks] == list(range(sum(len(level.resnets) for level in unet.up_blocks)))
    _, features = forward_with_taps(unet, x, T, range(len(blocks)))
    assert list(features) == [b.index for b in blocks]
    assert {k: tuple(f.shape[1:]) for k, f in features.items()} == feature_shapes(unet, SIZE)
    assert blocks[-1].stride == 1


def test_features_are_the_outputs_of_the_modules_in_diffusers_forward(x):
    """Hooks on diffusers' own run: block 1 ends with its level's upsampler, blocks 0 and 2 with attention or a ResNet."""
    unet, seen = tiny(), {}
    ends = {0: unet.up_blocks[0].attentions[0], 1: unet.up_blocks[0].upsamplers[0], 2: unet.up_blocks[1].resnets[0], 3: unet.up_blocks[1].resnets[1]}
    hooks = [module.register_forward_hook(lambda _, __, out, k=k: seen.__setitem__(k, out)) for k, module in ends.items()]
    unet(x, T)
    for hook in hooks:
        hook.remove()
    _, features = forward_with_taps(unet, x, T, ends)
    assert all(torch.equal(features[k], seen[k]) for k in ends)


def test_stopping_early_gives_the_same_features_and_no_output(unet, x):
    _, whole = forward_with_taps(unet, x, T, [0, 2])
    output, early = forward_with_taps(unet, x, T, [0, 2], stop_after_taps=True)
    assert output is None
    assert early.keys() == whole.keys()
    assert all(torch.equal(early[k], whole[k]) for k in whole)
    assert forward_with_taps(unet, x, T, stop_after_taps=True) == (None, {})


def gradient(unet, x, **options) -> torch.Tensor:
    x = x.clone().requires_grad_()
    _, features = forward_with_taps(unet, x, T, [0, 2], **options)
    return torch.autograd.grad(features[0].square().mean() + features[2].sin().mean(), x)[0]


def test_gradient_through_taps_does_not_need_the_rest(unet, x):
    whole = gradient(unet, x)
    assert whole.abs().max() > 0
    torch.testing.assert_close(gradient(unet, x, detach_output=True), whole, rtol=0, atol=0)
    torch.testing.assert_close(gradient(unet, x, detach_output=True, checkpoint=True), whole, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(gradient(unet, x, stop_after_taps=True), whole, rtol=0, atol=0)


def kept(unet, x, taps, **options) -> int:
    """Bytes that the graph keeps for the backward pass, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward_with_taps(unet, x.clone().requires_grad_(), T, taps, **options)
    assert len(result) == 2
    return sum(storage.nbytes() for storage in storages.values())


def test_no_graph_beyond_the_deepest_tap(unet, x):
    output, features = forward_with_taps(unet, x.clone().requires_grad_(), T, [0, 2], detach_output=True)
    assert not output.requires_grad
    assert features[0].requires_grad
    assert features[2].requires_grad
    assert kept(unet, x, [0], detach_output=True) == kept(unet, x, [0], stop_after_taps=True) < kept(unet, x, [0])
    assert kept(unet, x, (), detach_output=True) == 0
    assert kept(unet, x, [2], checkpoint=True) < kept(unet, x, [2])


def test_x_keeps_its_graph_outside_the_taps_unless_detached(x):
    output, _ = forward_with_taps(tiny(), x.requires_grad_(), T, [0])
    assert torch.autograd.grad(output.sum(), x)[0].abs().max() > 0


def test_numbers_outside_the_decoder_are_refused(x):
    unet = tiny()
    for wrong in (4, -1):
        with pytest.raises(ValueError, match=rf"no decoder block {wrong} .* 0 to 3"):
            forward_with_taps(unet, x, T, [0, wrong])


def test_what_cannot_be_run_is_refused(x):
    with pytest.raises(ValueError, match="class-conditional.*num_class_embeds is 10"):
        forward_with_taps(tiny(num_class_embeds=10), x, T)
    with pytest.raises(ValueError, match="17x16.*multiples of 2"):
        feature_shapes(tiny(), (17, 16))


def test_split_output():
    output = torch.randn(2, 6, 4, 4)
    eps, raw = split_output(output, 3)
    assert torch.equal(torch.cat([eps, raw], 1), output)
    assert split_output(eps, 3)[1] is None
    with pytest.raises(ValueError, match="has 5 channels, expected 3, or 6"):
        split_output(output[:, :5], 3)


@pytest.fixture(scope="module")
def adm(fixtures):
    from dag.weights import load_unet

    unet, _ = load_unet(fixtures / "adm_tiny.pt")
    with np.load(fixtures / "adm_tiny_io.npz") as file:
        return unet, {key: torch.from_numpy(file[key]) for key in file.files}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach() - expected).norm() / expected.norm())


def test_output_blocks_are_those_of_guided_diffusion(adm):
    unet, reference = adm
    output, features = forward_with_taps(unet, reference["x"], reference["t"], range(12))
    assert relative(output, reference["model_output"]) < 1e-4
    assert len(decoder_blocks(unet)) == 12
    for k in range(12):
        assert features[k].shape == reference[f"output_block_{k}"].shape
        assert relative(features[k], reference[f"output_block_{k}"]) < 1e-4, k


def test_gradient_through_block_6_is_that_of_guided_diffusion(adm):
    unet, reference = adm
    x = reference["x"].clone().requires_grad_()
    _, features = forward_with_taps(unet, x, reference["t"], [6], detach_output=True)
    gradient = torch.autograd.grad(features[6].square().sum(), x)[0]
    assert relative(gradient, reference["grad_x_of_sum_sq_block6"]) < 1e-4
