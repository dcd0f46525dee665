"""DDIM and DDPM sampling as functions over a `predict` callable, the three rules of guidance, and per-sample random numbers.

Sources: DDPM (Ho et al. 2020, arXiv 2006.11239), DDIM (Song et al. 2021, arXiv 2010.02502), learned variances and respacing
(Nichol & Dhariwal 2021, arXiv 2102.09672), guidance (Dhariwal & Nichol 2021, arXiv 2105.05233; DAG, arXiv 2212.08861).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dag.diffusion import Diffusion, Prediction

RULES = ("mean", "mean_variance", "score")
VARIANCES = ("fixed_small", "fixed_large", "learned")


class SampleRNG:
    """One random generator per seed and named stream, so that a sample's numbers depend on its seed alone.

    Batch size, sharding, batch-mates and draws from other streams change nothing. The samplers draw from "step"; "init" is meant
    for x_T and "prior" for the noise of the depth prior. Numbers are drawn on the CPU and moved to `device`, so they are the same
    for every accelerator. seeds: integers from 0 to 2**32 - 1, one per sample, in batch order; ValueError on others.
    """

    def __init__(self, seeds: Iterable[int], device: torch.device | str = "cpu"):
        self.seeds, self.device = tuple(int(seed) for seed in seeds), torch.device(device)
        if not self.seeds or min(self.seeds) < 0 or max(self.seeds) >= 2**32:
            raise ValueError(f"seeds are {list(self.seeds)[:8]}, expected at least one, each from 0 to {2**32 - 1}")
        self._streams: dict[str, list[torch.Generator]] = {}

    def randn(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Next standard normal numbers of each sample's stream: (b, *shape) float32."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self._generators(stream)]).to(self.device)

    def randint(self, stream: str, low: int, high: int) -> Tensor:
        """Next integer in [low, high) of each sample's stream: (b,) int64."""
        return torch.cat([torch.randint(low, high, (1,), generator=g) for g in self._generators(stream)]).to(self.device)

    def _generators(self, stream: str) -> list[torch.Generator]:
        if stream not in self._streams:
            # Torch's CPU generator looks at 32 bits of its seed, so hashing seed and stream together would make some pairs of a few
            # thousand samples collide. An odd multiplier permutes the 32-bit integers: within a stream no two seeds meet.
            offset = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=4).digest(), "big")
            self._streams[stream] = [torch.Generator().manual_seed((seed * 0x9E3779B1 + offset) % 2**32) for seed in self.seeds]
        return self._streams[stream]


@dataclass(frozen=True)
class Transition:
    """One unguided step of a chain: x_prev ~ N(from_start pred_xstart + from_current x_t, noise_std^2).

    noise_std is None where no noise is drawn. variance is the Sigma of the step (0 at the last step of "fixed_small" and DDIM), std its
    root, clipped there to the step before. Numbers, or (b, c, h, w) where the model learned its variance.
    """

    from_start: float
    from_current: float
    noise_std: float | Tensor | None
    variance: float | Tensor
    std: float | Tensor


@dataclass(frozen=True)
class Step:
    """What a sampler did in one step, as `callback` receives it.

    index: place in the respaced chain, len(timesteps) - 1 down to 0. t: (b,) its original timestep, as `predict` got it. x_t, x_prev,
    pred_xstart (the model's, after clipping and before guidance): (b, c, h, w). shift: what guidance took from the mean, the same
    shape, or None without a gradient. std: standard deviation of the step (see Transition). eps_per_shift: change of eps that moves
    the mean by -1. prediction: what `predict` returned.
    """

    index: int
    t: Tensor
    x_t: Tensor
    x_prev: Tensor
    pred_xstart: Tensor
    shift: Tensor | None
    std: float | Tensor
    eps_per_shift: float
    prediction: Prediction


Predict = Callable[[Tensor, Tensor, SampleRNG], Prediction]
Callback = Callable[[Step], None]


