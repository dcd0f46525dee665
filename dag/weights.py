"""Files <-> networks: diffusers folders, guided-diffusion checkpoints, and our own safetensors that carry what rebuilds their module.

Reading is strict: every tensor of a file is used once and every parameter is filled, or a one-line ValueError names the key. Writing
is aside and renamed, so that a file that exists is complete. Nothing is unpickled but tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dag import guided_diffusion
from dag.diffusion import PREDICTION_TYPES, Diffusion

if TYPE_CHECKING:
    from diffusers import UNet2DModel

_DIFFUSERS_WEIGHTS = tuple(f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "fp16.safetensors", "bin", "fp16.bin"))
# Names that diffusers gave the four projections of an attention before version 0.14; published DDPM weights still have them.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# What reading a damaged or foreign file as a pickle may raise.
_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError, pickle.UnpicklingError)


def load_unet(path: str | Path) -> tuple[UNet2DModel, dict]:
    """A pretrained U-Net in float32, eval mode and frozen, and what its diffusion is.

    path: a diffusers folder (a pipeline's, or one U-Net's: config.json and weights side by side), a guided-diffusion `.pt` with its flags
    as `.json` or `.yaml` of the same name beside it, or a `.safetensors` of `save_module` whose config has "architecture".
    The dict has prediction_type, num_timesteps, beta_start, beta_end, beta_schedule, learn_sigma, and sha256 of the weight file.
    Raises FileNotFoundError or ValueError, in one line that names the file, for what is missing, damaged or does not fit.
    """
    path = Path(path)
    if path.is_dir():
        unet, settings, source = _load_diffusers(path)
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder (models are read from local paths only; download a hub model first)")
    elif path.suffix in (".pt", ".pth"):
        unet, settings, source = _load_guided_diffusion(path)
    elif path.suffix == ".safetensors":
        unet, settings, source = _load_own(path)
    else:
        raise ValueError(f"{path}: a {path.suffix or 'nameless'} file, expected a diffusers folder, a guided-diffusion .pt or a .safetensors")
    learn_sigma = unet.config.out_channels == 2 * unet.config.in_channels
    return unet.eval().requires_grad_(False), {**settings, "learn_sigma": learn_sigma, "sha256": sha256(source)}


def save_unet(unet: UNet2DModel, folder: str | Path, *, prediction_type: str, diffusion: Diffusion, dtype: torch.dtype = torch.float16) -> None:
    """Write a U-Net as a diffusers pipeline folder, which `DDPMPipeline.from_pretrained(folder)` and `load_unet` read.

    A new folder appears whole; in an existing one the files are replaced one by one, the index last, and other files stay.
    Raises ValueError for an unknown prediction_type.
    """
    import diffusers

    folder = Path(folder)
    _check_prediction_type(prediction_type, folder)
    version = {"_diffusers_version": diffusers.__version__}
    learn_sigma = unet.config.out_channels == 2 * unet.config.in_channels
    scheduler = {
        "num_train_timesteps": diffusion.num_timesteps,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "beta_schedule": diffusion.schedule,
        "prediction_type": prediction_type,
        "variance_type": "learned_range" if learn_sigma else "fixed_small",
        "clip_sample": True,
    }
    index = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for name in ("unet", "scheduler"):
            (aside / name).mkdir(parents=True)
        save_file(_tensors(unet, dtype), aside / "unet" / _DIFFUSERS_WEIGHTS[0], {"format": "pt"})
        _write_json(aside / "unet" / "config.json", {"_class_name": "UNet2DModel", **version, **architecture(unet)})
        _write_json(aside / "scheduler" / "scheduler_config.json", {"_class_name": "DDPMScheduler", **version, **scheduler})
        _write_json(aside / "model_index.json", {"_class_name": "DDPMPipeline", **version, **index})
        _move_into_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def architecture(unet: UNet2DModel) -> dict:
    """The arguments that build this U-Net again, ready for JSON."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in unet.config.items() if not key.startswith("_")}


