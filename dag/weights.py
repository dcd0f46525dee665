"""Files <-> networks: diffusers folders, guided-diffusion checkpoints, and our own safetensors that carry what rebuilds their module.

Reading is strict: every tensor of a file is used once and every parameter is filled, or a one-line ValueError names the key. Writing
is aside and renamed, so that a file that exists is complete. Nothing is unpickled but tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dag import guided_diffusion
from dag.diffusion import PREDICTION_TYPES, SCHEDULES, Diffusion
from dag.tensor_files import TensorFile, line, open_pickle, open_safetensors, read_mapping

if TYPE_CHECKING:
    from diffusers import UNet2DModel

# The second part is diffusers' "variant"; `ema` holds averaged weights beside those of training.
_DIFFUSERS_WEIGHTS = tuple(f"diffusion_pytorch_model.{v}{end}" for end in ("safetensors", "bin") for v in ("", "ema.", "fp16."))
_PIPELINE_PARTS = ("unet", "unet_ema")  # folders of a pipeline, or of a training's checkpoint, that hold its U-Net
# Parts of a pipeline by which its U-Net is known to draw something else than pictures from noise alone.
_OTHER_PARTS = {"model conditioned on text": ("text_encoder", "text_encoder_2"), "latent model": ("vae", "vqvae", "movq")}
# Names that diffusers gave the four projections of an attention before version 0.14; published DDPM weights still have them.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")  # owner/name, or owner/name@revision
_CONFIG = "config"  # what a file of `save_module` calls it in its metadata

Rename = Callable[[str, Tensor], Mapping[str, Tensor]]


def load_unet(path: str | Path, flags: str | Path | dict | None = None) -> tuple[UNet2DModel, dict]:
    """A pretrained U-Net in float32, eval mode and frozen, and what its diffusion is.

    path: a diffusers folder (a pipeline's, or one U-Net's: config.json and weights side by side) or its hub name "owner/name", with or without
    "@revision"; a guided-diffusion `.pt` with its flags as `.json` or `.yaml` of the same name beside it; or a `.safetensors` of `save_module`
    whose config has "architecture". flags: for a `.pt`, a file of flags elsewhere, the flags themselves, or a name of `guided_diffusion.PRESETS`.
    The dict has prediction_type, num_timesteps, beta_start, beta_end, beta_schedule, learn_sigma, and sha256 of the weight file.
    Tensors are read one at a time: loading needs little more memory than the network itself.
    Raises FileNotFoundError or ValueError, in one line that names the file, for what is missing, damaged or does not fit.
    """
    name, path = str(path), Path(path)
    if not path.exists() and _HUB_NAME.fullmatch(name) and path.suffix not in (".pt", ".pth", ".safetensors"):
        path = from_hub(name)
    if flags is not None and path.suffix not in (".pt", ".pth"):
        raise ValueError(f"{path}: flags are given, expected none: they are for a guided-diffusion .pt")
    if path.is_dir():
        unet, settings, source = _load_diffusers(path)
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder, and no hub name (owner/name)")
    elif path.suffix in (".pt", ".pth"):
        unet, settings, source = _load_guided_diffusion(path, flags)
    elif path.suffix == ".safetensors":
        unet, settings, source = _load_own(path)
    else:
        raise ValueError(f"{path}: a {path.suffix or 'nameless'} file, expected a diffusers folder, a guided-diffusion .pt or a .safetensors")
    learn_sigma = unet.config.out_channels == 2 * unet.config.in_channels
    return unet.eval().requires_grad_(False), {**settings, "learn_sigma": learn_sigma, "sha256": sha256(source)}


def from_hub(name: str) -> Path:
    """The folder of a hub model "owner/name" or "owner/name@revision", downloaded into the hub's own cache unless it is there.

    Of its weights only the safetensors, or the .bin where there are none. Raises FileNotFoundError, which says what to do, where the hub
    cannot be reached or has no such model.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    try:
        if not _HUB_NAME.fullmatch(name):
            raise ValueError("a hub name is owner/name")
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.rglob("*.safetensors")):
            folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=["*.json", "*.bin"]))
    except Exception as error:  # its client raises many kinds, of several packages
        raise FileNotFoundError(
            f"{name}: no such file or folder, and the hub does not give a model of this name ({line(error)}); "
            "download its files where there is a network and give the path of their folder"
        ) from None
    return folder


