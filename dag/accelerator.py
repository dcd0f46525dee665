"""Where a job computes: the GPU that CUDA_VISIBLE_DEVICES leaves it, else the CPU."""

from __future__ import annotations

from typing import Any

import torch


def here() -> torch.device:
    """The device of this process. On a GPU, products of float32 matrices are from now on computed in TF32, as PyTorch computes convolutions."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    return torch.device("cuda")


def on(device: torch.device, data: Any) -> Any:
    """Tensors, or tuples, lists and dicts of them, moved to a device; what is there already, and what is no tensor, stays."""
    if isinstance(data, torch.Tensor):
        return data.to(device)
    if isinstance(data, dict):
        return {key: on(device, value) for key, value in data.items()}
    if isinstance(data, tuple | list):
        return type(data)(on(device, value) for value in data)
    return data
