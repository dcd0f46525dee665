"""Tiny files in exactly the formats of what others publish, with random weights and drawn pictures.

`python tests/standins.py` writes those of config/paper-mini.yaml into assets/mini.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from diffusers import UNet2DModel

ADM_MINI = {"width": 32, "mult": (1, 1, 2), "blocks": 2, "factors": (2, 4)}
ADM_MINI_FLAGS = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 2,
    "channel_mult": "1,1,2",
    "attention_resolutions": "8,4",
    "num_head_channels": 32,
    "learn_sigma": True,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_fp16": True,
    "class_cond": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "dropout": 0.1,
}
ADM_BEDROOM = {"width": 256, "mult": (1, 1, 2, 2, 4, 4), "blocks": 2, "factors": (8, 16, 32)}


def adm_shapes(*, width: int, mult: tuple, blocks: int, factors: tuple, out: int = 6) -> dict[str, tuple[int, ...]]:
    """{key: shape} of guided-diffusion's UNetModel with scale-shift norm and resampling ResNets, from its description, not from our converter.

    factors: downsampling factors at which it attends.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    def resnet(name: str, c_in: int, c_out: int) -> None:
        layer(f"{name}.in_layers.0", c_in)
        layer(f"{name}.in_layers.2", c_out, c_in, 3, 3)
        layer(f"{name}.emb_layers.1", 2 * c_out, 4 * width)
        layer(f"{name}.out_layers.0", c_out)
        layer(f"{name}.out_layers.3", c_out, c_out, 3, 3)
        if c_in != c_out:
            layer(f"{name}.skip_connection", c_out, c_in, 1, 1)

    def attention(name: str, c: int) -> None:
        layer(f"{name}.norm", c)
        layer(f"{name}.qkv", 3 * c, c, 1)
        layer(f"{name}.proj_out", c, c, 1)

    layer("time_embed.0", 4 * width, width)
    layer("time_embed.2", 4 * width, 4 * width)
    c = int(mult[0] * width)
    layer("input_blocks.0.0", c, 3, 3, 3)
    skips, n = [c], 1
    for level, m in enumerate(mult):
        for _ in range(blocks):
            resnet(f"input_blocks.{n}.0", c, c := int(m * width))
            if 2**level in factors:
                attention(f"input_blocks.{n}.1", c)
            skips.append(c)
            n += 1
        if level + 1 < len(mult):
            resnet(f"input_blocks.{n}.0", c, c)
            skips.append(c)
            n += 1
    resnet("middle_block.0", c, c)
    attention("middle_block.1", c)
    resnet("middle_block.2", c, c)
    n = 0
    for level, m in reversed(list(enumerate(mult))):
        for block in range(blocks + 1):
            resnet(f"output_blocks.{n}.0", c + skips.pop(), c := int(m * width))
            attends = 2**level in factors
            if attends:
                attention(f"output_blocks.{n}.1", c)
            if level and block == blocks:
                resnet(f"output_blocks.{n}.{1 + attends}", c, c)
            n += 1
    layer("out.0", c)
    layer("out.2", out, c, 3, 3)
    return shapes


def adm_state(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float16, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of these shapes, each with storage of its own, small enough that a forward pass stays finite."""
    pool = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)).mul(0.02).to(dtype)
    state = {}
    for at, (key, shape) in enumerate(shapes.items()):
        count = torch.Size(shape).numel()
        state[key] = pool.roll(at).repeat(-(-count // len(pool)))[:count].reshape(shape).clone()
    return state


def write_adm(path: Path, flags: dict | None = None, **architecture) -> Path:
    """A guided-diffusion checkpoint, and its flags beside it where they are given."""
    torch.save(adm_state(adm_shapes(**architecture)), path)
    if flags is not None:
        path.with_suffix(".json").write_text(json.dumps(flags))
    return path


def write_ddpm(folder: Path, kind: str = "bin") -> UNet2DModel:
    """A tiny model in the layout of google/ddpm-church-256: files side by side, no index, a config of diffusers 0.1, old names of attention."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    config = {
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": [32, 32, 64],
        "center_input_sample": False,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 16,
        "time_embedding_type": "positional",
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    }
    torch.manual_seed(0)
    unet = UNet2DModel(**config).eval()
    state = unet.state_dict()
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        state = {key.replace(f".{new}.", f".{old}."): value for key, value in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "bin":
        torch.save(state, folder / "diffusion_pytorch_model.bin")
    else:
        from safetensors.torch import save_file

        save_file(state, folder / f"diffusion_pytorch_model.{kind}")
    scheduler = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000, "trained_betas": None}
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", "_diffusers_version": "0.1.0", **config}))
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "clip_sample": True, **scheduler}))
    return unet


