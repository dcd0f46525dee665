"""Depth-aware guidance (DAG, section 4.2): one U-Net forward, weighted losses on the depth read from it, one gradient.

A loss of one's own is one small class beside the two of the paper: see `Term`, and examples/floor_plane.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dag.diffusion import PREDICTION_TYPES, Diffusion, Prediction
from dag.unet import decoder_blocks, forward_with_taps, split_output
from dag.weights import load_unet

__all__ = ["Consistency", "DepthGuidance", "Prediction", "Prior", "Term", "UNetPredictor", "depth_consistency", "depth_prior"]

REDUCTIONS = ("mean", "sum")
PRECISIONS = ("fp32", "bf16")


def _reduce(squared: Tensor, reduction: str) -> Tensor:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, expected one of {REDUCTIONS}")
    return squared.flatten(1).sum(1) if reduction == "sum" else squared.flatten(1).mean(1)


def depth_consistency(strong: Tensor, weak: Tensor, reduction: str = "mean") -> Tensor:
    """L_dc = || stopgrad(d_S) - d_W ||^2 per sample (DAG eq. 8): (b,) from two depths (b, 1, s, s).

    reduction: "mean" over a sample's pixels, or their "sum"; ValueError on others.
    """
    return _reduce((strong.detach() - weak).square(), reduction)


def depth_prior(depth: Tensor, prior: Callable, diffusion: Diffusion, tau: Tensor, eta_noise: Tensor, reduction: str = "mean") -> Tensor:
    """L_dp = || eta_noise - eps_phi(d_tau, tau) ||^2 per sample (DAG eq. 10): (b,).

    depth: (b, 1, r, r) at the prior's resolution; prior(d_tau, tau) -> predicted noise; tau (b,); eta_noise like depth.
    The gradient reaches depth through the prior. reduction: as in depth_consistency.
    """
    d_tau = diffusion.q_sample(depth, tau, eta_noise)
    return _reduce((eta_noise - prior(d_tau, tau)).square(), reduction)


class Term(Protocol):
    """What a guidance term is: a differentiable loss on depth.

    name: under which its loss is reported. weight: of its gradient, 0 for none. heads: the names of the heads that it reads. Called with
    depths, {name of head: coded depth (b, 1, s, s)}, t (b,) and rng, from whose streams it may draw (`rng.randn(stream, shape)`), it returns
    one loss per sample (b,) that depends on that sample's depth alone.
    """

    name: str
    weight: float
    heads: tuple[str, ...]

    def __call__(self, depths: dict[str, Tensor], t: Tensor, rng) -> Tensor: ...


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

    precision: "fp32" or "bf16" (autocast of the U-Net alone). channels_last: lay the U-Net's weights out (in place) so that its
    convolutions compute with a pixel's channels side by side: the same numbers to rounding, faster on most machines. checkpoint: recompute
    activations in the backward pass to save memory. Raises ValueError on an unknown prediction_type or precision.
    """

    def __init__(
        self,
        unet,
        diffusion: Diffusion,
        prediction_type: str = "epsilon",
        precision: str = "fp32",
        channels_last: bool = False,
        checkpoint: bool = False,
    ):
        for key, value, known in (("prediction_type", prediction_type, PREDICTION_TYPES), ("precision", precision, PRECISIONS)):
            if value not in known:
                raise ValueError(f"{key} is {value!r}, expected one of {known}")
        self.unet = unet.to(memory_format=torch.channels_last) if channels_last else unet
        self.diffusion, self.prediction_type = diffusion, prediction_type
        self.precision, self.checkpoint = precision, checkpoint

    @classmethod
    def load(cls, path: str | Path, **options) -> UNetPredictor:
        """The predictor of a pretrained U-Net that `load_unet` reads, with its own diffusion. options: precision, channels_last, checkpoint.

        Raises what `load_unet` does, and ValueError that names path for a U-Net whose blocks have no taps.
        """
        unet, meta = load_unet(path)
        try:
            decoder_blocks(unet)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        diffusion = Diffusion(meta["num_timesteps"], meta["beta_start"], meta["beta_end"], meta["beta_schedule"])
        return cls(unet, diffusion, meta["prediction_type"], **options)

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, rng=None) -> Prediction:
        return self.taps(x_t, t, (), with_grad=False)[0]

    def taps(self, x_t: Tensor, t: Tensor, blocks: Sequence[int], with_grad: bool) -> tuple[Prediction, dict[int, Tensor]]:
        """The prediction, without a graph, and the features of some decoder blocks; with_grad: gradients reach x_t through those."""
        with torch.set_grad_enabled(with_grad), self._autocast(x_t):
            output, features = forward_with_taps(self.unet, x_t, t, blocks, detach_output=with_grad, checkpoint=self.checkpoint)
        output, raw_variance = split_output(output.detach().to(x_t.dtype), x_t.shape[1])
        return Prediction(self.diffusion.to_eps(output, x_t.detach(), t, self.prediction_type), raw_variance), features

    def eps(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predicted noise with its graph, for a prior whose gradient is wanted."""
        with self._autocast(x_t):
            output, _ = forward_with_taps(self.unet, x_t, t, checkpoint=self.checkpoint)
        output, _ = split_output(output.to(x_t.dtype), x_t.shape[1])
        return self.diffusion.to_eps(output, x_t, t, self.prediction_type)

    def read_depth(self, head: Callable, images: Tensor, t: int, noise: Tensor) -> Tensor:
        """Coded depth (b, 1, s, s) that a head reads from finished images (b, c, s, s), which `noise` of their shape takes to timestep t."""
        steps = torch.full((len(images),), t, device=images.device)
        with torch.inference_mode():
            x_t = self.diffusion.q_sample(images, steps, noise)
            with self._autocast(x_t):  # the decoder after the deepest block is left out: nobody asks for eps
                _, found = forward_with_taps(self.unet, x_t, steps, head.blocks, stop_after_taps=True)
            return head(found, steps, images.shape[-1])

    def _autocast(self, x_t: Tensor) -> torch.autocast:
        return torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.precision == "bf16")


class DepthGuidance:
    """A predictor that adds the gradient of weighted depth losses to another predictor's eps.

    predictor: a predictor that also has `.taps(x_t, t, blocks, with_grad) -> (Prediction, {block: feature})`, e.g. `UNetPredictor`.
    heads: named depth heads, each a callable head(features, t, size) with `.blocks`, the decoder blocks it reads. terms: see
    `Term`; those of weight 0 are never computed. window: (low, high), the original timesteps, inclusive, at which guidance acts.

    Losses are per sample and summed over the batch, so no sample's gradient depends on its batch-mates. Raises ValueError on a head
    that is missing or in training mode (its batch norm would mix the samples of a batch), on two terms of one name, and on an empty window.
    """

    def __init__(self, predictor, heads: Mapping[str, Callable] | nn.ModuleDict, terms: Sequence[Term], window: tuple[int, int] = (0, 10**9)):
        if window[0] > window[1]:
            raise ValueError(f"window is {tuple(window)}, expected (low, high) with low <= high")
        names = [term.name for term in terms]
        if len(set(names)) < len(names):
            raise ValueError(f"guidance has terms named {names}, expected different names: losses are reported by name")
        self.predictor, self.window = predictor, window
        self.terms = [term for term in terms if term.weight != 0]
        needed = sorted({name for term in self.terms for name in term.heads})
        missing = [name for name in needed if name not in heads]
        if missing:
            raise ValueError(f"guidance needs the heads {missing}; there are {sorted(heads.keys())}")
        training = [name for name in needed if getattr(heads[name], "training", False)]
        if training:
            raise ValueError(f"the heads {training} are in training mode, expected eval(): batch norm would mix the samples of a batch")
        self.heads = {name: heads[name] for name in needed}
        self.blocks = tuple(sorted({block for head in self.heads.values() for block in head.blocks}))

    def __call__(self, x_t: Tensor, t: Tensor, rng) -> Prediction:
        """Prediction with grad = sum over terms of w grad_x L (b, c, h, w), and each loss (b,).

        Without an active term (all weights zero, or t outside the window) this is the predictor's own output, bit for bit.
        The samplers refuse a loss or gradient that is not finite, naming seed, t and term.
        """
        if not self.terms or not self._inside(t).any():
            return self.predictor(x_t, t, rng)
        # A caller's inference_mode allows no gradient and lends its tensors to none: x is a copy from outside of it.
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.clone().detach().requires_grad_()
            prediction, features = self.predictor.taps(x, t, self.blocks, with_grad=True)
            depths = {name: head(features, t, x.shape[-1]) for name, head in self.heads.items()}
            losses = {term.name: term(depths, t, rng) for term in self.terms}
            _check_per_sample(losses, len(x))
            total = sum(term.weight * losses[term.name] for term in self.terms)
            (grad,) = torch.autograd.grad((total * self._inside(t)).sum(), x)
        return Prediction(prediction.eps, prediction.log_variance, grad, {name: loss.detach() for name, loss in losses.items()})

    def _inside(self, t: Tensor) -> Tensor:
        return (t >= self.window[0]) & (t <= self.window[1])


def _check_per_sample(losses: dict[str, Tensor], samples: int) -> None:
    for name, loss in losses.items():
        if tuple(loss.shape) != (samples,):
            raise ValueError(f"guidance term {name!r} returned a loss of shape {tuple(loss.shape)}, expected ({samples},): one number per sample")
