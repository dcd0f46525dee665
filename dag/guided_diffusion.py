"""guided-diffusion's U-Net (ADM, Dhariwal & Nichol 2021) said in diffusers' words: flags -> architecture, state dict -> state dict.

The two programs compute the same function, so this is renaming only, except that one stores queries, keys and values as one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

_CHANNEL_MULT = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
_NEEDED = ("image_size", "num_res_blocks", "attention_resolutions", "use_scale_shift_norm", "resblock_updown")
# Flags whose only value that UNet2DModel can express, or that this study can sample, is the given one.
_FIXED = {"class_cond": False, "num_classes": None, "rescale_timesteps": False, "noise_schedule": "linear", "conv_resample": True, "dims": 2}
_READ = ("model_channels", "num_channels", "in_channels", "out_channels", "learn_sigma", "channel_mult", "dropout", "num_heads", "num_head_channels")
_ALSO_READ = ("use_new_attention_order", "diffusion_steps", "predict_xstart")
# Flags of training, precision and sampling: they change nothing in what the network computes.
_WITHOUT_EFFECT = ("num_heads_upsample", "use_checkpoint", "use_fp16", "sigma_small", "use_kl", "rescale_learned_sigmas", "timestep_respacing")

# Flags of published checkpoints, as the README of guided-diffusion gives them.
PRESETS = {
    "adm-lsun-bedroom-256": {
        "attention_resolutions": "32,16,8",
        "class_cond": False,
        "diffusion_steps": 1000,
        "dropout": 0.1,
        "image_size": 256,
        "learn_sigma": True,
        "noise_schedule": "linear",
        "num_channels": 256,
        "num_head_channels": 64,
        "num_res_blocks": 2,
        "resblock_updown": True,
        "use_fp16": True,
        "use_scale_shift_norm": True,
    }
}

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "qkv": "qkv", "proj_out": "to_out.0"}
_OUTSIDE_BLOCKS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def read_flags(flags: dict, file: Path) -> tuple[dict, dict]:
    """guided-diffusion's flags -> (arguments of UNet2DModel, settings of its diffusion).

    Flags are those of its command line (num_channels, attention_resolutions as text "32,16,8": image sides) or arguments of its UNetModel
    (model_channels, attention_resolutions as a list [8, 16, 32]: downsampling factors). Raises ValueError naming a flag that is missing, unknown
    or asks for what UNet2DModel cannot do.
    """
    _check_flags(flags, file)
    size, width = flags["image_size"], flags.get("num_channels", flags.get("model_channels"))
    mult = _numbers(flags.get("channel_mult") or _CHANNEL_MULT.get(size, ()), file, "channel_mult")
    factors = _numbers(flags["attention_resolutions"], file, "attention_resolutions")
    if isinstance(flags["attention_resolutions"], str):
        factors = [size // side for side in factors]
    attends = [2**level in factors for level in range(len(mult))]
    resample = "resnet" if flags["resblock_updown"] else "conv"
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resample == "resnet" else ("DownBlock2D", "UpBlock2D")
    channels = flags.get("in_channels", 3)
    architecture = {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": flags.get("out_channels", 2 * channels if flags.get("learn_sigma") else channels),
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": ["AttnDownBlock2D" if a else plain[0] for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else plain[1] for a in reversed(attends)],
        "block_out_channels": [int(width * m) for m in mult],
        "layers_per_block": flags["num_res_blocks"],
        "downsample_type": resample,
        "upsample_type": resample,
        "dropout": flags.get("dropout", 0.0),
        "attention_head_dim": _head_dim(flags, file),
        "norm_num_groups": 32,
        # Without this the attention of the middle block loses its norm as soon as ResNets scale and shift.
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if flags["use_scale_shift_norm"] else "default",
    }
    steps = flags.get("diffusion_steps", 1000)
    settings = {
        "prediction_type": "sample" if flags.get("predict_xstart") else "epsilon",
        "num_timesteps": steps,
        "beta_start": 1e-4 * 1000 / steps,
        "beta_end": 0.02 * 1000 / steps,
        "beta_schedule": "linear",
    }
    return architecture, settings


def module_names(architecture: dict) -> dict[str, str]:
    """{module in guided-diffusion: the same module in UNet2DModel} of everything that holds weights; "qkv" stands for to_q, to_k and to_v."""
    names, layers = dict(_OUTSIDE_BLOCKS), architecture["layers_per_block"]
    for old, new, inside in (("0", "resnets.0", _RESNET), ("1", "attentions.0", _ATTENTION), ("2", "resnets.1", _RESNET)):
        _add(names, f"middle_block.{old}", f"mid_block.{new}", inside)
    sides = (
        ("input_blocks", "down_blocks", architecture["down_block_types"], layers, "downsamplers", {"op": "conv"}),
        ("output_blocks", "up_blocks", architecture["up_block_types"], layers + 1, "upsamplers", {"conv": "conv"}),
    )
    for old, new, kinds, count, resampler, convolution in sides:
        inside = _RESNET if architecture["downsample_type"] == "resnet" else convolution
        # The encoder's block 0 is conv_in, and its downsamplers are blocks of their own; the decoder's upsamplers are not.
        block = 1 if old == "input_blocks" else 0
        for level, kind in enumerate(kinds):
            attends = kind.startswith("Attn")
            for layer in range(count):
                _add(names, f"{old}.{block}.0", f"{new}.{level}.resnets.{layer}", _RESNET)
                if attends:
                    _add(names, f"{old}.{block}.1", f"{new}.{level}.attentions.{layer}", _ATTENTION)
                block += 1
            if level + 1 < len(kinds):
                place = f"{block}.0" if old == "input_blocks" else f"{block - 1}.{1 + attends}"
                _add(names, f"{old}.{place}", f"{new}.{level}.{resampler}.0", inside)
                block += old == "input_blocks"
    return names


def rename(key: str, value: Tensor, names: dict[str, str], head_dim: int | None, new_order: bool, file: Path) -> dict[str, Tensor]:
    """One tensor of guided-diffusion's state dict under diffusers' names. Raises ValueError for a key that has no place in this architecture."""
    module, _, leaf = key.rpartition(".")
    if module not in names:
        raise ValueError(f"{file}: key {key} is not one of the network that its flags describe")
    new = names[module]
    if new.endswith(".qkv"):
        thirds = _split_qkv(value, head_dim, new_order, f"{file}: {key}")
        return {f"{new.removesuffix('qkv')}to_{part}.{leaf}": third for part, third in zip("qkv", thirds, strict=True)}
    # Attention projects with convolutions of width 1, diffusers with matrices.
    return {f"{new}.{leaf}": value.flatten(1) if new.endswith("to_out.0") and leaf == "weight" else value}


def original_name(key: str, names: dict[str, str]) -> str:
    """The key of guided-diffusion for one of diffusers, for messages."""
    module, _, leaf = key.rpartition(".")
    head, _, last = module.rpartition(".")
    module = f"{head}.qkv" if last in ("to_q", "to_k", "to_v") else module
    return next((f"{old}.{leaf}" for old, new in names.items() if new == module), key)


def contradictions(flags: dict, architecture: dict, specs: Mapping[str, Tensor]) -> list[str]:
    """Each flag that the shapes of a checkpoint's tensors speak against, and what they imply: ["num_res_blocks is 2, the shapes imply 3"].

    architecture: what `read_flags` made of the flags. specs: the checkpoint's tensors by guided-diffusion's names; only shapes are looked at.
    """
    width = flags.get("num_channels", flags.get("model_channels"))
    kinds = architecture["down_block_types"]
    said = {
        "class_cond": False,
        "in_channels": architecture["in_channels"],
        "num_channels" if "num_channels" in flags else "model_channels": width,
        "channel_mult": [channels / width for channels in architecture["block_out_channels"]],
        "num_res_blocks": architecture["layers_per_block"],
        "attention_resolutions": [2**level for level, kind in enumerate(kinds) if kind.startswith("Attn")],
        "use_scale_shift_norm": architecture["resnet_time_scale_shift"] == "scale_shift",
        "resblock_updown": architecture["downsample_type"] == "resnet",
        "learn_sigma": architecture["out_channels"] == 2 * architecture["in_channels"],
    }
    implied = _implied({key: tuple(value.shape) for key, value in specs.items()})
    implied["num_channels" if "num_channels" in flags else "model_channels"] = implied.pop("width", None)
    wrong = [key for key in said if implied.get(key) is not None and said[key] != implied[key]]
    if isinstance(flags["attention_resolutions"], str):  # image sides, coarsest last
        for values in (said, implied):
            values["attention_resolutions"] = ",".join(str(flags["image_size"] // factor) for factor in values.get("attention_resolutions") or [])
    return [f"{key} is {_plain(said[key])}, the shapes imply {_plain(implied[key])}" for key in wrong]


def _implied(shapes: dict[str, tuple[int, ...]]) -> dict:
    """Flags that can be told from shapes alone; what a damaged state dict does not tell is left out."""
    parts = {".".join(key.split(".")[:4]) for key in shapes}
    first, last, time = (shapes.get(key) for key in ("input_blocks.0.0.weight", "out.2.weight", "time_embed.0.weight"))
    emb, out = (shapes.get(f"output_blocks.0.0.{key}.weight") for key in ("emb_layers.1", "out_layers.3"))
    found = {"class_cond": any(key.startswith("label_emb.") for key in shapes)}
    if time:
        found["width"] = time[1]
    if first:
        found["in_channels"] = first[1]
    if first and last:
        found["learn_sigma"] = last[0] == 2 * first[1]
    if emb and out:
        found["use_scale_shift_norm"] = emb[0] == 2 * out[0]
    decoder = sorted({int(key.split(".")[1]) for key in shapes if key.startswith("output_blocks.")})
    # A level ends with the block that has an upsampler after its ResNet and attention.
    ends = [k for k in decoder for place in (1, 2) if {f"output_blocks.{k}.{place}.in_layers", f"output_blocks.{k}.{place}.conv"} & parts]
    if not ends or len(decoder) != (ends[0] + 1) * (len(ends) + 1):
        return found
    found["resblock_updown"] = f"output_blocks.{ends[0]}.1.conv" not in parts and f"output_blocks.{ends[0]}.2.conv" not in parts
    found["num_res_blocks"] = ends[0]
    levels = [k for k in decoder if k % (ends[0] + 1) == 0][::-1]  # the first block of each, finest level first
    found["attention_resolutions"] = [2**level for level, k in enumerate(levels) if f"output_blocks.{k}.1.qkv" in parts]
    widths = [shapes.get(f"output_blocks.{k}.0.out_layers.3.weight") for k in levels]
    if time and all(widths):
        found["channel_mult"] = [shape[0] / time[1] for shape in widths]
    return found


def _plain(value):
    """Whole numbers of a list without their decimal point."""
    return [int(v) if v == int(v) else v for v in value] if isinstance(value, list) else value


def _split_qkv(qkv: Tensor, head_dim: int | None, new_order: bool, what: str) -> list[Tensor]:
    """Rows are stored (heads, 3, head_dim), or (3, heads, head_dim) in the new order."""
    rows = len(qkv) // 3
    head_dim = head_dim or rows
    if len(qkv) % 3 or rows % head_dim:
        raise ValueError(f"{what} has {len(qkv)} rows, expected a multiple of 3 x {head_dim} (num_head_channels)")
    shape = (3, rows // head_dim, head_dim, -1) if new_order else (rows // head_dim, 3, head_dim, -1)
    parts = qkv.reshape(shape).unbind(0 if new_order else 1)
    return [part.reshape(rows, -1).clone() if qkv.ndim > 1 else part.reshape(rows).clone() for part in parts]


def _add(names: dict[str, str], old: str, new: str, inside: dict[str, str]) -> None:
    names.update({f"{old}.{a}": f"{new}.{b}" for a, b in inside.items()})


def _head_dim(flags: dict, file: Path) -> int | None:
    """None: one head as wide as its level."""
    width, heads = flags.get("num_head_channels", -1), flags.get("num_heads", 4)
    if width == -1 and heads != 1:
        raise ValueError(f"{file}: num_heads is {heads} without num_head_channels, expected num_head_channels (heads of one width) or num_heads 1")
    return None if width == -1 else width


def _check_flags(flags: dict, file: Path) -> None:
    for key in flags:
        if key not in (*_NEEDED, *_FIXED, *_READ, *_ALSO_READ, *_WITHOUT_EFFECT):
            raise ValueError(f"{file}: unknown flag {key}, expected flags of guided-diffusion's model and diffusion")
    for key in _NEEDED:
        if key not in flags:
            raise ValueError(f"{file}: flag {key} is missing")
    if "num_channels" not in flags and "model_channels" not in flags:
        raise ValueError(f"{file}: flag num_channels is missing")
    for key, only in _FIXED.items():
        if flags.get(key, only) != only:
            raise ValueError(f"{file}: {key} is {flags[key]!r}, expected {only!r}")
    for key in ("use_scale_shift_norm", "resblock_updown", "learn_sigma", "use_new_attention_order", "predict_xstart"):
        if not isinstance(flags.get(key, False), bool):
            raise ValueError(f"{file}: {key} is {flags[key]!r}, expected true or false")


def _numbers(value: str | list, file: Path, key: str) -> list[float]:
    try:
        numbers = [float(v) for v in (value.split(",") if isinstance(value, str) else value)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {key} is {value!r}, expected numbers") from error
    if not numbers:
        raise ValueError(f"{file}: {key} is empty, expected numbers (it has a default for image_size 64, 128, 256 and 512 only)")
    return numbers
