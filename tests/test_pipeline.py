"""The pipeline for diffusers' users: DDIMPipeline's output unguided, guidance that acts, folders, generators, callback, and what it refuses."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)

from dag.data.depth import DepthCoding
from dag.diffusion import Diffusion
from dag.networks import DepthHeads, DepthPrior
from dag.pipeline import DepthAwareGuidancePipeline
from dag.weights import save_unet

ARCHITECTURE = {
    "sample_size": 16,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
DEPTH_ARCHITECTURE = {**ARCHITECTURE, "sample_size": 8, "in_channels": 1, "out_channels": 1}
SIZES = {"width": 8, "layers": 2, "time_width": 4, "near": 0.5, "far": 10.0}
STRONG, WEAK = [0, 1, 2], [2]


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as this project writes it, with weights large enough that the predicted image is clipped now and then."""
    torch.manual_seed(0)
    unet = UNet2DModel(**ARCHITECTURE)
    with torch.no_grad():
        unet.conv_out.weight *= 3
    path = tmp_path_factory.mktemp("model") / "unet8"
    save_unet(unet, path, prediction_type="v_prediction", diffusion=Diffusion(), dtype=torch.float32)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    torch.manual_seed(1)
    heads = DepthHeads({"strong": STRONG, "weak": WEAK}, dict.fromkeys(range(4), 8), **SIZES)
    pipeline = DepthAwareGuidancePipeline.from_pretrained(folder, heads=heads, prior=DepthPrior(DEPTH_ARCHITECTURE))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def reference(folder):
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    "options",
    [{}, {"eta": 0.7}, {"use_clipped_model_output": True}, {"num_inference_steps": 7}],
    ids=["plain", "with the noise of eta", "eps follows clipping", "steps that divide nothing"],
)
@pytest.mark.parametrize("generators", ["list", "one"])
def test_unguided_it_is_ddim(pipe, reference, options, generators):
    def draw(pipeline):
        generator = seeds(3, 4) if generators == "list" else torch.Generator().manual_seed(3)
        return pipeline(2, generator, output_type="np", **{"num_inference_steps": 5, **options}).images

    expected = draw(reference)
    assert np.abs(draw(pipe) - expected).max() < 1e-5
    # The test would see a rule of clipping that is not DDIMPipeline's.
    assert ((expected == 0) | (expected == 1)).any()


def test_the_cosine_schedule_is_ddim_too():
    torch.manual_seed(0)
    unet, scheduler = UNet2DModel(**ARCHITECTURE), DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    own, theirs = DepthAwareGuidancePipeline(unet, scheduler), DDIMPipeline(unet, scheduler)
    images = []
    for pipeline in (own, theirs):
        pipeline.set_progress_bar_config(disable=True)
        images.append(pipeline(2, seeds(3, 4), num_inference_steps=10, output_type="np").images)
    assert np.abs(images[0] - images[1]).max() < 1e-5


def test_clipping_decides(pipe):
    """With these weights the two rules of `use_clipped_model_output` differ, so that the test above tells them apart."""
    first, second = (pipe(1, seeds(3), num_inference_steps=5, use_clipped_model_output=flag, output_type="np").images for flag in (False, True))
    assert np.abs(first - second).max() > 1e-3


def guided(pipeline, *numbers: int, **options) -> np.ndarray:
    return pipeline(len(numbers), seeds(*numbers), num_inference_steps=4, output_type="np", **{"w_dc": 50.0, "w_dp": 20.0, "tau": (100, 500), **options}).images


def test_guidance_acts_and_knows_no_batch_mates(pipe):
    both = guided(pipe, 5, 6)
    assert np.abs(both - guided(pipe, 5, 6, w_dc=0.0, w_dp=0.0)).max() > 1e-3
    for index, number in enumerate((5, 6)):
        assert np.abs(guided(pipe, number)[0] - both[index]).max() < 1e-5