def guidance_factor(rule: str, chain: Diffusion, index: int, law: Transition) -> float | Tensor:
    """The factor k by which a rule of guidance weighs g = grad_x L: every step's mean becomes mean - k g.

    "mean" is DAG's own formula, mu - g: k = 1.
    "mean_variance" is classifier guidance: p(x_prev | y) ~ N(x_prev; mu, Sigma) exp(-L(x_prev)), and with L linear around mu,
    completing the square gives N(mu - Sigma g, Sigma): k = Sigma.
    "score" adds the two scores. As eps = -sqrt(1 - abar) grad log p(x_t), the score of p(x_t) exp(-L(x_t)) has
    eps' = eps + sqrt(1 - abar) g, hence pred_xstart' = pred_xstart - (1 - abar) / sqrt(abar) g. The mean of DDPM as of DDIM is
    from_start pred_xstart + from_current x_t, so k = from_start (1 - abar) / sqrt(abar).

    From one to the next: "mean" is "mean_variance" with Sigma left to the weight, so a constant weight pushes harder and harder,
    relative to the step's noise, as t falls. For DDPM from_start = beta sqrt(abar_prev) / (1 - abar), which makes the k of "score"
    beta / sqrt(1 - beta): "mean_variance" with Sigma = beta ("fixed_large") to first order in beta, and the same in the limit of fine
    steps. For DDIM with eta = 0 the k of "score" is half of that in the limit, because the probability-flow ODE follows half the score;
    "mean_variance" has no Sigma to take there but the posterior's, that of eta = 1, and so pushes twice as hard as "score".
    """
    if rule == "mean":
        return 1.0
    if rule == "mean_variance":
        return law.variance
    abar = float(chain.alphas_cumprod[index])
    return law.from_start * (1 - abar) / abar**0.5


@torch.no_grad()
def sample_ddim(
    predict: Predict,
    x: Tensor,
    timesteps: Sequence[int] | np.ndarray,
    diffusion: Diffusion,
    *,
    eta: float = 0.0,
    rule: str = "mean",
    rng: SampleRNG,
    clip: bool | str = True,
    callback: Callback | None = None,
) -> Tensor:
    """From noise x (b, c, h, w) to samples of the same shape by DDIM (eq. 12, 16) over `timesteps` (ascending, see respace).

    predict(x_t, t, rng) runs without gradient unless it enables it; t is (b,) of original timesteps. eta: 0 is deterministic, 1 has the
    posterior's noise. clip: pred_xstart to [-1, 1], eps follows, as in guided-diffusion; "pred_xstart": eps stays the network's, as in diffusers
    without its `use_clipped_model_output`. rule: see guidance_factor. Noise comes from rng's stream "step".
    Raises ValueError on bad arguments and FloatingPointError, naming seed, t and term, when anything is not finite.
    """
    if clip not in (True, False, "pred_xstart"):
        raise ValueError(f"clip is {clip!r}, expected True, False or 'pred_xstart'")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected a number from 0 to 1")
    chain = diffusion.respaced(timesteps)
    abar, abar_prev = chain.alphas_cumprod, chain.alphas_cumprod_prev
    sigma = eta * chain.posterior_variance**0.5
    # sqrt(abar_prev) pred_xstart + sqrt(1 - abar_prev - sigma^2) eps, with eps = (x_t - sqrt(abar) pred_xstart) / sqrt(1 - abar).
    # No less than 0: at the last step both sides of the difference are 0 up to rounding.
    from_current = (np.maximum(1 - abar_prev - sigma**2, 0) / (1 - abar)) ** 0.5
    from_start = abar_prev**0.5 - from_current * abar**0.5

    def transition(index: int, prediction: Prediction) -> Transition:
        variance, std = float(chain.posterior_variance[index]), math.exp(chain.posterior_log_variance[index] / 2)
        return Transition(float(from_start[index]), float(from_current[index]), float(sigma[index]) or None, variance, std)

    return _run(predict, x, np.asarray(timesteps), chain, transition, rule, rng, bool(clip), callback, keep_eps=clip == "pred_xstart")