def save_unet(
    unet: UNet2DModel, folder: str | Path, *, prediction_type: str, diffusion: Diffusion, dtype: torch.dtype = torch.float16, flat: bool = False
) -> None:
    """Write a U-Net as a diffusers pipeline folder, which `DDPMPipeline.from_pretrained(folder)` and `load_unet` read.

    flat: all files side by side, like the published `google/ddpm-*`, so that `UNet2DModel.from_pretrained(folder)` reads it too.
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
        network, noise = (aside, aside) if flat else (aside / "unet", aside / "scheduler")
        for part in (network, noise):
            part.mkdir(parents=True, exist_ok=True)
        _save_tensors(_tensors(unet, dtype), network / _DIFFUSERS_WEIGHTS[0], {"format": "pt"})
        _write_json(network / "config.json", {"_class_name": "UNet2DModel", **version, **architecture(unet)})
        _write_json(noise / "scheduler_config.json", {"_class_name": "DDPMScheduler", **version, **scheduler})
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
        # As one text: safetensors writes several in another order each time, and a training that is repeated would give another file.
        _save_tensors(_tensors(module), aside, {_CONFIG: json.dumps(config)})
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written ({' '.join(str(error).split())})") from None


def load_module_file(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """(state dict, config) of a file of `save_module`, tensors on the CPU. Raises FileNotFoundError, or ValueError for a damaged or foreign file."""
    file = open_safetensors(Path(path))
    return file.all(), _config(file, path)


def _config(file: TensorFile, path: str | Path) -> dict:
    if _CONFIG not in file.metadata:
        raise ValueError(f"{path}: its metadata has no {_CONFIG!r}; expected a file written by this version, or the folder of a diffusers model")
    try:
        return dict(json.loads(file.metadata[_CONFIG]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {_CONFIG!r} of its metadata is no JSON object ({error}); expected a file written by this project") from error


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_pixel_space(index: Mapping, name: str | Path) -> None:
    """Raises ValueError where a pipeline is that of a latent model or of one conditioned on text: its U-Net alone does not say so.

    index: what the pipeline's model_index.json holds. name: the file, or the model on the hub.
    """
    for kind, parts in _OTHER_PARTS.items():
        if found := [part for part in parts if isinstance(index.get(part), list) and index[part][0] is not None]:
            raise ValueError(f"{name}: a {kind} (it has {found[0]}), expected an unconditional model of pixels, such as a DDPMPipeline's or a DDIMPipeline's")


def _load_diffusers(folder: Path) -> tuple[UNet2DModel, dict, Path]:
    # A pipeline's `unet` folder given by itself: the scheduler beside it knows the prediction type.
    root = folder.parent if folder.name in _PIPELINE_PARTS and (folder.parent / "model_index.json").exists() else folder
    if (index := root / "model_index.json").is_file():
        check_pixel_space(read_mapping(index), index)
    if not (folder / "config.json").exists():
        if not (folder / "unet" / "config.json").exists():
            raise FileNotFoundError(f"{folder}: has neither config.json nor unet/config.json, expected a diffusers folder")
        folder = folder / "unet"
    config = read_mapping(folder / "config.json")
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"{folder / 'config.json'}: a {config['_class_name']}, expected a UNet2DModel")
    schedulers = (root / "scheduler" / "scheduler_config.json", root / "scheduler_config.json")
    scheduler = next((file for file in schedulers if file.exists()), None)
    if scheduler is None and root != folder:
        raise FileNotFoundError(f"{schedulers[0]}: missing, expected the scheduler of the pipeline in {root}")
    settings = _scheduler_settings(read_mapping(scheduler) if scheduler else {}, scheduler)
    source = next((folder / name for name in _DIFFUSERS_WEIGHTS if (folder / name).exists()), None)
    if source is None:
        raise FileNotFoundError(f"{folder}: no weights, expected one of {', '.join(_DIFFUSERS_WEIGHTS)}")
    file = open_safetensors(source) if source.suffix == ".safetensors" else open_pickle(source)
    return _build(config, file, source, lambda key, value: {_new_attention_name(key): value}), settings, source


def _scheduler_settings(config: dict, file: Path | None) -> dict:
    if config.get("trained_betas") is not None:
        raise ValueError(f"{file}: has trained_betas, expected betas given by beta_schedule, beta_start and beta_end")
    if config.get("rescale_betas_zero_snr"):
        raise ValueError(f"{file}: has rescale_betas_zero_snr, expected betas as beta_schedule gives them")
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
    if settings["beta_schedule"] not in SCHEDULES:
        raise ValueError(f"{file}: beta_schedule is {settings['beta_schedule']!r}, expected one of {', '.join(SCHEDULES)}")
    return settings


def _load_guided_diffusion(path: Path, given: str | Path | dict | None) -> tuple[UNet2DModel, dict, Path]:
    flags, where = _flags(path, given)
    config, settings = guided_diffusion.read_flags(flags, where)
    names, file = guided_diffusion.module_names(config), open_pickle(path)
    head_dim, new_order = config["attention_head_dim"], bool(flags.get("use_new_attention_order"))

    def rename(key: str, value: Tensor) -> dict[str, Tensor]:
        return guided_diffusion.rename(key, value, names, head_dim, new_order, path)

    try:
        return _build(config, file, path, rename, lambda key: guided_diffusion.original_name(key, names)), settings, path
    except ValueError as error:
        if wrong := guided_diffusion.contradictions(flags, config, file.specs):
            raise ValueError(f"{error}; of {where}, {' and '.join(wrong)}") from None
        raise


def _flags(path: Path, given: str | Path | dict | None) -> tuple[dict, Path]:
    """The flags of a checkpoint, and where they are from."""
    if isinstance(given, dict):
        return given, path
    if given in guided_diffusion.PRESETS:
        return guided_diffusion.PRESETS[given], Path(given)
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"{given}: no such file of flags, and no preset ({', '.join(guided_diffusion.PRESETS)})")
        return read_mapping(Path(given)), Path(given)
    beside = [path.with_suffix(suffix) for suffix in (".json", ".yaml", ".yml")]
    file = next((f for f in beside if f.exists()), None)
    if file is None:
        presets = ", ".join(guided_diffusion.PRESETS)
        raise FileNotFoundError(f"{path}: no flags beside it, expected {beside[0].name} or {beside[1].name}, or flags given as a file or preset ({presets})")
    return read_mapping(file), file


def _load_own(path: Path) -> tuple[UNet2DModel, dict, Path]:
    file = open_safetensors(path)
    config = _config(file, path)
    if "architecture" not in config:
        raise ValueError(f"{path}: its metadata has {', '.join(sorted(config)) or 'nothing'}, expected the architecture of a U-Net")
    settings = _scheduler_settings({**config, "num_train_timesteps": config.get("num_timesteps", 1000)}, path)
    return _build(config["architecture"], file, path), settings, path


def _build(config: dict, file: TensorFile, path: Path, rename: Rename = lambda key, value: {key: value}, name: Callable[[str], str] = str) -> UNet2DModel:
    """The U-Net of `config` with exactly the tensors of `file`. rename: the file's key and tensor -> diffusers'; name: the way back, for messages."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    if config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None:
        raise ValueError(f"{path}: a class-conditional U-Net (num_class_embeds {config.get('num_class_embeds')}), expected an unconditional one")
    # On "meta" nothing is allocated and no random weights are drawn: they would be replaced.
    try:
        with torch.device("meta"):
            unet = UNet2DModel.from_config(config)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: its architecture builds no UNet2DModel ({line(error)})") from error
    check_state(unet, {new: part for key, spec in file.specs.items() for new, part in rename(key, spec).items()}, path, name)
    state = {new: part.float() for key in file.specs for new, part in rename(key, file.read(key)).items()}
    unet.load_state_dict(state, assign=True)
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
    return {key: (value.to(dtype) if dtype and value.is_floating_point() else value).contiguous().cpu() for key, value in module.state_dict().items()}


def _move_into_place(aside: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(aside, folder)
        return
    for file in sorted((f for f in aside.rglob("*") if f.is_file()), key=lambda f: f.name == "model_index.json"):
        place = folder / file.relative_to(aside)
        place.parent.mkdir(exist_ok=True)
        os.replace(file, place)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
