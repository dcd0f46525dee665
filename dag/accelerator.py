"""Where a job computes: the GPU that CUDA_VISIBLE_DEVICES leaves it, else the CPU."""

from __future__ import annotations

from typing import Any

import torch


def here() -> torch.device:
    """The device of this process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name() -> str:
    """What this process computes on, for people: the GPU's name, or "the CPU"."""
    return torch.cuda.get_device_name() if here().type == "cuda" else "the CPU"


def multiply_in_tf32() -> None:
    """From now on this process computes products of float32 matrices in TF32 on a GPU, as PyTorch computes convolutions. For processes of our own."""
    if here().type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True


def on(device: torch.device, data: Any) -> Any:
    """Tensors, or tuples, lists and dicts of them, moved to a device; what is there already, and what is no tensor, stays."""
    if isinstance(data, torch.Tensor):
        return data.to(device)
    if isinstance(data, dict):
        return {key: on(device, value) for key, value in data.items()}
    if isinstance(data, tuple | list):
        return type(data)(on(device, value) for value in data)
    return data
