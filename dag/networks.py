"""The two small networks that guidance needs, depth heads and depth prior: trained on arrays, read from a study's files, kept as diffusers keeps models.

What a study does from files by rules, this does in memory for a model of one's own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from dag.accelerator import here
from dag.data.depth import DepthCoding
from dag.data.images import to_tensor
from dag.diffusion import Diffusion
from dag.guidance import UNetPredictor
from dag.heads import build_heads, load_heads
from dag.tensor_files import read_mapping
from dag.training import Recipe, denoising_loss, fit, generator, noised
from dag.unet import feature_shapes, forward_with_taps
from dag.weights import architecture, load_module_file, load_unet

# Of a prior, where no other is asked for; image size and channels follow from the data.
PRIOR_ARCHITECTURE = {
    "block_out_channels": [16, 32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "attention_head_dim": 16,
}


class DepthHeads(ModelMixin, ConfigMixin):
    """Named depth heads, a mapping for `DepthGuidance`, as a model that diffusers saves and loads.

    blocks: {name: decoder blocks that the head reads}. channels: {block: channels of its feature}. width, layers, time_width: as in
    `dag.heads.DepthHead`. near, far, coding: what the heads' depth means in metres, as in `DepthCoding`; unknown without near.
    """

    @register_to_config
    def __init__(
        self,
        blocks: dict[str, list[int]],
        channels: dict[int, int],
        width: int = 64,
        layers: int = 2,
        time_width: int = 64,
        near: float | None = None,
        far: float | None = None,
        coding: str = "log",
    ):
        super().__init__()
        # A config on disk is JSON, whose names are text.
        channels = {int(block): count for block, count in channels.items()}
        self.heads = build_heads(blocks, channels, width=width, layers=layers, time_width=time_width)
        self.depth_coding = None if near is None else DepthCoding(near, far, coding)

    @classmethod
    def load(cls, path: str | Path) -> DepthHeads:
        """From a file of the stage `heads` (.safetensors) or a folder of `save_pretrained`, frozen. Raises FileNotFoundError or ValueError naming it."""
        path = Path(path)
        if path.is_dir():
            return _from_folder(cls, path)
        heads, depth = load_heads(path), load_module_file(path)[1].get("depth", {})
        first = next(iter(heads.values()))
        sizes = {"width": first.width, "layers": len(first.layers), "time_width": first.time_width}
        channels = {block: count for head in heads.values() for block, count in head.channels.items()}
        network = cls({name: list(head.blocks) for name, head in heads.items()}, channels, **sizes, **depth)
        network.heads = heads
        return network.eval().requires_grad_(False)

    def forward(self, features: dict[int, Tensor], t: Tensor, size: int) -> dict[str, Tensor]:
        """Coded depth (b, 1, size, size) of every head."""
        return {name: head(features, t, size) for name, head in self.heads.items()}

    def __getitem__(self, name: str) -> nn.Module:
        return self.heads[name]

    def __contains__(self, name: str) -> bool:
        return name in self.heads

    def keys(self):
        return self.heads.keys()


class DepthPrior(ModelMixin, ConfigMixin):
    """A diffusion model over depth maps, for the guidance term `Prior`, as a model that diffusers saves and loads.

    architecture: arguments of diffusers' UNet2DModel; its sample_size is the prior's resolution. The rest: what its U-Net predicts, and
    the betas it was trained with.
    """

    @register_to_config
    def __init__(
        self,
        architecture: dict,
        prediction_type: str = "v_prediction",
        num_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
    ):
        super().__init__()
        self.unet = UNet2DModel(**architecture)
        self.resolution = architecture["sample_size"]
        self.diffusion = Diffusion(num_timesteps, beta_start, beta_end, beta_schedule)

    @classmethod
    def load(cls, path: str | Path) -> DepthPrior:
        """From a folder of the stage `prior` or of `save_pretrained`, frozen. Raises FileNotFoundError or ValueError naming it."""
        path = Path(path)
        if (path / "config.json").exists() and read_mapping(path / "config.json").get("_class_name") == cls.__name__:
            return _from_folder(cls, path)
        unet, meta = load_unet(path)
        prior = cls(architecture(unet), **{key: meta[key] for key in ("prediction_type", "num_timesteps", "beta_start", "beta_end", "beta_schedule")})
        prior.unet = unet
        return prior.eval().requires_grad_(False)

    def forward(self, depth: Tensor, tau: Tensor) -> Tensor:
        """Predicted noise of noised coded depth (b, 1, r, r) at tau (b,)."""
        return UNetPredictor(self.unet, self.diffusion, self.config.prediction_type).eps(depth, tau)


def _from_folder(kind: type[ModelMixin], folder: Path) -> ModelMixin:
    """What `save_pretrained` of a class wrote, frozen. Raises ValueError for a folder of something else."""
    config = read_mapping(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config.get("_class_name") != kind.__name__:
        raise ValueError(f"{folder}: holds {config.get('_class_name') or 'no config.json'}, expected what {kind.__name__}.save_pretrained writes")
    return kind.from_pretrained(folder).eval().requires_grad_(False)


def train_heads(
    plain: UNetPredictor,
    images: np.ndarray | Tensor,
    depth: np.ndarray,
    coding: DepthCoding,
    *,
    strong: tuple[int, ...] = (2, 4, 5, 6, 7),
    weak: tuple[int, ...] = (6,),
    width: int = 64,
    layers: int = 2,
    time_width: int = 64,
    recipe: Recipe | None = None,
) -> DepthHeads:
    """Strong and weak depth head on the features of a frozen U-Net, trained together on image and depth pairs (L1, DAG section 4.1).

    images: (n, s, s, 3) uint8, or (n, 3, s, s) in [-1, 1], at the U-Net's size. depth: (n, s, s) metres along the optical axis; where it is
    not finite or not positive it is unknown and teaches nothing. strong, weak: decoder blocks, counted from 0. recipe: by default 600 steps
    of 16, 2e-3; its seed decides everything random. Returns them frozen, on the U-Net's device.
    Raises ValueError, saying what is expected, for pictures or depths of another size or kind and for blocks that the U-Net lacks.
    """
    recipe = recipe or Recipe(steps=600, batch_size=16, learning_rate=2e-3, ema=0.99)
    device = next(plain.unet.parameters()).device
    x_start, size = _pictures(images), plain.unet.config.sample_size
    if tuple(x_start.shape[2:]) != (size, size):
        raise ValueError(f"images are {x_start.shape[2]} x {x_start.shape[3]} pixels, expected {size} x {size}, the size of the U-Net: crop and resize them")
    if tuple(np.shape(depth)) != (len(x_start), size, size):
        raise ValueError(f"depth has shape {tuple(np.shape(depth))}, expected {(len(x_start), size, size)}: one map for each image, at its size")
    coded, known = _coded(depth, coding)
    blocks = {"strong": list(strong), "weak": list(weak)}
    channels = {block: shape[0] for block, shape in feature_shapes(plain.unet, size).items()}
    for name, numbers in blocks.items():
        if lacking := sorted(set(numbers) - channels.keys()):
            raise ValueError(f"{name} names decoder blocks {lacking}; this U-Net has blocks 0 to {len(channels) - 1}: give {name}=(...) some of them")
    with _seeded(recipe.seed):
        network = DepthHeads(blocks, channels, width=width, layers=layers, time_width=time_width, near=coding.near, far=coding.far, coding=coding.coding).to(
            device
        )
    taps, diffusion = {*strong, *weak}, plain.diffusion

    def batch(step: int) -> tuple:
        draw = generator(recipe.seed, step)
        rows = torch.randint(len(x_start), (recipe.batch_size,), generator=draw)
        t = ((torch.arange(len(rows)) + torch.rand(len(rows), generator=draw)) / len(rows) * diffusion.num_timesteps).long()
        x_t = diffusion.q_sample(x_start[rows], t, torch.randn(x_start[rows].shape, generator=draw)).to(device)
        t = t.to(device)
        with torch.no_grad():
            features = forward_with_taps(plain.unet, x_t, t, taps, stop_after_taps=True)[1]
        return features, t, coded[rows].to(device), known[rows].to(device)

    return _fit(network, _known_loss, batch, recipe, "depth heads")


def train_prior(
    depth: np.ndarray,
    coding: DepthCoding,
    resolution: int,
    *,
    architecture: dict | None = None,
    prediction_type: str = "v_prediction",
    recipe: Recipe | None = None,
) -> DepthPrior:
    """A diffusion model over depth maps at one resolution, trained on depth alone (DAG section 4.2).

    depth: (n, s, s) metres, brought to `resolution` by area averaging over what is known of it (see train_heads). architecture: arguments of
    UNet2DModel, by default PRIOR_ARCHITECTURE. recipe: by default 1000 steps of 32, 1e-3. Trained on the GPU
    where there is one, returned frozen, on the CPU.
    Raises ValueError for depths of another kind, and where a pixel at the prior's resolution has no known depth at all.
    """
    recipe = recipe or Recipe(steps=1000, batch_size=32, learning_rate=1e-3)
    coded, known = _coded(depth, coding)
    share = F.interpolate(known, size=(resolution, resolution), mode="area")
    if (share == 0).any():
        bad = int((share.flatten(1) == 0).any(1).nonzero()[0])
        raise ValueError(f"depth map {bad} has holes as large as a pixel of {resolution} x {resolution}, expected smaller ones: fill them or leave it out")
    maps = F.interpolate(coded * known, size=(resolution, resolution), mode="area") / share
    with _seeded(recipe.seed):
        network = DepthPrior({**(architecture or PRIOR_ARCHITECTURE), "sample_size": resolution, "in_channels": 1, "out_channels": 1}, prediction_type)

    def batch(step: int) -> tuple[Tensor, ...]:
        rows = torch.randint(len(maps), (recipe.batch_size,), generator=generator(recipe.seed, step, 1))
        return noised(maps[rows], network.diffusion, generator(recipe.seed, step))

    _fit(network.unet.to(here()), denoising_loss(network.diffusion, prediction_type), batch, recipe, "depth prior")
    return network.cpu().eval().requires_grad_(False)


def _known_loss(network: DepthHeads, data: tuple, generator: torch.Generator) -> Tensor:
    """L1 to the coded depth where it is known, summed over the heads."""
    features, t, depth, known = data
    errors = [((head(features, t, depth.shape[-1]) - depth).abs() * known).sum() for head in network.heads.values()]
    return sum(errors) / known.sum().clamp(min=1)


def _fit(network: nn.Module, loss, batch, recipe: Recipe, name: str) -> nn.Module:
    """Train in memory: what `fit` keeps for an interrupted training goes to a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        fit(network, loss, batch, recipe, state=Path(folder) / "state.pt", log=Path(folder) / "log.jsonl", name=name)
    return network.eval().requires_grad_(False)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random weights of a seed; the caller's random numbers are left as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _pictures(images: np.ndarray | Tensor) -> Tensor:
    if not torch.is_tensor(images):
        return to_tensor(np.asarray(images))
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or images.abs().max() > 1.001:
        raise ValueError(f"images are a tensor of {images.dtype} and shape {tuple(images.shape)}, expected floats (n, 3, s, s) in [-1, 1]")
    return images.float().cpu()


def _coded(depth: np.ndarray, coding: DepthCoding) -> tuple[Tensor, Tensor]:
    """Coded depth (n, 1, s, s) and where it is known (1 or 0), with a word where its unit seems to be another."""
    metres = torch.as_tensor(np.asarray(depth, np.float32))
    if metres.ndim != 3 or not len(metres):
        raise ValueError(f"depth has shape {tuple(metres.shape)}, expected (n, s, s): at least one map")
    known = metres.isfinite() & (metres > 0)
    if not known.any():
        raise ValueError("depth is nowhere known, expected metres: finite and positive")
    middle = float(metres[known].median())
    if not coding.near <= middle <= coding.far:
        raise ValueError(f"depth has a median of {middle:g}, outside the coding's {coding.near:g} to {coding.far:g} m: is it in metres?")
    return coding.encode(metres.where(known, torch.tensor(coding.near)))[:, None], known[:, None].float()
