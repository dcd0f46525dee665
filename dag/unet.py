"""diffusers' `UNet2DModel`, taken apart at its decoder blocks: the table of blocks and one forward pass that also returns their features.

Blocks are numbered from 0 over the decoder like `output_blocks` of guided-diffusion: one per decoder ResNet with its
attention; where a level ends in an upsampler, the level's last block includes it. The forward pass is written out here,
instead of hooked, so that features are returned rather than parked on modules and the graph can end at the deepest tap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

if TYPE_CHECKING:
    from diffusers import UNet2DModel

_DOWN_TYPES = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D")
_UP_TYPES = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")


@dataclass(frozen=True)
class DecoderBlock:
    """One decoder block. channels: of its output. stride: input size / output size, so that H(k) = H / stride."""

    index: int
    channels: int
    stride: int


@dataclass(frozen=True)
class _Part:
    """The modules of one decoder block. end: the level whose closing upsampler belongs to this block, if it is the level's last."""

    resnet: nn.Module
    attention: nn.Module | None
    end: nn.Module | None


def decoder_blocks(unet: UNet2DModel) -> tuple[DecoderBlock, ...]:
    """The table of decoder blocks, in order of computation. Raises ValueError for U-Nets that `forward_with_taps` cannot run."""
    stride = 2 ** sum(level.downsamplers is not None for level in _supported(unet).down_blocks)
    table = []
    for part in _parts(unet):
        if part.end is not None and _upsamples(part.end):
            stride //= 2
        table.append(DecoderBlock(len(table), part.resnet.out_channels, stride))
    return tuple(table)


