"""Controls: guidance with its meaning taken away. What still helps then is not depth.

A control wraps a predictor or replaces a part of it, so that everything else of a run, its seeds, weights and cost, stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from dag.diffusion import Prediction

Predict = Callable[[Tensor, Tensor, object], Prediction]  # predict(x_t, t, rng), rng a SampleRNG

__all__ = ["flipped", "noise_instead", "randomised", "shuffled_pixels"]


def flipped(predict: Predict) -> Predict:
    """The predictor with the sign of its guidance reversed: it climbs the losses that it should descend."""

    def against(x_t: Tensor, t: Tensor, rng) -> Prediction:
        prediction = predict(x_t, t, rng)
        return prediction if prediction.grad is None else replace(prediction, grad=-prediction.grad)

    return against


def noise_instead(predict: Predict) -> Predict:
    """The predictor with each sample's gradient replaced by white noise of the same norm, from the sample's own stream "control"."""

    def blind(x_t: Tensor, t: Tensor, rng) -> Prediction:
        prediction = predict(x_t, t, rng)
        if prediction.grad is None:
            return prediction
        noise = rng.randn("control", x_t.shape[1:]).to(prediction.grad)
        # A gradient of zero, outside the window of one sample of the batch, stays zero.
        scale = prediction.grad.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
        return replace(prediction, grad=noise * scale[:, None, None, None])

    return blind


def randomised(heads: nn.ModuleDict, seed: int = 0) -> nn.ModuleDict:
    """Heads of the same shape that have learned nothing about depth: each array of trained weights has its entries put in random order.

    Batch norm keeps its statistics and every array its mean and spread, so that the scale of all layers stays that of the trained
    heads. Returns a copy in the same mode.
    """
    rng, copied = np.random.default_rng(seed), copy.deepcopy(heads)
    with torch.no_grad():
        for parameter in copied.parameters():
            order = torch.from_numpy(rng.permutation(parameter.numel()))
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return copied


def shuffled_pixels(depth: Tensor, seed: int = 0) -> Tensor:
    """Depth maps (n, c, h, w) with the pixels of each in an order of its own: the same histograms without any shape."""
    n, _, h, w = depth.shape
    rng = np.random.default_rng(seed)
    order = torch.from_numpy(np.stack([rng.permutation(h * w) for _ in range(n)]))
    return depth.flatten(2).gather(2, order[:, None].expand(-1, depth.shape[1], -1)).view_as(depth)
