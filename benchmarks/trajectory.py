"""CPU time of a guided trajectory, part by part: the parts' forward passes are timed by wrapping them, the one gradient's by its passing of their borders."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from dag.diffusion import Diffusion, respace
from dag.guidance import DepthGuidance
from dag.sampling import SampleRNG, sample_ddim

PARTS = ("U-Net, forward", "U-Net, gradient", "heads, forward", "heads, gradient", "prior, forward", "prior, gradient")


@dataclass
class Profile:
    """CPU seconds of every part and of the whole."""

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    total: float = 0.0

    @property
    def rest(self) -> float:
        return self.total - sum(self.parts.values())


class Stopwatch:
    """Adds up CPU time between borders. The gradient runs backwards through prior, heads and U-Net, one after the other on one thread,
    because autograd takes what was computed last first; so a hook on the tensor at a border tells when it leaves one part for the next."""

    def __init__(self, profile: Profile):
        self.profile, self.since = profile, 0.0

    def forward(self, part: str, function: Callable, *inputs, **options):
        start = time.process_time()
        result = function(*inputs, **options)
        self.profile.parts[f"{part}, forward"] += time.process_time() - start
        return result

    def enters(self, border: Tensor) -> None:
        """The gradient comes from what is not timed."""
        border.register_hook(lambda _: self._enter())

    def leaves(self, border: Tensor, part: str) -> None:
        """The gradient leaves a part, for the next one or for what is not timed."""
        border.register_hook(lambda _: self._leave(part))

    def _enter(self) -> None:
        self.since = time.process_time()

    def _leave(self, part: str) -> None:
        now = time.process_time()
        self.profile.parts[f"{part}, gradient"] += now - self.since
        self.since = now


class TimedPredictor:
    def __init__(self, predictor, watch: Stopwatch):
        self.predictor, self.watch = predictor, watch

    def taps(self, x_t: Tensor, t: Tensor, blocks: Iterable[int], with_grad: bool):
        self.watch.leaves(x_t, "U-Net")
        prediction, features = self.watch.forward("U-Net", self.predictor.taps, x_t, t, blocks, with_grad=with_grad)
        self.watch.leaves(features[max(features)], "heads")
        return prediction, features


class TimedHead:
    def __init__(self, head, watch: Stopwatch):
        self.head, self.blocks, self.watch = head, head.blocks, watch

    def __call__(self, features: dict[int, Tensor], t: Tensor, size: int) -> Tensor:
        return self.watch.forward("heads", self.head, features, t, size)


class TimedPrior:
    def __init__(self, prior: Callable, watch: Stopwatch):
        self.prior, self.watch = prior, watch

    def __call__(self, d_tau: Tensor, tau: Tensor) -> Tensor:
        self.watch.leaves(d_tau, "prior")
        eps = self.watch.forward("prior", self.prior, d_tau, tau)
        self.watch.enters(eps)
        return eps


def profile_trajectory(guided: DepthGuidance, diffusion: Diffusion, size: int, samples: int, batch: int, steps: int) -> Profile:
    """Sample `samples` images by `steps` guided steps of DDIM, in batches. `guided` has the terms of the paper; its parts stay wrapped."""
    profile = Profile()
    watch = Stopwatch(profile)
    guided.predictor = TimedPredictor(guided.predictor, watch)
    guided.heads = {name: TimedHead(head, watch) for name, head in guided.heads.items()}
    prior = next(term for term in guided.terms if term.name == "dp")
    prior.prior = TimedPrior(prior.prior, watch)
    start = time.process_time()
    for first in range(0, samples, batch):
        rng = SampleRNG(range(first, min(first + batch, samples)))
        x = rng.randn("init", (3, size, size))
        sample_ddim(guided, x, respace(diffusion.num_timesteps, steps), diffusion, rule="score", rng=rng)
    profile.total = time.process_time() - start
    return profile