def feature_shapes(unet: UNet2DModel, size: int | tuple[int, int]) -> dict[int, tuple[int, int, int]]:
    """{block: (C, H, W)} of every decoder block for images of `size` pixels (height = width, or (height, width)).

    Raises ValueError where a side is no multiple of the U-Net's total stride.
    """
    height, width = (size, size) if isinstance(size, int) else size
    total = 2 ** sum(level.downsamplers is not None for level in unet.down_blocks)
    if height % total or width % total:
        raise ValueError(f"image size is {height}x{width}, expected multiples of {total}, the total stride of this U-Net")
    return {b.index: (b.channels, height // b.stride, width // b.stride) for b in decoder_blocks(unet)}


def picture_side(unet: UNet2DModel) -> int:
    """Pixels along the side of the square RGB pictures of a U-Net. Raises ValueError for one of other pictures, or of what is none."""
    side, channels = unet.config.sample_size, unet.config.in_channels
    if not isinstance(side, int):
        raise ValueError(f"the U-Net's sample_size is {side}, expected one number: square pictures")
    if channels != 3:
        raise ValueError(f"the U-Net's in_channels is {channels}, expected 3: RGB pictures, neither latents nor greys")
    return side


def split_output(output: Tensor, in_channels: int) -> tuple[Tensor, Tensor | None]:
    """The network's prediction (b, c, h, w) and, where it learned its variance (2c channels), the raw interpolation in [-1, 1], else None.

    Learned variance: log Sigma = v log beta_t + (1 - v) log beta~_t with v = (raw + 1) / 2 (Nichol & Dhariwal 2021, eq. 15).
    """
    if output.shape[1] == in_channels:
        return output, None
    if output.shape[1] == 2 * in_channels:
        return output[:, :in_channels], output[:, in_channels:]
    raise ValueError(f"the U-Net's output has {output.shape[1]} channels, expected {in_channels}, or {2 * in_channels} with learned variance")


def forward_with_taps(
    unet: UNet2DModel,
    x: Tensor,
    t: Tensor | int,
    taps: Iterable[int] = (),
    *,
    stop_after_taps: bool = False,
    detach_output: bool = False,
    checkpoint: bool = False,
) -> tuple[Tensor | None, dict[int, Tensor]]:
    """One forward pass: `unet(x, t).sample`, bit for bit, and the features of the decoder blocks in `taps`.

    x: (b, c, h, w). t: (b,), or one number for all. Returns the output (b, c or 2c, h, w) and {block: (b, C, H, W)} in order of computation.
    stop_after_taps: end after the deepest tap; the output is None. detach_output: run everything after the deepest tap without
    a graph (with no taps: everything), for gradients that reach x through features only; nothing of those blocks is then kept in
    memory. checkpoint: keep only the borders of blocks for the backward pass and compute their insides again there.
    Raises ValueError for a tap outside the decoder, for class-conditional U-Nets and for unknown kinds of blocks.
    """
    parts = _parts(_supported(unet))
    taps = _checked(taps, len(parts))
    deepest = max(taps, default=-1)
    if detach_output and not taps:
        with torch.no_grad():
            return forward_with_taps(unet, x, t, stop_after_taps=stop_after_taps)
    if stop_after_taps and not taps:
        return None, {}

    run = _recomputed if checkpoint else _called
    timesteps, emb = _embed_time(unet, x, t)
    h, skips = _encode(unet, 2 * x - 1.0 if unet.config.center_input_sample else x, emb, run)
    if unet.mid_block is not None:
        h = run(unet.mid_block, h, emb)
    rgb, features = None, {}
    for index, part in enumerate(parts[: deepest + 1]):
        h, rgb = run(_decode, part, h, skips.pop(), emb, rgb)
        if index in taps:
            features[index] = h
    if stop_after_taps:
        return None, features
    with torch.no_grad() if detach_output else nullcontext():
        for part in parts[deepest + 1 :]:
            h, rgb = run(_decode, part, h, skips.pop(), emb, rgb)
        return _finish(unet, h, rgb, timesteps), features


def _supported(unet: UNet2DModel) -> UNet2DModel:
    if unet.class_embedding is not None:
        raise ValueError(f"class-conditional U-Nets are not supported (num_class_embeds is {unet.config.num_class_embeds}, expected None)")
    for levels, known in ((unet.down_blocks, _DOWN_TYPES), (unet.up_blocks, _UP_TYPES)):
        for level in levels:
            if type(level).__name__ not in known:
                raise ValueError(f"the U-Net has a {type(level).__name__}, expected one of {', '.join(known)}")
    return unet


def _checked(taps: Iterable[int], blocks: int) -> frozenset[int]:
    taps = frozenset(taps)
    wrong = sorted(k for k in taps if not 0 <= k < blocks)
    if wrong:
        raise ValueError(f"no decoder block {wrong[0]} in this U-Net: blocks are numbered 0 to {blocks - 1}")
    return taps


def _attentions(level: nn.Module) -> list[nn.Module | None]:
    """One attention or None for each ResNet of a level. The skip kind of decoder level has a single one, after its last ResNet."""
    attentions = list(getattr(level, "attentions", ()))
    return [None] * (len(level.resnets) - len(attentions)) + attentions


def _parts(unet: UNet2DModel) -> list[_Part]:
    parts = []
    for level in unet.up_blocks:
        for resnet, attention in zip(level.resnets, _attentions(level), strict=True):
            parts.append(_Part(resnet, attention, level if resnet is level.resnets[-1] else None))
    return parts


def _upsamples(level: nn.Module) -> bool:
    return (level.resnet_up if hasattr(level, "skip_conv") else level.upsamplers) is not None


def _called(function: Callable, *inputs):
    return function(*inputs)


def _recomputed(function: Callable, *inputs):
    return recompute(function, *inputs, use_reentrant=False) if torch.is_grad_enabled() else function(*inputs)


def _embed_time(unet: UNet2DModel, x: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
    if not torch.is_tensor(t):
        t = torch.tensor([t], dtype=torch.long, device=x.device)
    elif t.ndim == 0:
        t = t[None].to(x.device)
    timesteps = t * torch.ones(x.shape[0], dtype=t.dtype, device=t.device)
    # The sinusoids are float32 whatever the weights are.
    return timesteps, unet.time_embedding(unet.time_proj(timesteps).to(dtype=unet.dtype))


def _residual(resnet: nn.Module, attention: nn.Module | None, h: Tensor, emb: Tensor) -> Tensor:
    h = resnet(h, emb)
    return h if attention is None else attention(h)


def _resample(module: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
    """Down- and upsamplers are either a ResNet, which wants the time embedding, or a plain convolution, which does not."""
    return module(h, emb) if hasattr(module, "time_emb_proj") else module(h)


def _encode(unet: UNet2DModel, x: Tensor, emb: Tensor, run: Callable) -> tuple[Tensor, list[Tensor]]:
    """The encoder's output and the skip connections, last one last. rgb: the shrinking image that skip kinds of levels add in."""
    rgb, h = x, unet.conv_in(x)
    skips = [h]
    for level in unet.down_blocks:
        for resnet, attention in zip(level.resnets, _attentions(level), strict=True):
            h = run(_residual, resnet, attention, h, emb)
            skips.append(h)
        if level.downsamplers is None:
            continue
        if hasattr(level, "skip_conv"):
            h = run(level.resnet_down, h, emb)
            for downsampler in level.downsamplers:
                rgb = downsampler(rgb)
            h = level.skip_conv(rgb) + h
        else:
            for downsampler in level.downsamplers:
                h = run(_resample, downsampler, h, emb)
        skips.append(h)
    return h, skips


def _decode(part: _Part, h: Tensor, skip: Tensor, emb: Tensor, rgb: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One decoder block. rgb: the growing image to which skip kinds of levels add theirs, None before the first of them."""
    h = _residual(part.resnet, part.attention, torch.cat([h, skip], dim=1), emb)
    level = part.end
    if level is None:
        return h, rgb
    if not hasattr(level, "skip_conv"):
        for upsampler in level.upsamplers or ():
            h = _resample(upsampler, h, emb)
        return h, rgb
    rgb = 0 if rgb is None else level.upsampler(rgb)
    if level.resnet_up is not None:
        rgb = rgb + level.skip_conv(level.act(level.skip_norm(h)))
        h = level.resnet_up(h, emb)
    return h, rgb


def _finish(unet: UNet2DModel, h: Tensor, rgb: Tensor | None, timesteps: Tensor) -> Tensor:
    output = unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))
    if rgb is not None:
        output = output + rgb
    if unet.config.time_embedding_type == "fourier":
        output = output / timesteps.reshape(-1, *[1] * (output.ndim - 1))
    return output
