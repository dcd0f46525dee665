"""Operations and activations of a study's networks, counted on the networks themselves, which are built without weights (on the meta device)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from dag.estimators import depth_network
from dag.heads import build_heads
from dag.stages.study import Study
from dag.unet import feature_shapes, forward_with_taps

# Intel/dpt-large where it is not here to be asked: the ViT-L/16 with DPT's decoder (Ranftl et al. 2021, arXiv 2103.13413, section 4).
_DPT_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 384,
    "backbone_out_indices": [5, 11, 17, 23],
    "neck_hidden_sizes": [256, 512, 1024, 1024],
}


class Counted:
    """FLOP of the networks of a study, for one picture: multiplications and additions counted each, those of matrices and convolutions."""

    def __init__(self, study: Study):
        from diffusers.models.unets.unet_2d import UNet2DModel

        self.study, self.size = study, study["domain"]["size"]
        config = {key: value for key, value in study.unet_architecture().items() if not key.startswith("_")}
        with torch.device("meta"):
            self.unet = UNet2DModel.from_config({"sample_size": self.size, **config}).eval().requires_grad_(False)
            self.x, self.t = torch.empty(1, self.unet.config.in_channels, self.size, self.size), torch.zeros(1, dtype=torch.long)
            self.shapes = feature_shapes(self.unet, self.size)
            channels = {block: shape[0] for block, shape in self.shapes.items()}
            names = {name: study["heads"][name] for name in ("strong", "weak")}
            self.heads = build_heads(names, channels, **{k: study["heads"][k] for k in ("width", "layers", "time_width")}).eval().requires_grad_(False)
            self.priors = {
                side: UNet2DModel(sample_size=side, in_channels=1, out_channels=1, **study["prior"]["architecture"]).eval().requires_grad_(False)
                for side in study["prior"]["resolutions"]
            }
        self.taps = sorted({*names["strong"], *names["weak"]})
        self.forward, _ = count(lambda: forward_with_taps(self.unet, self.x, self.t))
        self.to_taps, _ = count(lambda: forward_with_taps(self.unet, self.x, self.t, self.taps, stop_after_taps=True))
        features = {block: torch.empty(1, *self.shapes[block], device="meta") for block in self.taps}
        self.head, _ = count(lambda: [head(features, self.t, self.size) for head in self.heads.values()])
        self.prior = {side: count(lambda p=p, side=side: p(torch.empty(1, 1, side, side, device="meta"), self.t))[0] for side, p in self.priors.items()}
        kinds = [(dc, side) for dc in (False, True) for side in (None, *self.priors)]
        self.guided = {kind: self._guided(*kind) for kind in tqdm(kinds, desc="guided steps", unit="network", disable=not sys.stderr.isatty())}
        # Of each of these, the operations for one picture and the bytes of its parameters.
        self.estimator = _depth_network(study["estimator"]["model"]) if "estimator" in study.config else (0, 0)
        self.judge = _depth_network(study["judge"]["model"]) if "model" in study["judge"] else self._trained_judge()
        self.extractor = _extractor(study["evaluation"])
        # As those above, and the bytes of activations that a training step keeps for one picture.
        section, square = study["downstream"], (self.size, self.size)
        self.downstream = _trained_depth(section["architecture"], square)
        whole = section.get("reference_whole")
        self.downstream_whole = _trained_depth(whole["architecture"], tuple(whole["shape"])) if whole else None

    def _trained_judge(self) -> tuple[int, int]:
        return _trained_depth(self.study["judge"]["architecture"], (self.size, self.size))[:2]

    def trained_heads(self) -> int:
        """Bytes of activations that a training step of both heads keeps for one picture."""
        features = {block: torch.empty(1, *self.shapes[block], device="meta") for block in self.taps}
        return trained(self.heads, lambda: sum(head(features, self.t, self.size).sum() for head in self.heads.values()))

    def trained_prior(self, side: int) -> int:
        x = torch.empty(1, 1, side, side, device="meta")
        return trained(self.priors[side], lambda: self.priors[side](x, self.t).sample.sum())

    def _guided(self, consistency: bool, side: int | None) -> tuple[int, int]:
        """(FLOP, bytes kept for the gradient) of a guided step: one forward pass, one gradient through the deepest tap, heads and prior."""
        x = self.x.clone().requires_grad_()

        def step() -> None:
            _, features = forward_with_taps(self.unet, x, self.t, self.taps, detach_output=True)
            depth = {name: head(features, self.t, self.size) for name, head in self.heads.items() if consistency or name == "strong"}
            loss = sum(d.sum() for d in depth.values())
            if side is not None:
                small = nn.functional.interpolate(depth["strong"], (side, side), mode="area")
                loss = loss + self.priors[side](small, self.t).sample.square().sum()
            loss.backward()  # to x alone: the networks are frozen

        return (self.forward, 0) if side is None and not consistency else count(step)


def count(function: Callable[[], object]) -> tuple[int, int]:
    """(FLOP, bytes of activations kept for a gradient) of a call whose tensors are on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    del result
    return counter.get_total_flops(), sum(kept.values())


def _trained_depth(architecture: dict, shape: tuple[int, int]) -> tuple[int, int, int]:
    network, x = depth_network(architecture, shape).to("meta"), torch.empty(1, 3, *shape, device="meta")
    kept = count(lambda: network.train()(x).sum())[1]  # `trained` would train what is frozen
    return count(lambda: network.eval()(x))[0], size(network), kept


def _depth_network(model: str) -> tuple[int, int]:
    from transformers import AutoConfig, AutoModelForDepthEstimation, DPTConfig

    config = AutoConfig.from_pretrained(model) if (Path(model) / "config.json").is_file() else DPTConfig(**_DPT_LARGE)
    side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    with torch.device("meta"):
        network, pixels = AutoModelForDepthEstimation.from_config(config).eval(), torch.empty(1, 3, side, side)
    return count(lambda: network(pixel_values=pixels))[0], size(network)


def _extractor(section: dict) -> tuple[int, int]:
    if section["extractor"] == "inception":
        from torchvision.models import inception_v3

        with torch.device("meta"):
            network, pixels = inception_v3(weights=None, init_weights=False, aux_logits=False).eval(), torch.empty(1, 3, 299, 299)
        return count(lambda: network(pixels))[0], size(network)
    from dag.metrics.extractors import load_extractor

    options = {key: section.get(key) for key in ("dims", "resolution", "weights")}
    network = load_extractor(section["extractor"], **options).network.to("meta")
    pixels = torch.empty(1, 3, section["resolution"], section["resolution"], device="meta")
    return count(lambda: network(pixels))[0], size(network)


def size(module: nn.Module) -> int:
    """Bytes of its parameters in fp32."""
    return 4 * sum(p.numel() for p in module.parameters())


def trained(network: nn.Module, step: Callable[[], object]) -> int:
    """Bytes of activations that a training step of a network keeps. step: its forward pass."""
    network.requires_grad_(True).train()
    kept = count(step)[1]
    network.requires_grad_(False).eval()
    return kept
