"""What a config may not say of its networks, and whether their files are whole: found before anything runs. Knows no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

# UNet2DModel's own, where a config does not say it.
_GROUPS = 32
_DESCRIBED = ("architecture", "prediction_type", "training")  # what a config says of a U-Net that the study trains
_TRAINED = ("unet", "heads", "prior", "judge", "second_judge", "downstream")
_STAGES = (16, 24, 40, 80, 112, 192, 320, 1280)
_DINOV2 = "facebook/dinov2-base"
_WIDTHS = {"facebook/dinov2-small": 384, _DINOV2: 768, "facebook/dinov2-large": 1024, "facebook/dinov2-giant": 1536}
# What a variant may change: what heads and priors are made of, but not which of them there are. Of the last three also their own keys.
_VARIED = ("heads.strong", "heads.weak", "heads.width", "heads.layers", "heads.time_width", "prior.prediction_type", "depth.coding", "depth.near", "depth.far")
_VARIED_SECTIONS = ("heads.training", "prior.training", "prior.architecture")


def faults(config: Mapping, pretrained: Mapping | None) -> Iterator[str]:
    """Each fault as "key is ..., expected ...". pretrained: the architecture that the folder unet.path tells, or None."""
    yield from _extractor(config["evaluation"])
    for name, changes in config.get("variants", {}).items():
        for key in changes:
            if key not in (*_VARIED, *_VARIED_SECTIONS) and key.rpartition(".")[0] not in _VARIED_SECTIONS:
                allowed = ", ".join([*_VARIED, *_VARIED_SECTIONS])
                yield f"variants.{name} changes {key}, expected what heads and priors are trained by: {allowed} or a key of the last three"
    downstream = {"downstream": config["downstream"]}
    if config["downstream"].get("whole") and "estimator" in config:
        yield "downstream.whole is true where an estimator gives the pictures' depth, expected a dataset that has its own"
    if whole := config["downstream"].get("reference_whole"):
        downstream["downstream.reference_whole"] = whole
        if not config["downstream"].get("whole"):
            yield "downstream.reference_whole is set without downstream.whole: true, expected both: it is tested on whole pictures"
    for name, section in {**{name: config.get(name, {}) for name in _TRAINED}, **downstream}.items():
        if "training" in section:
            yield from _training(name, section["training"])
    for name, section in downstream.items():
        if "seed" in section["training"]:
            yield f"{name}.training.seed is set, expected no such key: the trainings of a source have the seeds 0 to downstream.seeds - 1"
    for name in _TRAINED:
        if "architecture" in config.get(name, {}):
            yield from _architecture(name, config[name]["architecture"])
    unet = config["unet"]
    least = unet.get("training", {}).get("batch_size", 0)
    for count in config.get("gain", {}).get("images", []):
        if count < least:
            yield f"gain.images has {count}, expected at least unet.training.batch_size {least}"
    if unet["path"] is None:
        yield from (f"unet.{key} is missing; with unet.path null the study trains its own U-Net" for key in _DESCRIBED if key not in unet)
    elif pretrained is not None:
        yield from _unsupported(unet["path"], pretrained)
        yield from _other(unet, pretrained)
    elif "architecture" not in unet and Path(unet["path"]).exists():
        yield f"unet.architecture is missing; unet.path {unet['path']} is no diffusers folder that tells it"


def misfits(config: Mapping, unet: Mapping) -> Iterator[str]:
    """Pictures that a network cannot halve as often as it does, or that are not those of the pretrained U-Net. unet: its architecture."""
    size = config["domain"]["size"]
    if unet.get("sample_size", size) != size:
        yield f"domain.size is {size}, expected {unet['sample_size']}, the image size of unet.path {config['unet']['path']}"
    networks = [("unet", unet, size)]
    for name in ("judge", "second_judge", "downstream"):
        if architecture := config.get(name, {}).get("architecture"):
            networks.append((name, architecture, size))
    if whole := config["downstream"].get("reference_whole"):
        networks += [("downstream.reference_whole", whole["architecture"], side) for side in whole["shape"]]
    networks += [("prior", config["prior"]["architecture"], side) for side in config["prior"]["resolutions"]]
    for name, architecture, side in networks:
        if "imagenet" in architecture:
            enlarge = architecture.get("enlarge", 2)
            stride, why = 32 // enlarge, f"ImageNet's encoder halves five times what is enlarged by {enlarge}"
        else:
            stride, why = 2 ** (len(architecture["block_out_channels"]) - 1), f"it has {architecture['block_out_channels']}"
        if side % stride:
            yield f"{name} works at {side} pixels, expected a multiple of {stride}: {why}"


def _extractor(section: Mapping) -> Iterator[str]:
    """What `dag.metrics.extractors.load_extractor` would refuse after everything is drawn."""
    name, dims, side, weights = section["extractor"], section["dims"], section["resolution"], section.get("weights")
    if name == "efficientnet_lite0" and dims not in _STAGES:
        yield f"evaluation.dims is {dims}, expected one of {', '.join(map(str, _STAGES))}, the stages of efficientnet_lite0"
    multiple = {"efficientnet_lite0": 32, "dinov2": 14}.get(name, 1)
    if side % multiple:
        yield f"evaluation.resolution is {side}, expected a multiple of {multiple} for {name}"
    if name == "inception" and (dims, side) != (2048, 299):
        yield f"evaluation has {dims} dims at resolution {side}, expected 2048 at 299 for inception"
    if name == "pixels" and dims != 3 * side**2:
        yield f"evaluation.dims is {dims}, expected {3 * side**2} for pixels at resolution {side}: three colours each"
    if name == "dinov2" and dims != (width := _dinov2_width(weights, dims)):
        yield f"evaluation.dims is {dims}, expected {width}, the hidden size of dinov2 {weights or _DINOV2}"
    if weights is not None and name not in ("inception", "dinov2"):
        yield f"evaluation.weights is {weights}, expected no such key for {name}"
    if "sha256" in section and name != "inception":
        yield f"evaluation.sha256 is set, expected no such key for {name}"


def _dinov2_width(weights: str | None, unknown: int) -> int:
    """Hidden size of a folder that is here, or of a published one; `unknown` of others."""
    file = Path(weights or _DINOV2) / "config.json"
    try:
        return json.loads(file.read_text())["hidden_size"] if file.is_file() else _WIDTHS.get(weights or _DINOV2, unknown)
    except (ValueError, LookupError):
        return unknown  # whoever loads it says what is wrong with the file


def _training(name: str, training: Mapping) -> Iterator[str]:
    size, parts = training["batch_size"], 1
    for key in ("processes", "gradient_accumulation_steps"):
        count = training.get(key, 1)
        if name not in ("unet", "prior") and count != 1:
            yield f"{name}.training.{key} is {count}, expected 1: only the trainings of U-Net and priors divide their batches"
            return
        parts *= count
        if size % parts:
            whole = f"batch_size {size}" if parts == count else f"batch_size {size} / processes {parts // count}"
            yield f"{name}.training.{key} is {count}, expected a divisor of {name}.training.{whole}"
            return


def _architecture(name: str, architecture: Mapping) -> Iterator[str]:
    if "imagenet" in architecture:
        return  # its encoder has one shape, whatever the width of its decoder
    channels = architecture["block_out_channels"]
    for key in ("down_block_types", "up_block_types"):
        if len(architecture[key]) != len(channels):
            yield f"{name}.architecture.{key} has {len(architecture[key])} levels, expected {len(channels)}, as block_out_channels {channels}"
    groups = architecture.get("norm_num_groups", _GROUPS)
    if wrong := [count for count in channels if count % groups]:
        yield f"{name}.architecture.norm_num_groups is {groups}, expected a divisor of every one of block_out_channels; {wrong[0]} is no multiple of it"


def _unsupported(path: str, pretrained: Mapping) -> Iterator[str]:
    """What kind of U-Net no study can use, whatever else the config says."""
    wanted = "expected an unconditional UNet2DModel of RGB pictures"
    if (kind := pretrained.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        yield f"unet.path {path} holds a {kind}, {wanted}"
    for key in ("num_class_embeds", "class_embed_type"):
        if pretrained.get(key) is not None:
            yield f"unet.path {path} is conditioned on classes ({key} is {pretrained[key]}), {wanted}"
    if pretrained.get("in_channels", 3) != 3:
        yield f"unet.path {path} has in_channels {pretrained['in_channels']}, {wanted}: neither latents nor greys"


def _other(unet: Mapping, pretrained: Mapping) -> Iterator[str]:
    """What the config says of a U-Net that is there must be so: `pretrain` would train another one under its name."""
    advice = f"leave the key out, or set unet.path to null to train such a U-Net; unet.path is {unet['path']}"
    for key, value in unet.get("architecture", {}).items():
        if key in pretrained and pretrained[key] != value:
            yield f"unet.architecture.{key} is {value}, expected {pretrained[key]}, as the pretrained U-Net has it: {advice}"
    kind = _prediction_type(Path(unet["path"]))
    if kind is not None and unet.get("prediction_type", kind) != kind:
        yield f"unet.prediction_type is {unet['prediction_type']}, expected {kind}, as the pretrained U-Net has it: {advice}"


def _prediction_type(folder: Path) -> str | None:
    for file in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if file.is_file():
            try:
                return json.loads(file.read_text()).get("prediction_type", "epsilon")
            except (ValueError, AttributeError):
                return None  # whoever loads the U-Net says what is wrong with the file
    return None


def safetensors_size(file: Path) -> int | None:
    """Length of a whole file by its own header; None where there is no header."""
    with open(file, "rb") as stream:
        try:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, 1 << 27)))
            return 8 + length + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, LookupError, TypeError, AttributeError):
            return None