def save_module(module: nn.Module, config: dict, path: str | Path) -> None:
    """Write a module's parameters and buffers, and `config` (JSON values by name), as one safetensors file, aside and then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(_tensors(module), aside, {key: json.dumps(value) for key, value in config.items()})
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load_module_file(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """(state dict, config) of a file of `save_module`, tensors on the CPU. Raises FileNotFoundError, or ValueError for a damaged or foreign file."""
    state, metadata = _read_safetensors(Path(path))
    try:
        return state, {key: json.loads(value) for key, value in metadata.items()}
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: its metadata is not JSON ({error.msg}); expected a file written by this project, or the folder of a diffusers model"
        ) from error


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_diffusers(folder: Path) -> tuple[UNet2DModel, dict, Path]:
    if (folder / "config.json").exists():
        # A pipeline's `unet` folder given by itself: the scheduler beside it knows the prediction type.
        root = folder.parent if folder.name == "unet" and (folder.parent / "model_index.json").exists() else folder
    elif (folder / "unet" / "config.json").exists():
        root, folder = folder, folder / "unet"
    else:
        raise FileNotFoundError(f"{folder}: has neither config.json nor unet/config.json, expected a diffusers folder")
    config = _read_mapping(folder / "config.json")
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"{folder / 'config.json'}: a {config['_class_name']}, expected a UNet2DModel")
    schedulers = (root / "scheduler" / "scheduler_config.json", root / "scheduler_config.json")
    scheduler = next((file for file in schedulers if file.exists()), None)
    if scheduler is None and root != folder:
        raise FileNotFoundError(f"{schedulers[0]}: missing, expected the scheduler of the pipeline in {root}")
    settings = _scheduler_settings(_read_mapping(scheduler) if scheduler else {}, scheduler)
    source = next((folder / name for name in _DIFFUSERS_WEIGHTS if (folder / name).exists()), None)
    if source is None:
        raise FileNotFoundError(f"{folder}: no weights, expected one of {', '.join(_DIFFUSERS_WEIGHTS)}")
    state = _read_safetensors(source)[0] if source.suffix == ".safetensors" else _read_pickle(source)
    return _build(config, {_new_attention_name(key): value for key, value in state.items()}, source), settings, source


def _scheduler_settings(config: dict, file: Path | None) -> dict:
    if config.get("trained_betas") is not None:
        raise ValueError(f"{file}: has trained_betas, expected betas given by beta_schedule, beta_start and beta_end")
    if "_class_name" in config and "beta_start" not in config:
        raise ValueError(f"{file}: a {config['_class_name']} without betas, expected a discrete diffusion such as DDPMScheduler")
    settings = {
        "prediction_type": config.get("prediction_type", "epsilon"),
        "num_timesteps": config.get("num_train_timesteps", 1000),
        "beta_start": config.get("beta_start", 1e-4),
        "beta_end": config.get("beta_end", 0.02),
        "beta_schedule": config.get("beta_schedule", "linear"),
    }
    _check_prediction_type(settings["prediction_type"], file)
    return settings


def _load_guided_diffusion(path: Path) -> tuple[UNet2DModel, dict, Path]:
    flags_file = next((path.with_suffix(s) for s in (".json", ".yaml", ".yml") if path.with_suffix(s).exists()), None)
    if flags_file is None:
        raise FileNotFoundError(f"{path}: no flags beside it, expected {path.with_suffix('.json').name} or {path.with_suffix('.yaml').name}")
    flags = _read_mapping(flags_file)
    config, settings = guided_diffusion.read_flags(flags, flags_file)
    names = guided_diffusion.module_names(config)
    state = guided_diffusion.rename_state(_read_pickle(path), names, config["attention_head_dim"], bool(flags.get("use_new_attention_order")), path)
    return _build(config, state, path, lambda key: guided_diffusion.original_name(key, names)), settings, path


def _load_own(path: Path) -> tuple[UNet2DModel, dict, Path]:
    state, config = load_module_file(path)
    if "architecture" not in config:
        raise ValueError(f"{path}: its metadata has {', '.join(sorted(config)) or 'nothing'}, expected the architecture of a U-Net")
    settings = _scheduler_settings({**config, "num_train_timesteps": config.get("num_timesteps", 1000)}, path)
    return _build(config["architecture"], state, path), settings, path


def _build(config: dict, state: dict[str, Tensor], path: Path, name: Callable[[str], str] = str) -> UNet2DModel:
    """The U-Net of `config` with exactly the tensors of `state`. name: diffusers' key -> the file's key, for messages."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    if config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None:
        raise ValueError(f"{path}: a class-conditional U-Net (num_class_embeds {config.get('num_class_embeds')}), expected an unconditional one")
    # On "meta" nothing is allocated and no random weights are drawn: they would be replaced.
    try:
        with torch.device("meta"):
            unet = UNet2DModel.from_config(config)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: its architecture builds no UNet2DModel ({_line(error)})") from error
    check_state(unet, state, path, name)
    unet.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return unet


def check_state(module: nn.Module, state: dict[str, Tensor], path: str | Path, name: Callable[[str], str] = str) -> None:
    """Raise ValueError naming the first key of `state` that `module` lacks, needs or has in another shape."""
    expected = module.state_dict()
    for problem, keys in (("missing", expected.keys() - state.keys()), ("not one of this network's", state.keys() - expected.keys())):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise ValueError(f"{path}: key {name(min(keys))} is {problem}{more}; {len(state)} tensors found, {len(expected)} expected")
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise ValueError(f"{path}: {name(key)} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}")


def _check_prediction_type(prediction_type: str, where: Path | None) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"{where}: prediction_type is {prediction_type!r}, expected one of {', '.join(PREDICTION_TYPES)}")


def _new_attention_name(key: str) -> str:
    head, _, leaf = key.rpartition(".")
    stem, _, old = head.rpartition(".")
    return f"{stem}.{_OLD_ATTENTION[old]}.{leaf}" if ".attentions." in key and old in _OLD_ATTENTION else key


def _tensors(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {key: (value.to(dtype) if dtype and value.is_floating_point() else value).contiguous() for key, value in module.state_dict().items()}


def _move_into_place(aside: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(aside, folder)
        return
    for file in ("unet/config.json", f"unet/{_DIFFUSERS_WEIGHTS[0]}", "scheduler/scheduler_config.json", "model_index.json"):
        (folder / file).parent.mkdir(exist_ok=True)
        os.replace(aside / file, folder / file)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    _require(path)
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            return {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({_line(error)}); {path.stat().st_size} bytes found, copy or download it again") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    _require(path)
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            size = path.stat().st_size
            raise ValueError(f"{path}: not a whole PyTorch file of tensors ({_line(error)}); {size} bytes found, copy or download it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected a state dict: tensors by name")
    return state


def _read_mapping(path: Path) -> dict:
    """Names and values of a JSON or YAML file."""
    _require(path)
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not {path.suffix[1:].upper()} ({_line(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected names and values")
    return value


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _require(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")


def _line(error: Exception) -> str:
    """The first line of an error's message: some run to a page."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
