"""Depth estimators: networks that map an image to depth. The judge of dFID, the labels of photographs, the downstream network of Table 4."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dag.data.depth import DepthCoding
from dag.data.images import to_tensor, to_uint8
from dag.data.squares import Box, Size, scaled
from dag.metrics.extractors import imagenet_efficientnet
from dag.weights import from_hub, sha256

OUTPUTS = ("inverse", "metres")
# DPT builds weights here that its forward pass never uses; published files leave them out.
_UNUSED = "fusion_stage.layers.0.residual_layer1."


class DepthUNet(nn.Module):
    """A convolutional U-Net from an image in [-1, 1] (b, 3, s, s) to coded depth (b, 1, s, s).

    It is diffusers' UNet2DModel with its time fixed at zero. architecture: that model's keyword arguments.
    """

    def __init__(self, architecture: dict):
        super().__init__()
        from diffusers.models.unets.unet_2d import UNet2DModel

        self.unet = UNet2DModel(**{"in_channels": 3, "out_channels": 1, **architecture})

    def forward(self, image: Tensor) -> Tensor:
        return self.unet(image, torch.zeros(len(image), device=image.device)).sample


class ImageNetDepth(nn.Module):
    """A depth network on EfficientNet-Lite0's ImageNet features, from an image in [-1, 1] (b, 3, h, w) to coded depth (b, 1, h, w).

    The encoder's first convolution halves the image, so a small one is enlarged first; each level of the decoder joins the encoder's features
    of its resolution. width: channels of the finest level, which double up to eight times as many. enlarge: the factor by which the image is enlarged;
    with 1 the network works at half its resolution, and the depth is enlarged instead. Sides are multiples of 32 / enlarge. frozen: how many
    leading parts of the encoder, its stem and then one block each, keep their weights and statistics, as detectors' do (Detectron's FREEZE_AT).
    Raises FileNotFoundError where the ImageNet weights are missing.
    """

    STAGES = (16, 24, 40, 112, 320)  # channels of the last block at each resolution, finest first

    def __init__(self, width: int = 24, enlarge: int = 2, frozen: int = 0):
        super().__init__()
        self.enlarge = enlarge
        whole = imagenet_efficientnet()
        self.stem, self.norm, self.blocks = whole._conv_stem, whole._bn0, whole._blocks
        self.frozen = [self.stem, self.norm, *self.blocks[: frozen - 1]] if frozen else []
        for part in self.frozen:
            part.requires_grad_(False)
        widths = [width, 2 * width, 4 * width, 4 * width, 8 * width]
        self.bottom = _convolution(self.STAGES[-1], widths[-1], kernel=1)
        pairs = zip(self.STAGES[-2::-1], widths[:0:-1], widths[-2::-1], strict=True)
        self.levels = nn.ModuleList(_convolution(skip + deep, out) for skip, deep, out in pairs)
        self.out = nn.Conv2d(width, 1, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # its convolutions of single channels take half as long on CPUs

    def train(self, mode: bool = True) -> ImageNetDepth:
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        image = image * (127.5 / 128) + 0.5 / 128  # the Lite networks know (pixel - 127) / 128
        image = image.contiguous(memory_format=torch.channels_last)
        x = _resized(image, [self.enlarge * side for side in image.shape[-2:]])
        x = F.relu6(self.norm(self.stem(x)))
        skips = {}
        for block in self.blocks:
            x = block(x)
            skips[x.shape[1]] = x
        x = self.bottom(skips[self.STAGES[-1]])
        for level, channels in zip(self.levels, self.STAGES[-2::-1], strict=True):
            skip = skips[channels]
            x = level(torch.cat([_resized(x, skip.shape[-2:]), skip], 1))
        return _resized(self.out(x), image.shape[-2:])


def _resized(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x if x.shape[-2:] == tuple(shape) else F.interpolate(x, size=tuple(shape), mode="bilinear", align_corners=False)


def _convolution(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def depth_network(architecture: dict, size: Size) -> nn.Module:
    """A depth network for images of that size. architecture: {"imagenet": width} with ImageNetDepth's other arguments, else UNet2DModel's."""
    if "imagenet" in architecture:
        return ImageNetDepth(architecture["imagenet"], **{key: architecture[key] for key in ("enlarge", "frozen") if key in architecture})
    return DepthUNet({"sample_size": size, **architecture})


class PretrainedDepth(nn.Module):
    """A depth network of transformers (DPT and others) with the interface of DepthUNet: image in [-1, 1] (b, 3, s, s) to coded depth (b, 1, s, s).

    processor: the network's own image processor. output: "inverse", what DPT and MiDaS give (see `inverse_to_metres`, also for bounds), or
    "metres". Raises ValueError where the network's output is not finite.
    """

    def __init__(self, network: nn.Module, processor, coding: DepthCoding, output: str = "inverse", bounds: tuple[float, float] | None = None):
        super().__init__()
        if output not in OUTPUTS:
            raise ValueError(f"output of a depth network is {output!r}, expected one of {', '.join(OUTPUTS)}")
        self.network, self.processor, self.coding, self.output, self.bounds = network, processor, coding, output, bounds

    def forward(self, image: Tensor) -> Tensor:
        pixels = self.processor(images=list(to_uint8(image)), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        found = self.network(pixel_values=pixels.to(image.device)).predicted_depth.float()
        # The filter by which transformers brings depth back to the picture's size.
        found = F.interpolate(found[:, None], image.shape[-2:], mode="bicubic", align_corners=False)
        if not found.isfinite().all():
            raise ValueError(f"the depth network gives NaN or infinity for {int((~found.isfinite()).flatten(1).any(1).sum())} of {len(image)} pictures")
        metres = found if self.output == "metres" else inverse_to_metres(found, self.coding.near, self.coding.far, self.bounds)
        return self.coding.encode(metres)


def inverse_to_metres(inverse: Tensor, near: float, far: float, bounds: tuple[float, float] | None = None) -> Tensor:
    """Inverse depth that is known up to scale and shift (b, ..., h, w), large where near, as metres from near to far of the same shape.

    A network like DPT (Ranftl et al. 2021, arXiv 2103.13413) gives a / depth + b, with a > 0 and b of its own for every picture. Its lowest value
    becomes far and its highest near, linearly in 1 / depth: 1 / metres = 1 / far + u (1 / near - 1 / far), u = (inverse - low) / (high - low),
    clipped to [0, 1]. bounds: (low, high) for all pictures; None: the extremes of each picture, so that a and b drop out. A picture of one
    value has no depth to tell and is far everywhere. Raises ValueError unless low < high.
    """
    if bounds is None:
        low, high = inverse.flatten(1).min(1).values, inverse.flatten(1).max(1).values
        low, high = (edge.reshape(-1, *[1] * (inverse.ndim - 1)) for edge in (low, high))
    else:
        low, high = bounds
        if not low < high:
            raise ValueError(f"bounds of inverse depth are {low} and {high}, expected low < high")
    span = torch.as_tensor(high - low)
    share = ((inverse - low) / torch.where(span > 0, span, 1.0)).clamp(0, 1)
    return 1 / (1 / far + share * (1 / near - 1 / far))


def load_pretrained(model: str | Path, coding: DepthCoding, output: str = "inverse", bounds: tuple[float, float] | None = None) -> tuple[PretrainedDepth, dict]:
    """A depth-estimation model of transformers, frozen, in float32 on the CPU; and {"model": its name, "sha256": of each weight file by name}.

    model: a folder (config.json, preprocessor_config.json, weights) or a hub name such as "Intel/dpt-large", with or without "@revision".
    Raises ValueError or FileNotFoundError, in one line, where transformers is not installed, and for a model that is missing, damaged, incomplete
    or no depth network.
    """
    try:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation
        from transformers.utils import logging
    except ImportError:
        raise ValueError(f"{model}: depth networks like this need transformers: pip install 'dag-depth-guidance[paper]'") from None
    if not sys.stderr.isatty():  # a bar in a log would stand before the line that says what is wrong
        logging.disable_progress_bar()
    folder = Path(model) if Path(model).is_dir() else from_hub(str(model))
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file, expected the folder of a depth network as transformers saves it")
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
        network, loaded = AutoModelForDepthEstimation.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    except Exception as error:  # transformers and safetensors raise many kinds for a damaged or foreign folder
        raise ValueError(f"{folder}: not a depth network of transformers ({' '.join(str(error).split())[:200]})") from None
    if missing := sorted(key for key in loaded["missing_keys"] if _UNUSED not in key):
        raise ValueError(f"{folder}: its weights have no {missing[0]} ({len(missing)} missing), which its config.json builds")
    files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin"))
    facts = {"model": str(model), "sha256": {file.name: sha256(file) for file in files}}
    return PretrainedDepth(network, processor, coding, output, bounds).eval().requires_grad_(False), facts


def depth_loss(model: nn.Module, data: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """L1 between coded depths, the image and its depth mirrored together for every second sample on average."""
    image, depth = data
    mirror = (torch.rand(len(image), generator=generator) < 0.5).to(image.device)[:, None, None, None]
    image, depth = torch.where(mirror, image.flip(-1), image), torch.where(mirror, depth.flip(-1), depth)
    return (model(image).float() - depth).abs().mean()


def augmented_depth_loss(model: nn.Module, data: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """depth_loss for few pairs: colours vary (each channel's gain, and one brightness, by up to a quarter), and pictures are moved by up to a
    tenth of their short side, image and depth together, their edge repeated."""
    image, depth = data
    b, height, width = len(image), *image.shape[-2:]
    colour = 1 + 0.25 * (2 * torch.rand(b, 3, 1, 1, generator=generator) - 1)
    light = 0.25 * (2 * torch.rand(b, 1, 1, 1, generator=generator) - 1)
    image = (image * colour.to(image.device) + light.to(image.device)).clamp(-1, 1)
    reach = min(height, width) // 10
    moves = torch.randint(2 * reach + 1, (b, 2), generator=generator).tolist()
    both = F.pad(torch.cat([image, depth], 1), (reach,) * 4, mode="replicate")
    both = torch.stack([one[:, down : down + height, right : right + width] for one, (down, right) in zip(both, moves, strict=True)])
    return depth_loss(model, (both[:, :-1], both[:, -1:]), generator)


@torch.no_grad()
def renew_statistics(network: nn.Module, images: Tensor, batch_size: int = 64) -> nn.Module:
    """The network in eval mode, its batch normalisations' means and variances taken anew over training pictures (n, 3, h, w) in [-1, 1].

    Averaged weights need them (Izmailov et al. 2018, arXiv 1803.05407, section 3.2): running statistics lag behind the weights, and those that a
    short training takes over from ImageNet would bias every depth. Frozen parts, which stay in eval mode, keep theirs.
    """
    device = next(network.parameters()).device
    norms = [module for module in network.train().modules() if isinstance(module, nn.BatchNorm2d) and module.training]
    if norms:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over batches
        count = -(-len(images) // batch_size)
        for i in range(count):  # of nearly the same size, and neighbours, which are often alike, in different ones
            network(images[i::count].to(device))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return network.eval()


@torch.no_grad()
def estimate(model: nn.Module, images: np.ndarray, coding: DepthCoding, batch_size: int = 64) -> np.ndarray:
    """Depth in metres, (n, s, s) float32, of images (n, s, s, 3) uint8. model: maps images in [-1, 1] to coded depth, in eval mode."""
    device = next(model.parameters()).device
    batches = (to_tensor(images[i : i + batch_size]).to(device) for i in range(0, len(images), batch_size))
    return torch.cat([coding.decode(model(batch).float())[:, 0].cpu() for batch in batches]).numpy()


@torch.no_grad()
def estimate_whole(model: nn.Module, images: np.ndarray, coding: DepthCoding, size: Size) -> np.ndarray:
    """Depth in metres, (n, h, w) float32, of whole pictures (n, h, w, 3) uint8 by a model of pictures of another size.

    What the model sees is like what it was trained on. A model of whole pictures, whose size is a height and a width, is given each at that size.
    For a model of squares each is covered by equally spaced squares of its short side; their coded depths are blended, each square counting most in
    its middle. Coded depths are means over the picture and its mirror image, as is usual for NYU-Depth v2 (AdaBins, Bhat et al. 2021, arXiv
    2011.14141), enlarged bilinearly.
    """
    n, height, width = images.shape[:3]
    total, weights, device = torch.zeros(n, height, width), torch.zeros(height, width), next(model.parameters()).device
    for box, weight in _squares(height, width) if isinstance(size, int) else [((0, 0, width, height), torch.ones(1))]:
        parts = to_tensor(np.stack([scaled(image, size, box) for image in images])).to(device)
        both = (model(parts) + model(parts.flip(-1)).flip(-1)).float().cpu() / 2
        rows, columns = slice(box[1], box[3]), slice(box[0], box[2])
        shape = (box[3] - box[1], box[2] - box[0])
        coded = F.interpolate(both, size=shape, mode="bilinear", align_corners=False)[:, 0]
        total[:, rows, columns] += coded * weight
        weights[rows, columns] += weight
    return coding.decode(total / weights).numpy()


def _squares(height: int, width: int) -> Iterator[tuple[Box, Tensor]]:
    """Equally spaced squares that cover a picture, with the weights of their rows or columns in it."""
    side, long = min(height, width), max(height, width)
    ramp = torch.minimum(torch.arange(side) + 1, side - torch.arange(side)).float()
    for at in np.linspace(0, long - side, -(-long // side)).round().astype(int).tolist():
        yield ((at, 0, at + side, side), ramp) if width >= height else ((0, at, side, at + side), ramp[:, None])