@torch.no_grad()
def sample_ddpm(
    predict: Predict,
    x: Tensor,
    timesteps: Sequence[int] | np.ndarray,
    diffusion: Diffusion,
    *,
    rule: str = "mean",
    variance: str = "fixed_small",
    rng: SampleRNG,
    clip: bool = True,
    callback: Callback | None = None,
) -> Tensor:
    """From noise x (b, c, h, w) to samples of the same shape by DDPM (algorithm 2) over `timesteps` (ascending, see respace).

    variance: "fixed_small" (the posterior's), "fixed_large" (beta), or "learned" (between the two, where Prediction.log_variance says),
    all of the respaced chain. The other arguments, and what is raised, as in sample_ddim.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance is {variance!r}, expected one of {VARIANCES}")
    if clip not in (True, False):
        raise ValueError(f"clip is {clip!r}, expected True or False: DDPM has no eps to keep, 'pred_xstart' is DDIM's")
    chain = diffusion.respaced(timesteps)

    def transition(index: int, prediction: Prediction) -> Transition:
        sigma2, std = _variance(variance, chain, index, prediction)
        from_start, from_current = float(chain.posterior_from_start[index]), float(chain.posterior_from_current[index])
        return Transition(from_start, from_current, std if index else None, sigma2, std)

    return _run(predict, x, np.asarray(timesteps), chain, transition, rule, rng, clip, callback)


def guidance_strength(step: Step) -> dict[str, Tensor]:
    """How hard guidance pushed in a step, per sample (b,), root mean squares over a sample's pixels; 0 without a gradient.

    grad_rms: |w grad L|. shift_over_std: what the rule took from the mean, in standard deviations of the step. shift_over_eps: the change
    of eps that moves the mean as far (sqrt(1 - abar) |w grad L| under "score"), as a share of |eps|.
    """
    if step.shift is None:
        return {name: torch.zeros(len(step.x_t), device=step.x_t.device) for name in ("grad_rms", "shift_over_std", "shift_over_eps")}
    return {
        "grad_rms": _rms(step.prediction.grad),
        "shift_over_std": _rms(step.shift / step.std),
        "shift_over_eps": _rms(step.shift) * step.eps_per_shift / _rms(step.prediction.eps),
    }


def _rms(x: Tensor) -> Tensor:
    return x.float().square().flatten(1).mean(1).sqrt()


def _variance(kind: str, chain: Diffusion, index: int, prediction: Prediction) -> tuple[float | Tensor, float | Tensor]:
    """Sigma of a DDPM step and its root, which is clipped where Sigma is 0."""
    beta, small = float(chain.betas[index]), float(chain.posterior_log_variance[index])
    if kind == "fixed_small":
        return float(chain.posterior_variance[index]), math.exp(small / 2)
    if kind == "fixed_large":
        return beta, beta**0.5
    if prediction.log_variance is None:
        raise ValueError("variance is 'learned' but the prediction has no log_variance, expected 'fixed_small' or 'fixed_large' for this model")
    share = (prediction.log_variance + 1) / 2
    log_variance = share * math.log(beta) + (1 - share) * small
    return log_variance.exp(), (log_variance / 2).exp()


def _run(
    predict: Predict,
    x: Tensor,
    timesteps: np.ndarray,
    chain: Diffusion,
    transition: Callable[[int, Prediction], Transition],
    rule: str,
    rng: SampleRNG,
    clip: bool,
    callback: Callback | None,
    keep_eps: bool = False,
) -> Tensor:
    """The loop both samplers share; they differ in their transitions."""
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}, expected one of {RULES}")
    if len(rng.seeds) != len(x):
        raise ValueError(f"x holds {len(x)} samples but rng has {len(rng.seeds)} seeds, expected one seed per sample")
    _require_finite({"x_t": x}, int(timesteps[-1]), rng)
    for index in reversed(range(len(timesteps))):
        t = torch.full((len(x),), int(timesteps[index]), device=x.device)
        prediction = predict(x, t, rng)
        law = transition(index, prediction)
        pred_xstart = chain.pred_xstart(x, torch.full((len(x),), index), prediction.eps)
        unclipped = pred_xstart
        if clip:
            pred_xstart = unclipped.clamp(-1, 1)
        x_prev, shift = law.from_start * pred_xstart + law.from_current * x, None
        if keep_eps:
            # sqrt(1 - abar) eps = x_t - sqrt(abar) pred_xstart: what clipping pred_xstart took from the eps term is put back.
            x_prev = x_prev + law.from_current * float(chain.alphas_cumprod[index]) ** 0.5 * (pred_xstart - unclipped)
        if prediction.grad is not None:
            shift = guidance_factor(rule, chain, index, law) * prediction.grad
            x_prev = x_prev - shift
        if law.noise_std is not None:
            x_prev = x_prev + law.noise_std * rng.randn("step", x.shape[1:]).to(x)
        _require_finite({**_terms(prediction), "x_prev": x_prev}, int(timesteps[index]), rng)
        if callback is not None:
            abar = float(chain.alphas_cumprod[index])
            callback(Step(index, t, x, x_prev, pred_xstart, shift, law.std, (abar / (1 - abar)) ** 0.5 / law.from_start, prediction))
        x = x_prev
    return x


def _terms(prediction: Prediction) -> dict[str, Tensor | None]:
    """What a prediction is made of, in the order in which a bad value spreads."""
    losses = {f"loss {name}": loss for name, loss in prediction.losses.items()}
    return {"eps": prediction.eps, "log_variance": prediction.log_variance, **losses, "grad": prediction.grad}


def _require_finite(terms: dict[str, Tensor | None], t: int, rng: SampleRNG) -> None:
    given = {name: term for name, term in terms.items() if term is not None}
    # One question to the device per step; only a failure looks closer.
    if torch.stack([term.isfinite().all() for term in given.values()]).all():
        return
    for name, term in given.items():
        bad = ~term.isfinite().reshape(len(rng.seeds), -1).all(1)
        if bad.any():
            seeds = ", ".join(str(rng.seeds[k]) for k in bad.nonzero().flatten().tolist())
            raise FloatingPointError(f"{name} is not finite at t = {t} for seed {seeds}")
