"""Files of named tensors, safetensors and PyTorch's own, read one tensor at a time: a network never needs room for its file as well.

Nothing is unpickled but tensors, and what is missing, torn or foreign is one line that names the file.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

# What reading a damaged or foreign file as a pickle may raise.
_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError, pickle.UnpicklingError)


@dataclass(frozen=True)
class TensorFile:
    """An open file. specs: {name: a tensor of its shape on the "meta" device}; read(name): that tensor on the CPU, in the file's own type;
    metadata: texts by name, of a safetensors file."""

    specs: dict[str, Tensor]
    read: Callable[[str], Tensor]
    metadata: dict[str, str]

    def all(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {name: self.read(name) for name in self.specs}


def open_safetensors(path: Path) -> TensorFile:
    """Raises FileNotFoundError, or ValueError for what is no whole safetensors file."""
    require(path)
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 not a dict
        specs = {name: torch.empty(part.get_shape(), device="meta") for name, part in slices.items()}
        return TensorFile(specs, file.get_tensor, dict(file.metadata() or {}))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({line(error)}); {path.stat().st_size} bytes found, copy or download it again") from error


def open_pickle(path: Path) -> TensorFile:
    """A state dict written by torch.save. Raises FileNotFoundError, or ValueError for what is none or not whole."""
    require(path)
    specs = _load(path, "meta")
    # Files older than PyTorch 1.6 are one pickle, which says nowhere where a tensor begins: they are read whole.
    if any(spec.untyped_storage()._checkpoint_offset is None for spec in specs.values()):
        state = _load(path, "cpu")
        return TensorFile({name: value.to("meta") for name, value in state.items()}, state.__getitem__, {})
    return TensorFile(specs, lambda name: _read_at(path, name, specs[name]), {})


def read_mapping(path: Path) -> dict:
    """Names and values of a JSON or YAML file."""
    require(path)
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not {path.suffix[1:].upper()} ({line(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected names and values")
    return value


def require(path: Path) -> None:
    """Raise FileNotFoundError unless this is a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")


def line(error: Exception) -> str:
    """The first sentence of an error's message: some run to a page."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")


def _load(path: Path, device: str) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location=device, weights_only=True)
        except _UNREADABLE as error:
            if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
                raise ValueError(f"{path}: holds more than tensors, which could run code and is not read; expected a state dict: tensors by name") from None
            size = path.stat().st_size
            raise ValueError(f"{path}: not a whole PyTorch file of tensors ({line(error)}); {size} bytes found, copy or download it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected a state dict: tensors by name")
    return state


def _read_at(path: Path, name: str, spec: Tensor) -> Tensor:
    """The tensor's own stretch of the file: mapping the file into memory would count all that was read as this process's."""
    if not spec.numel():
        return torch.empty_like(spec, device="cpu")
    size, start = spec.element_size(), spec.untyped_storage()._checkpoint_offset
    span = size * (1 + sum((n - 1) * step for n, step in zip(spec.shape, spec.stride(), strict=True)))
    raw = np.fromfile(path, np.uint8, span, offset=start + spec.storage_offset() * size)
    if len(raw) < span:
        raise ValueError(f"{path}: ends inside {name}; {path.stat().st_size} bytes found, copy or download it again")
    return torch.from_numpy(raw).view(spec.dtype).as_strided(spec.shape, spec.stride())