class _Layers(nn.Module):
    """2048 numbers of a normalised picture: the mean of each channel, then pixels of it made small, one left out so that no mean follows from them."""

    def forward(self, x):
        small = F.adaptive_avg_pool2d(x, 27).flatten(2)[:, :, 1:]
        return torch.cat([F.adaptive_avg_pool2d(x, 1).flatten(1), small.flatten(1)[:, :2045]], 1)


class _Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = _Layers()

    def forward(self, x):
        return self.layers(x)


def write_inception(path: Path) -> Path:
    """A TorchScript file with the interface that clean-fid uses of FID's Inception: `layers`, from (b, 3, 299, 299) around 0 to 2048 features."""
    torch.jit.save(torch.jit.script(_Inception()), path)
    return path


def write_dpt(folder: Path, size: int = 32) -> Path:
    """A DPT of 40,000 parameters with random weights, its image processor beside it, as transformers saves them."""
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=size,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=8,
        use_auxiliary_head=False,
    )
    network = DPTForDepthEstimation(config)
    # As transformers draws them, weights are so small that every picture is equally deep.
    for name, weight in network.named_parameters():
        if weight.ndim > 1 and not name.startswith("dpt.embeddings.cls"):
            torch.nn.init.kaiming_normal_(weight)
    torch.nn.init.constant_(network.head.head[-2].bias, 1.0)  # before its last layer, a ReLU
    network.save_pretrained(folder)
    DPTImageProcessor(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


def drawn_pictures(n: int, shapes: Sequence[tuple[int, int]] = ((48, 64), (64, 48), (40, 40), (37, 50))) -> list[np.ndarray]:
    """Smooth coloured pictures, uint8, of these (h, w) in turn."""
    random = np.random.default_rng(0)
    coarse = [Image.fromarray(random.integers(0, 256, (5, 5, 3), np.uint8)) for _ in range(n)]
    return [np.asarray(c.resize(shapes[i % len(shapes)][::-1], Image.Resampling.BICUBIC)) for i, c in enumerate(coarse)]


def encoded(image: np.ndarray, kind: str) -> bytes:
    """A picture as the bytes of a webp or jpeg file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, quality=90)
    return stream.getvalue()


def write_lmdb(folder: Path, items: Mapping[bytes, bytes]) -> Path:
    """A database in the layout of LSUN's: data.mdb and lock.mdb in a folder, encoded pictures by key."""
    import lmdb

    folder.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(folder), map_size=1 << 26) as database, database.begin(write=True) as transaction:
        for key, value in items.items():
            transaction.put(key, value)
    return folder


def write_nyu(folder: Path) -> Path:
    """Four pictures in the layout of the official nyu_depth_v2_labeled.mat (HDF5, axes reversed), splits.mat beside it: 1 and 3 train, 2 and 4 test."""
    import h5py
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    images = np.stack(drawn_pictures(4, [(480, 640)]))
    depths = (1 + images[..., 0] / 64).astype(np.float32)
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = images.transpose(0, 3, 2, 1)
        file["depths"] = depths.transpose(0, 2, 1)
    savemat(folder / "splits.mat", {f"{split}Ndxs": np.array([[i], [i + 2]], np.uint16) for split, i in (("train", 1), ("test", 2))})
    return folder


def write_all(folder: Path) -> None:
    """Everything that config/paper-mini.yaml and config/runs/paper-mini-church.yaml name."""
    folder.mkdir(parents=True, exist_ok=True)
    write_adm(folder / "lsun_bedroom.pt", ADM_MINI_FLAGS, **ADM_MINI)
    write_ddpm(folder / "ddpm-church-256")
    for split, n in (("train", 64), ("val", 8)):
        images = drawn_pictures(n + 64)[-n:]
        write_lmdb(folder / "lsun" / f"bedroom_{split}_lmdb", {f"{i:040x}".encode(): encoded(image, "webp") for i, image in enumerate(images)})
    write_dpt(folder / "dpt", 16)
    write_nyu(folder / "nyu")
    weights = write_inception(folder / "inception-2015-12-05.pt")
    weights.with_suffix(".pt.sha256").write_text(f"{hashlib.sha256(weights.read_bytes()).hexdigest()}  {weights.name}\n")


if __name__ == "__main__":
    write_all(Path(__file__).parent.parent / "assets" / "mini")
