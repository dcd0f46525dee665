"""The forward process and its tables, in float64: betas, q_sample, pred_xstart, the posterior, respaced timesteps.

Notation of DDPM (Ho et al. 2020, arXiv 2006.11239): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass
class Prediction:
    """What a predictor says about x_t: one type for the plain U-Net and for every guidance.

    eps: (b, c, h, w) predicted noise. log_variance: the same shape where the model learned its variance, else None.
    grad: gradient of the weighted guidance losses with respect to x_t (w already in it), or None. losses: per sample
    telemetry, each (b,).
    """

    eps: Tensor
    log_variance: Tensor | None = None
    grad: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)


class Diffusion:
    """Tables of a discrete-time diffusion process with T = num_timesteps steps.

    schedule: "linear" (betas evenly spaced, DDPM) or "scaled_linear" (their square roots evenly spaced). Raises ValueError on others.
    """

    def __init__(self, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, schedule: str = "linear"):
        if schedule == "linear":
            betas = np.linspace(beta_start, beta_end, num_timesteps, dtype=np.float64)
        elif schedule == "scaled_linear":
            betas = np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=np.float64) ** 2
        else:
            raise ValueError(f"schedule is {schedule!r}, expected 'linear' or 'scaled_linear'")
        self.num_timesteps, self.schedule = num_timesteps, schedule
        self.beta_start, self.beta_end = beta_start, beta_end
        self.betas = betas
        self.alphas_cumprod = np.cumprod(1 - betas)

    def abar(self, t: Tensor, like: Tensor) -> Tensor:
        """alphas_cumprod at t (b,), float64 until the last step, shaped to broadcast with `like` and in its dtype."""
        return self._spread(self.alphas_cumprod, t, like)

    def _spread(self, table: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
        values = torch.from_numpy(table)[t.cpu()]
        return values.to(like).reshape(-1, *[1] * (like.ndim - 1))

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM eq. 4). Shapes (b, ...), t (b,)."""
        root, root_one_minus = self._spread(self.alphas_cumprod**0.5, t, x_start), self._spread((1 - self.alphas_cumprod) ** 0.5, t, x_start)
        return root * x_start + root_one_minus * noise

    def pred_xstart(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)."""
        return self._spread(self.alphas_cumprod**-0.5, t, x_t) * x_t - self._spread((1 / self.alphas_cumprod - 1) ** 0.5, t, x_t) * eps

    def eps_from_xstart(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """The inverse of pred_xstart: eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)."""
        return (x_t - self._spread(self.alphas_cumprod**0.5, t, x_t) * x_start) * self._spread((1 - self.alphas_cumprod) ** -0.5, t, x_t)

    def target(self, x_start: Tensor, t: Tensor, noise: Tensor, prediction_type: str) -> Tensor:
        """What a network of this prediction type is trained to output: noise, v (Salimans & Ho 2022, app. D) or x_start."""
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return x_start
        if prediction_type == "v_prediction":
            return self.q_sample(noise, t, -x_start)
        raise ValueError(f"prediction_type is {prediction_type!r}, expected one of {PREDICTION_TYPES}")

    def to_eps(self, output: Tensor, x_t: Tensor, t: Tensor, prediction_type: str) -> Tensor:
        """The one place where a network's output becomes eps. For v = sqrt(abar) eps - sqrt(1-abar) x_0: eps = sqrt(abar) v + sqrt(1-abar) x_t."""
        if prediction_type == "epsilon":
            return output
        if prediction_type == "sample":
            return self.eps_from_xstart(x_t, t, output)
        if prediction_type == "v_prediction":
            return self.q_sample(output, t, x_t)
        raise ValueError(f"prediction_type is {prediction_type!r}, expected one of {PREDICTION_TYPES}")
