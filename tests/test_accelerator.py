"""Computing elsewhere than on the CPU: tensors that claim to lie on a GPU, without one, show every operation that mixes devices."""

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch._subclasses.fake_tensor import FakeTensorMode

from dag import accelerator, controls, sampling
from dag.diffusion import Diffusion, respace
from dag.estimators import depth_loss
from dag.guidance import Consistency, DepthGuidance, Prior, UNetPredictor
from dag.heads import build_heads, head_loss
from dag.sampling import SampleRNG, sample_ddim, sample_ddpm
from dag.training import denoising_loss, generator, noised

GPU = torch.device("cuda")
DIFFUSION = Diffusion()


def unet(size, channels):
    with GPU:  # made there: fakes are not moved
        return UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
        )


@pytest.fixture
def fake():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


class OnGpu(SampleRNG):
    """Numbers drawn on the CPU, as ever, and handed out on the GPU."""

    def __init__(self, seeds):
        super().__init__(seeds, GPU)


@pytest.mark.parametrize("sampler", [sample_ddim, sample_ddpm])
@pytest.mark.parametrize("control", [lambda predict: predict, controls.noise_instead])
def test_guided_sampling_stays_on_the_device(fake, monkeypatch, sampler, control):
    monkeypatch.setattr(sampling, "_require_finite", lambda *arguments: None)  # asks for numbers, which fakes have none of
    network = unet(16, 3).eval().requires_grad_(False)
    with GPU:
        heads = build_heads({"strong": [0, 1, 2], "weak": [2]}, {0: 8, 1: 8, 2: 8, 3: 8}, width=8).eval().requires_grad_(False)
    prior = UNetPredictor(unet(8, 1).eval().requires_grad_(False), DIFFUSION)
    terms = [Consistency(1.0), Prior(1.0, prior.eps, DIFFUSION, 8, (100, 300))]
    guided = DepthGuidance(UNetPredictor(network, DIFFUSION, "v_prediction"), heads, terms)
    monkeypatch.setattr(guided, "_inside", lambda t: torch.ones_like(t, dtype=torch.bool))
    monkeypatch.setattr(torch.Tensor, "any", lambda self: True)
    # The backward pass itself asks the driver, which is not there.
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, x: (torch.ones_like(x) * loss,))
    rng, steps = OnGpu([1, 2]), []
    found = sampler(control(guided), rng.randn("init", (3, 16, 16)), respace(1000, 2, "ddim"), DIFFUSION, rng=rng, callback=steps.append)
    assert found.device.type == "cuda"
    assert {step.shift.device.type for step in steps} == {"cuda"}


def test_losses_stay_on_the_device(fake):
    x, depth = torch.rand(4, 3, 16, 16, device=GPU), torch.rand(4, 1, 16, 16, device=GPU)
    with GPU:
        heads, network = build_heads({"strong": [0], "weak": [0]}, {0: 3}, width=8), torch.nn.Conv2d(3, 1, 1)
    data = accelerator.on(GPU, noised(x, DIFFUSION, generator(0, 1)))
    assert denoising_loss(DIFFUSION, "v_prediction")(unet(16, 3), data, generator(0, 1)).device.type == "cuda"
    assert depth_loss(network, (x, depth), generator(0, 1)).device.type == "cuda"
    assert head_loss(heads, ({0: x}, torch.arange(4, device=GPU), depth), generator(0, 1)).device.type == "cuda"


def test_data_is_moved_whatever_holds_it():
    held = ({"a": torch.ones(2)}, [torch.ones(1), 5], "text")
    moved = accelerator.on(torch.device("meta"), held)
    assert moved[0]["a"].device.type == moved[1][0].device.type == "meta"
    assert moved[1][1:] == [5]
    assert moved[2] == "text"
    assert accelerator.on(torch.device("cpu"), held)[1][0] is held[1][0]


def test_the_device_is_the_machine_s(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert accelerator.here() == GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert accelerator.here() == torch.device("cpu")


@pytest.mark.parametrize("gpu", [False, True])
def test_matrices_are_multiplied_in_tf32_on_a_gpu_alone(monkeypatch, gpu):
    before = torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        accelerator.multiply_in_tf32()
        assert torch.backends.cuda.matmul.allow_tf32 == gpu
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
