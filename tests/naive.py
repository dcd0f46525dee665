"""The guided step as one would first write it: the oracle of the tests and the yardstick of the benchmark.

Nothing is shared: the U-Net runs once for eps, once for each head and once for each gradient's own graph; features are collected by
hooks on diffusers' own forward pass, upsampled and concatenated at depth resolution; a plain Linear reads the concatenation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dag.diffusion import Diffusion, Prediction
from dag.heads import DepthHead


def block_modules(unet) -> list[nn.Module]:
    """The module whose output is decoder block k: a ResNet, its attention, or the upsampler that ends a level."""
    modules = []
    for level in unet.up_blocks:
        attentions = getattr(level, "attentions", [None] * len(level.resnets))
        modules += [resnet if attention is None else attention for resnet, attention in zip(level.resnets, attentions, strict=True)]
        if level.upsamplers is not None:
            modules[-1] = level.upsamplers[-1]
    return modules


def hooked_forward(unet, x: Tensor, t: Tensor, blocks: Iterable[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """diffusers' forward pass (b, c, h, w) and the features of some decoder blocks."""
    features, modules = {}, block_modules(unet)
    hooks = [modules[k].register_forward_hook(lambda module, inputs, output, k=k: features.update({k: output})) for k in blocks]
    try:
        return unet(x, t).sample, features
    finally:
        for hook in hooks:
            hook.remove()


class NaiveHead(nn.Module):
    """A DepthHead's weights in the form of the paper's figure: one Linear over the concatenated, upsampled features, then a per-pixel MLP."""

    def __init__(self, head: DepthHead):
        super().__init__()
        self.head, self.blocks = head, head.blocks
        self.first = nn.Linear(sum(head.channels.values()), head.width)
        self.first.weight.data = torch.cat([head.first[str(k)].weight.detach().flatten(1) for k in head.blocks], 1)
        self.first.bias.data = head.bias.detach().clone()

    def forward(self, features: dict[int, Tensor], t: Tensor, size: int) -> Tensor:
        upsampled = [F.interpolate(features[k], size=(size, size), mode="bilinear", align_corners=False) for k in self.blocks]
        h = self.first(torch.cat(upsampled, 1).movedim(1, -1))
        index = torch.arange(self.head.time_width // 2, dtype=torch.float64, device=t.device)
        angle = t[:, None].double() / 10_000 ** (2 * index / self.head.time_width)
        embedding = torch.cat([angle.sin(), angle.cos()], 1).to(h)
        for number, layer in enumerate(self.head.layers):
            if number:
                h = F.linear(h, self.head.hidden[number - 1].weight[:, :, 0, 0], self.head.hidden[number - 1].bias)
            h = self._normalised(layer.norm, F.silu(h)) + F.linear(embedding, layer.time.weight, layer.time.bias)[:, None, None]
        return F.linear(h, self.head.out.weight[:, :, 0, 0], self.head.out.bias).movedim(-1, 1)

    def _normalised(self, norm: nn.BatchNorm2d, h: Tensor) -> Tensor:
        """Batch norm by its formula: over all pixels of the batch while training, by the running statistics otherwise."""
        mean = h.mean((0, 1, 2)) if norm.training else norm.running_mean
        variance = h.var((0, 1, 2), correction=0) if norm.training else norm.running_var
        return (h - mean) / (variance + norm.eps) ** 0.5 * norm.weight + norm.bias


def naive_eps(unet, diffusion: Diffusion, prediction_type: str, x: Tensor, t: Tensor) -> Tensor:
    """eps with its graph, from diffusers' own forward pass and the formulas of the three prediction types."""
    output = unet(x, t).sample[:, : x.shape[1]]
    abar = torch.as_tensor(diffusion.alphas_cumprod)[t.cpu()].to(x)[:, None, None, None]
    if prediction_type == "sample":
        return (x - abar**0.5 * output) / (1 - abar) ** 0.5
    return abar**0.5 * output + (1 - abar) ** 0.5 * x if prediction_type == "v_prediction" else output


class NaiveGuidance:
    """A predictor: eps + DCG + DPG, with a forward pass for each of eps, strong and weak head and a gradient for each term.

    heads: {"strong", "weak"} of NaiveHead. prior(d_tau, tau) -> noise at `resolution`, which divides the image size. tau: (low, high).
    """

    def __init__(
        self,
        unet,
        diffusion: Diffusion,
        prediction_type: str,
        heads: dict[str, NaiveHead],
        *,
        w_dc: float,
        w_dp: float,
        prior: Callable[[Tensor, Tensor], Tensor],
        resolution: int,
        tau: tuple[int, int],
        reduction: str = "mean",
    ):
        self.unet, self.diffusion, self.prediction_type, self.heads = unet, diffusion, prediction_type, heads
        self.w_dc, self.w_dp, self.prior, self.resolution, self.tau = w_dc, w_dp, prior, resolution, tau
        self.reduce = torch.sum if reduction == "sum" else torch.mean

    def __call__(self, x_t: Tensor, t: Tensor, rng) -> Prediction:
        with torch.no_grad():
            eps = naive_eps(self.unet, self.diffusion, self.prediction_type, x_t, t)
        with torch.enable_grad():
            x = x_t.detach().clone().requires_grad_()
            strong, weak = self._depth("strong", x, t), self._depth("weak", x, t)
            dc = self.reduce((strong.detach() - weak) ** 2, (1, 2, 3))
            (grad_dc,) = torch.autograd.grad(dc.sum(), x)
            dp = self._prior_loss(strong, t, rng)
            (grad_dp,) = torch.autograd.grad(dp.sum(), x)
        return Prediction(eps, None, self.w_dc * grad_dc + self.w_dp * grad_dp, {"dc": dc.detach(), "dp": dp.detach()})

    def _depth(self, name: str, x: Tensor, t: Tensor) -> Tensor:
        head = self.heads[name]
        return head(hooked_forward(self.unet, x, t, head.blocks)[1], t, x.shape[-1])

    def _prior_loss(self, depth: Tensor, t: Tensor, rng) -> Tensor:
        small = F.avg_pool2d(depth, depth.shape[-1] // self.resolution)
        low, high = self.tau
        tau = rng.randint("prior", low, high + 1) if low < high else torch.full_like(t, low)
        eta_noise = rng.randn("prior", small.shape[1:]).to(small)
        abar = torch.as_tensor(self.diffusion.alphas_cumprod)[tau.cpu()].to(small)[:, None, None, None]
        return self.reduce((eta_noise - self.prior(abar**0.5 * small + (1 - abar) ** 0.5 * eta_noise, tau)) ** 2, (1, 2, 3))
