"""Depth-aware guidance (DAG, section 4.2): one U-Net forward, weighted losses on the depth read from it, one gradient.

A term is a callable `term(depths, t, rng) -> (b,)` with attributes `name`, `weight` and `heads` (the heads it reads), so a
loss of one's own is one small class beside the two of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dag.diffusion import Diffusion, Prediction
from dag.unet import forward_with_taps, split_output

__all__ = ["Consistency", "DepthGuidance", "Prediction", "Prior", "UNetPredictor", "depth_consistency", "depth_prior"]

REDUCTIONS = ("mean", "sum")


def _reduce(squared: Tensor, reduction: str) -> Tensor:
    return squared.flatten(1).sum(1) if reduction == "sum" else squared.flatten(1).mean(1)


def depth_consistency(strong: Tensor, weak: Tensor, reduction: str = "mean") -> Tensor:
    """L_dc = || stopgrad(d_S) - d_W ||^2 per sample (DAG eq. 8): (b,) from two depths (b, 1, s, s)."""
    return _reduce((strong.detach() - weak).square(), reduction)


def depth_prior(depth: Tensor, prior: Callable, diffusion: Diffusion, tau: Tensor, eta_noise: Tensor, reduction: str = "mean") -> Tensor:
    """L_dp = || eta_noise - eps_phi(d_tau, tau) ||^2 per sample (DAG eq. 10): (b,).

    depth: (b, 1, r, r) at the prior's resolution; prior(d_tau, tau) -> predicted noise; tau (b,); eta_noise like depth.
    The gradient reaches depth through the prior.
    """
    d_tau = diffusion.q_sample(depth, tau, eta_noise)
    return _reduce((eta_noise - prior(d_tau, tau)).square(), reduction)


class Consistency:
    """DCG: the weak head's depth is drawn to the strong head's."""

    name, heads = "dc", ("strong", "weak")

    def __init__(self, weight: float, reduction: str = "mean"):
        self.weight, self.reduction = weight, reduction

    def __call__(self, depths: dict[str, Tensor], t: Tensor, rng) -> Tensor:
        return depth_consistency(depths["strong"], depths["weak"], self.reduction)


class Prior:
    """DPG: the strong head's depth, brought to the prior's resolution by area averaging, should look likely to a prior over depth.

    tau: (low, high), inclusive, drawn for every sample and step from the sample's own stream "prior"; fixed where equal.
    """

    name, heads = "dp", ("strong",)

    def __init__(self, weight: float, prior: Callable, diffusion: Diffusion, resolution: int, tau: tuple[int, int], reduction: str = "mean"):
        if not 0 <= tau[0] <= tau[1] < diffusion.num_timesteps:
            raise ValueError(f"tau is {tau}, expected 0 <= low <= high < {diffusion.num_timesteps}")
        self.weight, self.prior, self.diffusion = weight, prior, diffusion
        self.resolution, self.tau, self.reduction = resolution, tau, reduction

    def __call__(self, depths: dict[str, Tensor], t: Tensor, rng) -> Tensor:
        depth = F.interpolate(depths["strong"], size=(self.resolution, self.resolution), mode="area")
        low, high = self.tau
        tau = torch.full_like(t, low) if low == high else rng.randint("prior", low, high + 1).to(t)
        eta_noise = rng.randn("prior", depth.shape[1:]).to(depth)
        return depth_prior(depth, self.prior, self.diffusion, tau, eta_noise, self.reduction)


class UNetPredictor:
    """A U-Net as `predict(x_t, t, rng) -> Prediction`, whatever it was trained to predict.

    precision: "fp32" or "bf16" (autocast of the U-Net alone). checkpoint: recompute activations in the backward pass to save memory.
    """

    def __init__(self, unet, diffusion: Diffusion, prediction_type: str = "epsilon", precision: str = "fp32", checkpoint: bool = False):
        self.unet, self.diffusion, self.prediction_type = unet, diffusion, prediction_type
        self.precision, self.checkpoint = precision, checkpoint

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, rng=None) -> Prediction:
        return self.taps(x_t, t, (), with_grad=False)[0]

    def taps(self, x_t: Tensor, t: Tensor, blocks: Sequence[int], with_grad: bool) -> tuple[Prediction, dict[int, Tensor]]:
        """The prediction, without a graph, and the features of some decoder blocks; with_grad: gradients reach x_t through those."""
        with torch.set_grad_enabled(with_grad), torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output, features = forward_with_taps(self.unet, x_t, t, blocks, detach_output=with_grad, checkpoint=self.checkpoint)
        output, raw_variance = split_output(output.detach().to(x_t.dtype), x_t.shape[1])
        return Prediction(self.diffusion.to_eps(output, x_t.detach(), t, self.prediction_type), raw_variance), features

    def eps(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predicted noise with its graph, for a prior whose gradient is wanted."""
        output, _ = split_output(self.unet(x_t, t).sample, x_t.shape[1])
        return self.diffusion.to_eps(output, x_t, t, self.prediction_type)


class DepthGuidance:
    """A predictor that adds the gradient of weighted depth losses to another predictor's eps.

    predictor: has `.taps(x_t, t, blocks, with_grad) -> (Prediction, {block: feature})`, e.g. `dag.unet.UNetPredictor`.
    heads: named depth heads, each with `.blocks`, called as head(features, t, size). terms: see the module's docstring.
    window: (low, high), the original timesteps, inclusive, at which guidance acts.

    Losses are per sample and summed over the batch, so no sample's gradient depends on its batch-mates.
    """

    def __init__(self, predictor, heads: dict[str, nn.Module] | nn.ModuleDict, terms: Sequence, window: tuple[int, int] = (0, 10**9)):
        self.predictor, self.window = predictor, window
        self.terms = [term for term in terms if term.weight != 0]
        needed = sorted({name for term in self.terms for name in term.heads})
        missing = [name for name in needed if name not in heads]
        if missing:
            raise ValueError(f"guidance needs the heads {missing}; there are {sorted(heads)}")
        self.heads = {name: heads[name] for name in needed}
        self.blocks = tuple(sorted({block for head in self.heads.values() for block in head.blocks}))

    def __call__(self, x_t: Tensor, t: Tensor, rng) -> Prediction:
        """Prediction with grad = sum over terms of w grad_x L (b, c, h, w), and each loss (b,).

        Without an active term (all weights zero, or t outside the window) this is the predictor's own output, bit for bit.
        The samplers refuse a loss or gradient that is not finite, naming seed, t and term.
        """
        inside = (t >= self.window[0]) & (t <= self.window[1])
        if not self.terms or not inside.any():
            return self.predictor(x_t, t, rng)
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            prediction, features = self.predictor.taps(x, t, self.blocks, with_grad=True)
            depths = {name: head(features, t, x.shape[-1]) for name, head in self.heads.items()}
            losses = {term.name: term(depths, t, rng) for term in self.terms}
            total = sum(term.weight * losses[term.name] for term in self.terms)
            (grad,) = torch.autograd.grad((total * inside).sum(), x)
        return Prediction(prediction.eps, prediction.log_variance, grad, {name: loss.detach() for name, loss in losses.items()})
