"""Pictures as people store them (uint8, channels last) and as networks take them ([-1, 1], channels first)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_tensor(images: np.ndarray) -> Tensor:
    """Images (n, h, w, 3) uint8 as (n, 3, h, w) float32 in [-1, 1]. Raises ValueError on another type or shape."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images are {images.dtype} of shape {images.shape}, expected uint8 (n, h, w, 3)")
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def to_uint8(x: Tensor) -> np.ndarray:
    """The inverse of to_tensor, clipped: (n, h, w, 3) uint8."""
    return x.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
