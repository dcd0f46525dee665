"""The forward process and its tables, in float64: betas, q_sample, pred_xstart, the posterior, respaced timesteps.

Notation of DDPM (Ho et al. 2020, arXiv 2006.11239): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass
class Prediction:
    """What a predictor says about x_t: one type for the plain U-Net and for every guidance.

    eps: (b, c, h, w) predicted noise. log_variance: the same shape where the model learned its variance, else None; it is the
    network's own output in [-1, 1], a place between the log-variance of the posterior and log beta (Nichol & Dhariwal 2021,
    eq. 15), because both ends depend on the respaced chain, which only the sampler knows. grad: gradient of the weighted
    guidance losses with respect to x_t (w already in it), or None. losses: per sample telemetry, each (b,).
    """

    eps: Tensor
    log_variance: Tensor | None = None
    grad: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)


class Diffusion:
    """Tables of a discrete-time diffusion process with T = num_timesteps steps.

    schedule: "linear" (betas evenly spaced, DDPM), "scaled_linear" (their square roots evenly spaced) or "squaredcos_cap_v2" (abar a squared
    cosine, whatever beta_start and beta_end are; Nichol & Dhariwal 2021, eq. 17). Raises ValueError on others
    and on betas outside (0, 1). Tables, float64 (T,): betas, alphas_cumprod, alphas_cumprod_prev (1 before the first),
    posterior_variance, posterior_log_variance (clipped), and the posterior mean's coefficients posterior_from_start, posterior_from_current.
    """

    def __init__(self, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, schedule: str = "linear"):
        if num_timesteps < 1 or not 0 < beta_start <= beta_end < 1:
            found = f"num_timesteps = {num_timesteps}, beta_start = {beta_start}, beta_end = {beta_end}"
            raise ValueError(f"diffusion has {found}, expected at least 1 timestep and 0 < beta_start <= beta_end < 1")
        if schedule == "linear":
            betas = np.linspace(beta_start, beta_end, num_timesteps, dtype=np.float64)
        elif schedule == "scaled_linear":
            betas = np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=np.float64) ** 2
        elif schedule == "squaredcos_cap_v2":
            abar = np.cos((np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
        else:
            raise ValueError(f"schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}")
        self.schedule, self.beta_start, self.beta_end = schedule, beta_start, beta_end
        self._tabulate(betas, np.cumprod(1 - betas))

    def _tabulate(self, betas: np.ndarray, alphas_cumprod: np.ndarray) -> None:
        self.num_timesteps, self.betas, self.alphas_cumprod = len(betas), betas, alphas_cumprod
        self.alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - alphas_cumprod)
        # The first variance is 0 and has no logarithm: it takes the second's, or beta in a chain of one step.
        clipped = self.posterior_variance.copy()
        clipped[0] = clipped[1] if len(clipped) > 1 else betas[0]
        self.posterior_log_variance = np.log(clipped)
        self.posterior_from_start = betas * self.alphas_cumprod_prev**0.5 / (1 - alphas_cumprod)
        self.posterior_from_current = (1 - self.alphas_cumprod_prev) * (1 - betas) ** 0.5 / (1 - alphas_cumprod)

    def respaced(self, timesteps: Sequence[int] | np.ndarray) -> Diffusion:
        """The shorter chain that visits only `timesteps` (ascending original indices): its index i stands for timesteps[i].

        abar stays as it is at those timesteps, so beta_i = 1 - abar_i / abar_{i-1} (Nichol & Dhariwal 2021, sec. 4), and posteriors follow.
        Raises ValueError unless timesteps are integers, strictly ascending, within [0, num_timesteps).
        """
        steps = np.asarray(timesteps)
        if steps.ndim != 1 or not len(steps) or steps.dtype.kind not in "iu":
            raise ValueError(f"timesteps are {steps.dtype} of shape {steps.shape}, expected a list of at least one integer")
        if steps[0] < 0 or steps[-1] >= self.num_timesteps or (np.diff(steps.astype(np.int64)) <= 0).any():
            raise ValueError(f"timesteps run from {steps[0]} to {steps[-1]}, expected strictly ascending integers from 0 to {self.num_timesteps - 1}")
        chain, abar = copy(self), self.alphas_cumprod[steps]
        chain._tabulate(1 - abar / np.append(1.0, abar[:-1]), abar)
        chain.schedule, chain.beta_start, chain.beta_end = "respaced", float(chain.betas[0]), float(chain.betas[-1])
        return chain

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

    def posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q(x_{t-1} | x_t, x_0) = N(mean, variance), DDPM eq. 6 and 7: mean (b, ...), variance and log_variance (b, 1, ...).

        At t = 0 the variance is 0, and log_variance is clipped to the value of t = 1.
        """
        mean = self._spread(self.posterior_from_start, t, x_t) * x_start + self._spread(self.posterior_from_current, t, x_t) * x_t
        return mean, self._spread(self.posterior_variance, t, x_t), self._spread(self.posterior_log_variance, t, x_t)

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


def respace(num_timesteps: int, steps: int, kind: str = "ddim") -> np.ndarray:
    """Which `steps` of `num_timesteps` a shorter chain visits: ascending int64 original timesteps, chosen as guided-diffusion chooses them.

    "ddim": an integer stride from 0, the smallest that takes exactly `steps` (its `ddimN`; at 25 of 1000: 0, 40, ..., 960).
    "ddpm": a fractional stride from 0 to the last, rounded (its plain `N`; at 25 of 1000: 0, 42, 83, ..., 999).
    Raises ValueError on another kind, on steps outside 1..num_timesteps, and for "ddim" where no integer stride takes exactly `steps`.
    """
    if kind not in ("ddim", "ddpm"):
        raise ValueError(f"kind of respacing is {kind!r}, expected 'ddim' or 'ddpm'")
    if steps != int(steps) or not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps is {steps}, expected an integer from 1 to {num_timesteps}")
    if kind == "ddpm":
        stride = (num_timesteps - 1) / max(1, steps - 1)
        # Added up, not multiplied: the rounding errors of the sum decide the ties, and published step lists have them.
        return np.round(np.cumsum(np.append(0.0, np.full(int(steps) - 1, stride)))).astype(np.int64)
    stride = -(-num_timesteps // int(steps))
    taken = np.arange(0, num_timesteps, stride)
    if len(taken) != steps or (steps == 1 and num_timesteps > 1):
        nearest = sorted({max(2, len(taken)), len(range(0, num_timesteps, max(1, stride - 1)))})
        raise ValueError(f"steps is {steps}, which no integer stride over {num_timesteps} timesteps takes; nearest allowed: {nearest}")
    return taken
