"""`DepthAwareGuidancePipeline`: sampling with depth-aware guidance in the conventions of diffusers. A thin adapter over guidance and sampling."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dag.diffusion import SCHEDULES, Diffusion
from dag.guidance import Consistency, DepthGuidance, Prior, Term, UNetPredictor
from dag.networks import DepthHeads, DepthPrior
from dag.sampling import SampleRNG, Step, sample_ddim
from dag.unet import decoder_blocks, picture_side
from dag.weights import check_pixel_space, load_unet

OUTPUT_TYPES = ("pil", "np", "pt")
# What a scheduler may also do to a step, with the value at which it does nothing: our DDIM step knows none of it.
_PLAIN_STEP = {"trained_betas": None, "thresholding": False, "rescale_betas_zero_snr": False, "set_alpha_to_one": True, "clip_sample_range": 1.0}
_OF_THE_HUB = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "token"}  # options that say where a model is
Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class DepthAwareGuidanceOutput(BaseOutput):
    """images: a list of PIL images, or (b, s, s, c) numpy or (b, c, s, s) torch in [0, 1]. depth: (b, s, s) metres, where asked for."""

    images: list[PIL.Image.Image] | np.ndarray | Tensor
    depth: np.ndarray | None = None


class DepthAwareGuidancePipeline(DiffusionPipeline):
    """DDIM with depth-aware guidance (DAG, arXiv 2212.08861) for an unconditional pixel-space `UNet2DModel`.

    unet, scheduler: as for diffusers' DDIMPipeline, whose output an unguided call equals; any scheduler of discrete betas is turned into DDIM.
    heads: `DepthHeads` on that U-Net, which every guidance needs. prior: `DepthPrior`, which w_dp needs. All networks are frozen here.
    `from_pretrained` reads every folder that DDPMPipeline or DDIMPipeline reads, with heads and prior as keywords, and what `save_pretrained`
    of this class wrote. Raises ValueError for conditional and unknown U-Nets and for schedulers whose step is not plain DDIM.
    """

    _optional_components = ["heads", "prior"]
    _callback_tensor_inputs = ["sample", "pred_xstart"]

    def __init__(self, unet: UNet2DModel, scheduler: DDIMScheduler, heads: DepthHeads | None = None, prior: DepthPrior | None = None):
        super().__init__()
        if (schedule := scheduler.config.get("beta_schedule")) not in SCHEDULES:
            raise ValueError(f"scheduler.beta_schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}")
        scheduler = DDIMScheduler.from_config(scheduler.config)
        for key, plain in _PLAIN_STEP.items():
            if scheduler.config.get(key, plain) != plain:
                raise ValueError(f"scheduler.{key} is {scheduler.config[key]!r}, expected {plain!r}")
        if not isinstance(unet, UNet2DModel):
            raise ValueError(f"the U-Net is a {type(unet).__name__}, expected an unconditional UNet2DModel that works on pixels")
        picture_side(unet)
        decoder_blocks(unet)
        for network in (unet, heads, prior):
            if network is not None:
                network.eval().requires_grad_(False)
        self.register_modules(unet=unet, scheduler=scheduler, heads=heads, prior=prior)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options) -> DepthAwareGuidancePipeline:
        """As DiffusionPipeline.from_pretrained, from a folder or the hub; a latent or text-conditional model, and a U-Net alone, are refused."""
        index = Path(folder) / "model_index.json"
        if Path(folder).is_absolute() and not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder, expected a pipeline's, or a model's name on the hub")
        if Path(folder).is_dir() and not index.is_file():
            raise ValueError(f"{index}: missing, expected a pipeline's folder; DepthAwareGuidancePipeline.from_files reads a U-Net alone")
        check_pixel_space(cls.load_config(folder, **{key: options[key] for key in _OF_THE_HUB & options.keys()}), index if index.is_file() else folder)
        return super().from_pretrained(folder, **options)

    @classmethod
    def from_files(cls, unet: str | Path, heads: str | Path | None = None, prior: str | Path | None = None) -> DepthAwareGuidancePipeline:
        """From whatever `load_unet`, `DepthHeads.load` and `DepthPrior.load` read: diffusers folders, guided-diffusion's .pt, a study's files."""
        network, meta = load_unet(unet)
        keys = {"num_train_timesteps": "num_timesteps", **{key: key for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type")}}
        scheduler = DDIMScheduler(**{theirs: meta[ours] for theirs, ours in keys.items()})
        return cls(network, scheduler, heads and DepthHeads.load(heads), prior and DepthPrior.load(prior))

    @property
    def predictor(self) -> UNetPredictor:
        """The U-Net as `dag` samples with it: what `train_heads` and `DepthGuidance` take."""
        config = self.scheduler.config
        diffusion = Diffusion(config.num_train_timesteps, config.beta_start, config.beta_end, config.beta_schedule)
        return UNetPredictor(self.unet, diffusion, config.prediction_type)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        w_dc: float = 0.0,
        w_dp: float = 0.0,
        terms: Sequence[Term] = (),
        rule: str = "score",
        tau: int | tuple[int, int] = 300,
        window: tuple[int, int] = (0, 10**9),
        precision: str = "fp32",
        output_depth: bool = False,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("sample",),
    ) -> DepthAwareGuidanceOutput | tuple:
        """Draw `batch_size` images.

        The arguments before `*` are DDIMPipeline's; with a list of generators, one per image, no image depends on its batch-mates. w_dc, w_dp:
        weights of depth consistency and depth prior. terms: guidance of your own (`dag.guidance.Term`). rule: how the gradient enters a
        step (`dag.sampling.guidance_factor`). tau: noise level of the prior, or (low, high) to draw from. window: (low, high) timesteps at which
        guidance acts. precision: "fp32" or "bf16" (autocast of the U-Net). output_depth: the strong head's depth of the finished images, too.
        callback_on_step_end(pipeline, index, timestep, tensors) is called after every step and may return {"sample": ...} to go on from.
        Returns DepthAwareGuidanceOutput, or (images,) or (images, depth). Raises ValueError on values that cannot be.
        """
        tensors = tuple(callback_on_step_end_tensor_inputs or ())
        self._check(generator, batch_size, output_type, w_dp, terms or w_dc or w_dp or output_depth, tensors)
        plain = self.predictor
        plain = UNetPredictor(self.unet, plain.diffusion, plain.prediction_type, precision)
        if not plain.diffusion.num_timesteps >= num_inference_steps >= 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}, expected 1 to {plain.diffusion.num_timesteps}")
        predict = DepthGuidance(plain, self.heads or {}, [*self._own_terms(w_dc, w_dp, tau), *terms], window)
        side = picture_side(self.unet)
        shape = (batch_size, self.unet.config.in_channels, side, side)
        rng = _Random(generator, batch_size, self._execution_device)
        x = randn_tensor(shape, generator=generator, device=self._execution_device)
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps.cpu().numpy()[::-1].copy()
        with self.progress_bar(total=len(timesteps)) as bar:
            watch = _Watch(self, bar, len(timesteps), callback_on_step_end, tensors)
            clip = bool(self.scheduler.config.clip_sample) and (True if use_clipped_model_output else "pred_xstart")
            x = sample_ddim(predict, x, timesteps, plain.diffusion, eta=eta, rule=rule, rng=rng, clip=clip, callback=watch)
        depth = self._depth(x, rng) if output_depth else None
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        if not return_dict:
            return (images,) if depth is None else (images, depth)
        return DepthAwareGuidanceOutput(images=images, depth=depth)

    def _own_terms(self, w_dc: float, w_dp: float, tau: int | tuple[int, int]) -> list[Term]:
        terms: list[Term] = [Consistency(w_dc)] if w_dc else []
        if w_dp:
            levels = (tau, tau) if isinstance(tau, int) else tuple(tau)
            terms.append(Prior(w_dp, self.prior, self.prior.diffusion, self.prior.resolution, levels))
        return terms

    def _depth(self, x: Tensor, rng: _Random) -> np.ndarray:
        if self.heads.depth_coding is None:
            raise ValueError("output_depth: these heads do not say what their depth is in metres; give DepthHeads near and far")
        coded = self.predictor.read_depth(self.heads["strong"], x.clamp(-1, 1), 20, rng.randn("read", x.shape[1:]))
        return self.heads.depth_coding.decode(coded)[:, 0].cpu().numpy()

    def _check(self, generator: Generators, batch_size: int, output_type: str, w_dp: float, reads: object, tensors: Sequence[str]) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        if not isinstance(self.scheduler, DDIMScheduler):
            raise ValueError(f"the scheduler is a {type(self.scheduler).__name__}, expected DDIMScheduler: this pipeline samples by DDIM alone")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"there are {len(generator)} generators for a batch of {batch_size}, expected one for each image, or a single one")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}, expected one of {OUTPUT_TYPES}")
        if reads and self.heads is None:
            raise ValueError("guidance and depth need heads: DepthAwareGuidancePipeline(..., heads=train_heads(...)) or from_pretrained(..., heads=...)")
        if w_dp and self.prior is None:
            raise ValueError("w_dp needs a prior: DepthAwareGuidancePipeline(..., prior=train_prior(...)) or from_pretrained(..., prior=...)")
        if unknown := sorted(set(tensors) - set(self._callback_tensor_inputs)):
            raise ValueError(f"callback_on_step_end_tensor_inputs has {unknown}, expected some of {self._callback_tensor_inputs}")
        if self.unet.dtype != torch.float32:
            raise ValueError(f"the U-Net is {self.unet.dtype}, expected torch.float32; half precision is precision='bf16' of the call")


class _Random:
    """The sampler's random numbers: the steps' noise from the caller's generators, as DDIMPipeline draws it; all else from streams of their own.

    The streams start from the generators' state, so that drawing from them shifts nothing.
    """

    def __init__(self, generator: Generators, batch_size: int, device: torch.device):
        self.generator, self.batch_size, self.device = generator, batch_size, device
        each = generator if isinstance(generator, list) else [generator] * batch_size
        states = [torch.get_rng_state() if one is None else one.get_state() for one in each]
        if not isinstance(generator, list):
            states = [torch.cat([state, torch.tensor([*index.to_bytes(4, "big")], dtype=torch.uint8)]) for index, state in enumerate(states)]
        hashes = [hashlib.blake2b(state.numpy().tobytes(), digest_size=4).digest() for state in states]
        self.own = SampleRNG([int.from_bytes(value, "big") for value in hashes], device)
        self.seeds = [index if one is None else one.initial_seed() for index, one in enumerate(each)]

    def randn(self, stream: str, shape: Sequence[int]) -> Tensor:
        if stream == "step":
            return randn_tensor((self.batch_size, *shape), generator=self.generator, device=self.device)
        return self.own.randn(stream, shape)

    def randint(self, stream: str, low: int, high: int) -> Tensor:
        return self.own.randint(stream, low, high)


class _Watch:
    """The sampler's callback: moves the bar, and calls the caller's in the form that diffusers' pipelines have."""

    def __init__(self, pipeline: DepthAwareGuidancePipeline, bar, steps: int, callback: Callable | None, tensors: Sequence[str]):
        self.pipeline, self.bar, self.steps, self.callback, self.tensors = pipeline, bar, steps, callback, tensors

    def __call__(self, step: Step) -> None:
        self.bar.update()
        if self.callback is None:
            return
        given = {"sample": step.x_prev, "pred_xstart": step.pred_xstart}
        answer = self.callback(self.pipeline, self.steps - 1 - step.index, int(step.t[0]), {name: given[name] for name in self.tensors})
        sample = (answer or {}).get("sample", step.x_prev)
        if sample is not step.x_prev:
            step.x_prev.copy_(sample)  # the tensor that the sampler goes on from
