"""Depth heads: per-pixel MLPs that read depth out of frozen U-Net features (DAG, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dag.weights import check_state, load_module_file


def time_embedding(t: Tensor, width: int, num_timesteps: int = 1000, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sines and cosines of t (b,) at `width` / 2 geometric frequencies: (b, width). Fixed, so unseen t interpolate.

    Angles go up to t, where float32 has lost three digits: they are float64 (and on the CPU, as not every accelerator has that).
    """
    place = t.device if t.is_meta else torch.device("cpu")  # a plan counts operations on the meta device, which holds no numbers
    frequency = torch.exp(-math.log(10 * num_timesteps) * torch.arange(width // 2, dtype=torch.float64, device=place) / (width // 2))
    angle = t.to(place).double()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1).to(t.device, dtype)


class PixelLayer(nn.Module):
    """What follows a layer's Linear: BatchNorm(SiLU(z)) of the features plus Linear(embedding of t), added."""

    def __init__(self, width: int, time_width: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.time = nn.Linear(time_width, width)

    def forward(self, z: Tensor, embedding: Tensor) -> Tensor:
        return self.norm(F.silu(z)) + self.time(embedding)[:, :, None, None]

    def affine(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """In eval mode, scale (width,) and offset (b, width) with which forward is scale * SiLU(z) + offset."""
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        return scale, self.time(embedding) + (self.norm.bias - self.norm.running_mean * scale)


class DepthHead(nn.Module):
    """A per-pixel MLP over the features of some decoder blocks.

    channels: decoder block -> channels of its feature. width, time_width: of the hidden layers and the time embedding.
    layers: how many times Linear -> SiLU -> BatchNorm plus time is repeated (unstated in the paper).

    The first Linear commutes with bilinear upsampling: Linear(cat_k up(f_k)) = sum_k up(W_k f_k) + b. It is applied at each
    feature's own resolution, so that the concatenation at depth resolution never exists.
    """

    def __init__(self, channels: dict[int, int], width: int = 64, layers: int = 2, time_width: int = 64):
        super().__init__()
        if not channels or layers < 1:
            raise ValueError(f"DepthHead: channels is {channels} and layers is {layers}, expected at least one block and one layer")
        if time_width < 2 or time_width % 2:
            raise ValueError(f"DepthHead: time_width is {time_width}, expected an even number, as many sines as cosines")
        self.channels, self.width, self.time_width = dict(channels), width, time_width
        self.first = nn.ModuleDict({str(block): nn.Conv2d(c, width, 1, bias=False) for block, c in channels.items()})
        # As one Linear over the concatenation would be initialised, not as one Linear per block.
        bound = 1 / math.sqrt(sum(channels.values()))
        for conv in self.first.values():
            nn.init.uniform_(conv.weight, -bound, bound)
        self.bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound))
        self.hidden = nn.ModuleList([nn.Conv2d(width, width, 1) for _ in range(layers - 1)])
        self.layers = nn.ModuleList([PixelLayer(width, time_width) for _ in range(layers)])
        self.out = nn.Conv2d(width, 1, 1)

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(self.channels)

    def forward(self, features: dict[int, Tensor], t: Tensor, size: int) -> Tensor:
        """Coded depth (b, 1, size, size) from features {block: (b, c, h, w)} at t (b,). Raises KeyError on a missing block."""
        z = self._first_layer(features, size)
        embedding = time_embedding(t, self.time_width, dtype=z.dtype)
        linears = [*self.hidden, self.out]
        if not self.training:
            return self._folded(z, embedding, linears)
        for layer, linear in zip(self.layers, linears, strict=True):
            z = linear(layer(z, embedding))
        return z

    def _first_layer(self, features: dict[int, Tensor], size: int) -> Tensor:
        """sum_k up(W_k f_k) + b, (b, width, size, size)."""
        sums: dict[torch.Size, Tensor] = {}
        # Bilinear weights add up to 1, so the bias may come before the upsampling, with the first block.
        bias = self.bias
        for block, conv in self.first.items():
            # Features may come in half precision; the head computes in its own. With channels last, a pixel's numbers lie together:
            # upsampling is then some 15 and a 1x1 convolution 5 times as fast on a CPU.
            feature = features[int(block)].to(conv.weight.dtype, memory_format=torch.channels_last)
            projected, bias = F.conv2d(feature, conv.weight, bias), None
            shape = projected.shape[-2:]
            sums[shape] = sums[shape] + projected if shape in sums else projected
        z = None
        for shape, total in sums.items():
            upsampled = total if shape == (size, size) else F.interpolate(total, size=(size, size), mode="bilinear", align_corners=False)
            z = upsampled if z is None else z.add_(upsampled)
        return z

    def _folded(self, z: Tensor, embedding: Tensor, linears: list[nn.Conv2d]) -> Tensor:
        """The layers in eval mode, where norm and time are h = scale * silu(z) + offset and the next Linear takes both into its own:
        W h + c = (W scale) silu(z) + (W offset + c). Nothing but silu, one product and one addition is left per pixel."""
        for layer, linear in zip(self.layers, linears, strict=True):
            scale, offset = layer.affine(embedding)
            constant = F.linear(offset, linear.weight.flatten(1), linear.bias)
            z = F.conv2d(F.silu(z), linear.weight * scale[:, None, None]).add_(constant[:, :, None, None])
        return z


def build_heads(blocks: dict[str, Iterable[int]], channels: dict[int, int], **sizes) -> nn.ModuleDict:
    """Named heads, e.g. {"strong": [2, 4, 5, 6, 7], "weak": [6]}, over a U-Net whose blocks have these channels.

    Raises ValueError on a block that channels lacks.
    """
    for name, numbers in blocks.items():
        missing = sorted(set(numbers) - set(channels))
        if missing:
            raise ValueError(f"head {name!r} asks for decoder blocks {missing}; there are {sorted(channels)}")
    return nn.ModuleDict({name: DepthHead({k: channels[k] for k in numbers}, **sizes) for name, numbers in blocks.items()})


def load_heads(path: str | Path) -> nn.ModuleDict:
    """Heads written by the stage `heads`, frozen, batch norm in eval mode. Raises ValueError naming a file that holds something else."""
    state, config = load_module_file(path)
    if not {"blocks", "channels", "sizes"} <= config.keys():
        raise ValueError(f"{path}: no depth heads; the stage `heads` writes them")
    network = build_heads(config["blocks"], {int(b): c for b, c in config["channels"].items()}, **config["sizes"])
    check_state(network, state, path)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def head_loss(heads: nn.ModuleDict, data: tuple[dict[int, Tensor], Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """L1 to the coded depth label, summed over the heads, which are trained together. Data: features, t (b,), depth (b, 1, s, s)."""
    features, t, depth = data
    return sum((head(features, t, depth.shape[-1]) - depth).abs().mean() for head in heads.values())
