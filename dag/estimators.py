"""Depth estimators: networks that map an image to depth. The judge of dFID and the downstream network of Table 4."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dag.data.depth import DepthCoding
from dag.data.images import to_tensor


class DepthUNet(nn.Module):
    """A convolutional U-Net from an image in [-1, 1] (b, 3, s, s) to coded depth (b, 1, s, s).

    It is diffusers' UNet2DModel with its time fixed at zero. architecture: that model's keyword arguments.
    """

    def __init__(self, architecture: dict):
        super().__init__()
        from diffusers.models.unets.unet_2d import UNet2DModel

        self.unet = UNet2DModel(**{"in_channels": 3, "out_channels": 1, **architecture})

    def forward(self, image: Tensor) -> Tensor:
        return self.unet(image, torch.zeros(len(image), device=image.device)).sample


def depth_loss(model: nn.Module, data: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """L1 between coded depths, the image and its depth mirrored together for every second sample on average."""
    image, depth = data
    mirror = (torch.rand(len(image), generator=generator) < 0.5)[:, None, None, None]
    image, depth = torch.where(mirror, image.flip(-1), image), torch.where(mirror, depth.flip(-1), depth)
    return (model(image).float() - depth).abs().mean()


@torch.no_grad()
def estimate(model: nn.Module, images: np.ndarray, coding: DepthCoding, batch_size: int = 64) -> np.ndarray:
    """Depth in metres, (n, s, s) float32, of images (n, s, s, 3) uint8. model: maps images in [-1, 1] to coded depth, in eval mode."""
    device = next(model.parameters()).device
    batches = (to_tensor(images[i : i + batch_size]).to(device) for i in range(0, len(images), batch_size))
    return torch.cat([coding.decode(model(batch).float())[:, 0].cpu() for batch in batches]).numpy()
