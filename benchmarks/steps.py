"""The steps that the benchmark of the guided step times: unguided, ours, naive, the limit, and a head alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # this checkout, and the naive step, which is the tests' oracle

import torch  # noqa: E402
import yaml  # noqa: E402
from diffusers import UNet2DModel  # noqa: E402
from naive import NaiveGuidance, NaiveHead, hooked_forward, naive_eps  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dag.diffusion import Diffusion, Prediction  # noqa: E402
from dag.guidance import Consistency, DepthGuidance, Prior, UNetPredictor  # noqa: E402
from dag.heads import build_heads  # noqa: E402
from dag.sampling import SampleRNG  # noqa: E402
from dag.unet import decoder_blocks, feature_shapes  # noqa: E402
from dag.weights import load_unet  # noqa: E402

STUDY = yaml.safe_load((ROOT / "config" / "rooms.yaml").read_text())
BLOCKS = {name: STUDY["heads"][name] for name in ("strong", "weak")}
WEIGHTS, TAU = {"w_dc": 100.0, "w_dp": 100.0}, (300, 300)
DIFFUSION = Diffusion()

# google/ddpm-church-256: 114 million parameters, attention of one head at the fifth level.
CHURCH = {
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}

Step = Callable[[Tensor, Tensor, SampleRNG], Prediction | None]


@dataclass
class Domain:
    """What a step is made of: U-Net, heads of random weights, and a random prior at half the image's side. All of it is the same in every process."""

    unet: UNet2DModel
    kind: str
    heads: nn.ModuleDict
    prior: UNet2DModel
    size: int


def _random_unet(size: int, channels: int, architecture: dict) -> UNet2DModel:
    return UNet2DModel(sample_size=size, in_channels=channels, out_channels=channels, **architecture).eval().requires_grad_(False)


def domain(name: str) -> Domain:
    """ "rooms": the default study's sizes and its shipped U-Net, if there is one. "church": 256x256, random weights."""
    torch.manual_seed(0)
    shipped = ROOT / "models" / "rooms32"
    if name == "rooms" and shipped.exists():
        unet, meta = load_unet(shipped)
        kind, size = meta["prediction_type"], unet.config.sample_size
    elif name == "rooms":
        size, kind = STUDY["domain"]["size"], STUDY["unet"]["prediction_type"]
        unet = _random_unet(size, 3, STUDY["unet"]["architecture"])
    else:
        size, kind = 256, "epsilon"
        unet = _random_unet(size, 3, CHURCH)
    sizes = {key: STUDY["heads"][key] for key in ("width", "layers", "time_width")}
    heads = build_heads(BLOCKS, {b.index: b.channels for b in decoder_blocks(unet)}, **sizes)
    for norm in (m for m in heads.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
    prior = _random_unet(size // 2, 1, STUDY["prior"]["architecture"])
    return Domain(unet, kind, heads.eval().requires_grad_(False), prior, size)


def _prior_eps(d: Domain, channels_last: bool, precision: str = "fp32") -> Callable:
    return UNetPredictor(d.prior, DIFFUSION, "v_prediction", precision, channels_last).eps


def unguided(d: Domain, precision: str = "fp32", channels_last: bool = True) -> Step:
    return UNetPredictor(d.unet, DIFFUSION, d.kind, precision, channels_last)


def guided(d: Domain, precision: str = "fp32", channels_last: bool = True) -> Step:
    prior = Prior(WEIGHTS["w_dp"], _prior_eps(d, channels_last, precision), DIFFUSION, d.size // 2, TAU)
    return DepthGuidance(unguided(d, precision, channels_last), d.heads, [Consistency(WEIGHTS["w_dc"]), prior])


def naive(d: Domain) -> Step:
    """As one would first write it, with networks as they are loaded: not frozen, and in PyTorch's own memory layout."""
    for network in (d.unet, d.prior):
        network.requires_grad_()
    heads = {name: NaiveHead(head) for name, head in d.heads.items()}
    prior = partial(naive_eps, d.prior, DIFFUSION, "v_prediction")
    return NaiveGuidance(d.unet, DIFFUSION, d.kind, heads, **WEIGHTS, prior=prior, resolution=d.size // 2, tau=TAU)


def limit(d: Domain, ours: bool) -> Step:
    """What no implementation can leave out: a forward pass of the U-Net, a gradient of a sum over its deepest tap, the prior's both.

    Of diffusers' own forward pass on the model as it is loaded, or of `ours`: frozen, in the layout that our guided step uses.
    """
    deepest = max(b for blocks in BLOCKS.values() for b in blocks)
    predictor, prior = UNetPredictor(d.unet, DIFFUSION, d.kind, channels_last=ours), _prior_eps(d, channels_last=ours)

    def step(x_t: Tensor, t: Tensor, rng: SampleRNG) -> None:
        depth = torch.zeros(len(x_t), 1, d.size // 2, d.size // 2, requires_grad=True)
        with torch.enable_grad():
            x = x_t.clone().requires_grad_()
            features = predictor.taps(x, t, (deepest,), with_grad=True)[1] if ours else hooked_forward(d.unet, x, t, (deepest,))[1]
            torch.autograd.grad(features[deepest].sum(), x)
            torch.autograd.grad(prior(depth, t).sum(), depth)

    return step


def head_alone(d: Domain, form: Callable[[nn.Module], nn.Module]) -> Step:
    """Forward and backward of the strong head on random features of one image, to every feature."""
    head = form(d.heads["strong"])
    torch.manual_seed(1)
    features = {k: torch.randn(1, *shape).requires_grad_() for k, shape in feature_shapes(d.unet, d.size).items() if k in BLOCKS["strong"]}

    def step(x_t: Tensor, t: Tensor, rng: SampleRNG) -> None:
        torch.autograd.grad(head(features, t, x_t.shape[-1]).sum(), list(features.values()))

    return step


STEPS: dict[str, Callable[[Domain], Step]] = {
    "unguided": unguided,
    "bare limit": partial(limit, ours=True),
    "bare limit, diffusers' forward": partial(limit, ours=False),
    "guided, ours": guided,
    "guided, naive": naive,
    "unguided, bf16": partial(unguided, precision="bf16"),
    "guided, ours, bf16": partial(guided, precision="bf16"),
}
HEADS: dict[str, Callable[[Domain], Step]] = {
    "head, factorised": partial(head_alone, form=lambda head: head),
    "head, concatenating": partial(head_alone, form=NaiveHead),
}
