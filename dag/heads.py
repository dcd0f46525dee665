"""Depth heads: per-pixel MLPs that read depth out of frozen U-Net features (DAG, section 4.1)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def time_embedding(t: Tensor, width: int, num_timesteps: int = 1000, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sines and cosines of t (b,) at `width` / 2 geometric frequencies: (b, width). Fixed, so unseen t interpolate."""
    frequency = torch.exp(-math.log(10 * num_timesteps) * torch.arange(width // 2, device=t.device, dtype=dtype) / (width // 2))
    angle = t[:, None].to(dtype) * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


class PixelLayer(nn.Module):
    """What follows a layer's Linear: BatchNorm(SiLU(z)) of the features plus Linear(embedding of t), added."""

    def __init__(self, width: int, time_width: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.time = nn.Linear(time_width, width)

    def forward(self, z: Tensor, embedding: Tensor) -> Tensor:
        return self.norm(F.silu(z)) + self.time(embedding)[:, :, None, None]


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
        by_resolution = defaultdict(list)
        for block, conv in self.first.items():
            # Features may come in half precision; the head computes in its own.
            feature = features[int(block)].to(conv.weight.dtype)
            by_resolution[feature.shape[-2:]].append(conv(feature))
        z = self.bias[:, None, None]
        for projected in by_resolution.values():
            total = sum(projected[1:], projected[0])
            z = z + (total if total.shape[-2:] == (size, size) else F.interpolate(total, size=(size, size), mode="bilinear", align_corners=False))
        embedding = time_embedding(t, self.time_width, dtype=z.dtype)
        h = self.layers[0](z, embedding)
        for linear, layer in zip(self.hidden, self.layers[1:], strict=True):
            h = layer(linear(h), embedding)
        return self.out(h)


def build_heads(blocks: dict[str, Iterable[int]], channels: dict[int, int], **sizes) -> nn.ModuleDict:
    """Named heads, e.g. {"strong": [2, 4, 5, 6, 7], "weak": [6]}, over a U-Net whose blocks have these channels.

    Raises ValueError on a block that channels lacks.
    """
    for name, numbers in blocks.items():
        missing = sorted(set(numbers) - set(channels))
        if missing:
            raise ValueError(f"head {name!r} asks for decoder blocks {missing}; there are {sorted(channels)}")
    return nn.ModuleDict({name: DepthHead({k: channels[k] for k in numbers}, **sizes) for name, numbers in blocks.items()})


def head_loss(heads: nn.ModuleDict, data: tuple[dict[int, Tensor], Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """L1 to the coded depth label, summed over the heads, which are trained together. Data: features, t (b,), depth (b, 1, s, s)."""
    features, t, depth = data
    return sum((head(features, t, depth.shape[-1]) - depth).abs().mean() for head in heads.values())