def test_what_it_saves_it_reads(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = DepthAwareGuidancePipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert again.heads.depth_coding == DepthCoding(0.5, 10.0)
    assert np.abs(guided(again, 5) - guided(pipe, 5)).max() < 1e-5


def test_diffusers_reads_it_as_a_custom_pipeline(pipe, tmp_path):
    """By its own loader, from the folder and the file of this class, without importing dag."""
    pipe.save_pretrained(tmp_path / "saved")
    own = Path(inspect.getfile(DepthAwareGuidancePipeline))
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", custom_pipeline=str(own), trust_remote_code=True)
    again.set_progress_bar_config(disable=True)
    assert np.abs(guided(again, 5) - guided(pipe, 5)).max() < 1e-5


def test_outputs(pipe):
    call = {"batch_size": 2, "num_inference_steps": 2}
    pictures = pipe(**call, generator=seeds(1, 2)).images
    assert all(isinstance(picture, PIL.Image.Image) and picture.size == (16, 16) for picture in pictures)
    tensor = pipe(**call, generator=seeds(1, 2), output_type="pt").images
    assert tensor.shape == (2, 3, 16, 16)
    assert np.abs(np.asarray(pictures[0]) / 255 - tensor[0].permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    images, depth = pipe(**call, generator=seeds(1, 2), output_type="np", return_dict=False, output_depth=True)
    assert np.allclose(images, tensor.permute(0, 2, 3, 1))
    assert depth.shape == (2, 16, 16)
    assert 0.5 <= depth.min() <= depth.max() <= 10
    torch.manual_seed(9)
    first = pipe(1, num_inference_steps=2, output_type="np").images
    torch.manual_seed(9)
    assert (pipe(1, num_inference_steps=2, output_type="np").images == first).all()


def test_callback_sees_every_step_and_may_change_the_sample(pipe):
    calls = []

    def watch(pipeline, index, timestep, tensors):
        calls.append((index, timestep, sorted(tensors)))
        return {"sample": torch.zeros_like(tensors["sample"])} if index == 2 else tensors

    last = pipe(1, seeds(1), num_inference_steps=4, output_type="pt", callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["sample", "pred_xstart"])
    assert calls == [(i, t, ["pred_xstart", "sample"]) for i, t in enumerate((750, 500, 250, 0))]
    other = pipe(1, seeds(2), num_inference_steps=4, output_type="pt", callback_on_step_end=watch)
    assert torch.equal(last.images, other.images)  # both went on from zeros


class Bright:
    """A term that wants the depth large."""

    name, heads = "far", ("strong",)

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, depths, t, rng):
        return -depths["strong"].flatten(1).mean(1)


def test_a_term_of_ones_own(pipe):
    def mean_depth(terms):
        return pipe(2, seeds(1, 2), num_inference_steps=5, terms=terms, output_depth=True).depth.mean()

    assert mean_depth([Bright(300.0)]) > mean_depth([]) + 0.01


def test_a_loss_that_is_no_number_per_sample_is_refused(pipe):
    term = Bright(1.0)
    term.__class__ = type("Mean", (Bright,), {"__call__": lambda self, depths, t, rng: depths["strong"].mean()})
    with pytest.raises(ValueError, match=r"'far' returned a loss of shape \(\), expected \(2,\): one number per sample"):
        pipe(2, seeds(1, 2), num_inference_steps=2, terms=[term])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"generator": seeds(1)}, "1 generators for a batch of 2"),
        ({"output_type": "latent"}, "output_type is 'latent'"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0, expected 1 to 1000"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "has \\['latents'\\], expected some of \\['sample'"),
        ({"rule": "half"}, "rule is 'half'"),
    ],
)
def test_a_call_that_cannot_be_is_refused(pipe, options, expected):
    with pytest.raises(ValueError, match=expected):
        pipe(**{"batch_size": 2, "num_inference_steps": 2, "w_dc": 1.0, **options})


def test_guidance_without_its_networks_is_refused(folder):
    bare = DepthAwareGuidancePipeline.from_files(folder)
    with pytest.raises(ValueError, match="need heads"):
        bare(w_dc=1.0)
    bare.register_modules(heads=DepthHeads({"strong": STRONG}, dict.fromkeys(range(4), 8)))
    with pytest.raises(ValueError, match="w_dp needs a prior"):
        bare(w_dp=1.0)
    with pytest.raises(ValueError, match="what their depth is in metres"):
        bare(num_inference_steps=1, output_depth=True)


@pytest.mark.parametrize(("part", "expected"), [("vqvae", "a latent model"), ("text_encoder", "a model conditioned on text")])
@pytest.mark.parametrize("load", [DepthAwareGuidancePipeline.from_pretrained, DepthAwareGuidancePipeline.from_files])
def test_a_pipeline_of_something_else_than_pictures_is_refused(folder, tmp_path, part, expected, load):
    """Its U-Net may be a UNet2DModel like any other: the pipeline's index tells."""
    shutil.copytree(folder, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), part: ["diffusers", "Other"]}))
    with pytest.raises(ValueError, match=rf"model_index.json: {expected} \(it has {part}\), expected an unconditional model of pixels"):
        load(tmp_path / "model")


def test_other_kinds_of_models_are_refused(folder):
    unet = UNet2DModel(**ARCHITECTURE)
    with pytest.raises(ValueError, match=r"scheduler.thresholding is True, expected False"):
        DepthAwareGuidancePipeline(unet, DDPMScheduler(thresholding=True))
    with pytest.raises(ValueError, match="class-conditional"):
        DepthAwareGuidancePipeline(UNet2DModel(**ARCHITECTURE, num_class_embeds=3), DDPMScheduler())
    conditional = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,), "norm_num_groups": 4}
    with pytest.raises(ValueError, match="a UNet2DConditionModel, expected an unconditional UNet2DModel"):
        DepthAwareGuidancePipeline(UNet2DConditionModel(**conditional, layers_per_block=1), DDPMScheduler())
    with pytest.raises(ValueError, match=r"sample_size is \(16, 8\), expected one number"):
        DepthAwareGuidancePipeline(UNet2DModel(**{**ARCHITECTURE, "sample_size": (16, 8)}), DDPMScheduler())
    with pytest.raises(ValueError, match="in_channels is 4, expected 3: RGB pictures, neither latents nor greys"):
        DepthAwareGuidancePipeline(UNet2DModel(**ARCHITECTURE, in_channels=4, out_channels=4), DDPMScheduler())
    for scheduler, found in ((DDPMScheduler(beta_schedule="sigmoid"), "'sigmoid'"), (FlowMatchEulerDiscreteScheduler(), "None")):
        with pytest.raises(ValueError, match=f"beta_schedule is {found}, expected one of linear, scaled_linear, squaredcos_cap_v2"):
            DepthAwareGuidancePipeline(unet, scheduler)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder, expected a pipeline's"):
        DepthAwareGuidancePipeline.from_pretrained(tmp_path / "nowhere")


def test_a_u_net_alone_is_read_from_its_files(folder, tmp_path):
    UNet2DModel(**ARCHITECTURE).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"model_index.json: missing, expected a pipeline's folder; DepthAwareGuidancePipeline.from_files reads a U-Net alone"):
        DepthAwareGuidancePipeline.from_pretrained(tmp_path / "bare")
    assert DepthAwareGuidancePipeline.from_files(tmp_path / "bare").heads is None


def test_another_scheduler_put_in_its_place_is_refused(folder):
    pipeline = DepthAwareGuidancePipeline.from_pretrained(folder)
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="the scheduler is a PNDMScheduler, expected DDIMScheduler"):
        pipeline(num_inference_steps=2)
