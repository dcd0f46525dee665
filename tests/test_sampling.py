"""Samplers and rules of guidance against diffusers, guided-diffusion's outputs and closed forms; independence of samples from each other."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from dag.diffusion import Diffusion, Prediction, respace
from dag.sampling import RULES, VARIANCES, SampleRNG, guidance_strength, sample_ddim, sample_ddpm
from dag.weights import load_unet

DIFFUSION = Diffusion()
SHAPE = (3, 8, 8)
SAMPLERS = {
    "ddim": lambda *args, **options: sample_ddim(*args, eta=0.0, **options),
    "ddim_eta": lambda *args, **options: sample_ddim(*args, eta=0.7, **options),
    **{f"ddpm_{v}": lambda *args, v=v, **options: sample_ddpm(*args, variance=v, **options) for v in VARIANCES},
}
EVERY = list(itertools.product(SAMPLERS, RULES))


class ConvPredictor:
    """A small random network in float64 whose guidance is a loss on its features, computed with one gradient."""

    def __init__(self, weight: float | None = None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(3, 8, 3, padding=1).double(), nn.Conv2d(8, 6, 3, padding=1).double()
        self.weight = weight

    def __call__(self, x_t, t, rng):
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            feature = torch.tanh(self.first(x))
            loss = (feature - 0.3).square().flatten(1).mean(1)
            (grad,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
        eps, share = self.last(feature).detach().chunk(2, dim=1)
        if self.weight is None:
            return Prediction(x_t * 0.9 + eps, share.tanh())
        rng.randn("prior", SHAPE)  # guidance of one's own draws from a stream of its own
        return Prediction(x_t * 0.9 + eps, share.tanh(), self.weight * grad, {"dc": loss.detach()})


class Replay:
    """Noise given from outside, in place of SampleRNG."""

    def __init__(self, noises, seeds=(0, 1)):
        self.noises, self.seeds = iter(noises), seeds

    def randn(self, stream, shape):
        return next(self.noises)


def run(sampler, predict, seeds, *, rule="mean", steps=8, **options):
    rng = SampleRNG(seeds)
    x = rng.randn("init", SHAPE).double()
    return SAMPLERS[sampler](predict, x, respace(1000, steps, "ddpm"), DIFFUSION, rule=rule, rng=rng, **options)


def test_public_signatures():
    assert list(inspect.signature(sample_ddim).parameters) == ["predict", "x", "timesteps", "diffusion", "eta", "rule", "rng", "clip", "callback"]
    assert list(inspect.signature(sample_ddpm).parameters) == ["predict", "x", "timesteps", "diffusion", "rule", "variance", "rng", "clip", "callback"]


# ---- random numbers


def test_a_samples_numbers_depend_on_its_seed_and_stream_alone():
    seeds = [7, 3, 4_000_000_000]
    batch, alone = SampleRNG(seeds), SampleRNG([3])
    batch.randn("prior", (5,))
    first = batch.randn("init", SHAPE)
    assert first.shape == (3, *SHAPE)
    assert torch.equal(first[1:2], alone.randn("init", SHAPE))
    assert torch.equal(batch.randn("init", SHAPE)[1:2], alone.randn("init", SHAPE))
    assert not torch.equal(first, SampleRNG(seeds).randn("step", SHAPE))
    integers = batch.randint("tau", 100, 300)
    assert torch.equal(integers[1:2], alone.randint("tau", 100, 300))
    assert integers.dtype == torch.int64
    assert ((integers >= 100) & (integers < 300)).all()


def test_streams_are_stable_across_versions():
    """Published samples are named by their seeds: the way from seed to numbers must never change."""
    expected = torch.randn(4, generator=torch.Generator().manual_seed((5 * 0x9E3779B1 + 1709297416) % 2**32))
    assert torch.equal(SampleRNG([5]).randn("init", (4,))[0], expected)


def test_numbers_are_standard_normal_and_unrelated_between_seeds_and_streams():
    rng = SampleRNG(range(64))
    init, step = rng.randn("init", (1024,)), rng.randn("step", (1024,))
    both = torch.cat([init, step]).double()
    assert abs(float(both.mean())) < 0.02
    assert float(both.std()) == pytest.approx(1, abs=0.02)
    correlation = both @ both.T / 1024 - torch.eye(128)
    assert float(correlation.fill_diagonal_(0).abs().max()) < 5.5 / 1024**0.5


def test_seeds_never_share_a_generator():
    rng = SampleRNG(range(4000))
    starts = {g.initial_seed() for stream in ("init", "step", "prior") for g in rng._generators(stream)}
    assert len(starts) == 12_000
    assert max(starts) < 2**32


@pytest.mark.parametrize("seeds", [[], [-1], [2**32]])
def test_bad_seeds_are_refused(seeds):
    with pytest.raises(ValueError, match="seeds are"):
        SampleRNG(seeds)


# ---- against diffusers


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clip", [True, False, "pred_xstart"])
def test_ddim_equals_diffusers_step_by_step(eta, clip):
    scheduler = DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=bool(clip), set_alpha_to_one=True, timestep_spacing="leading")
    scheduler.set_timesteps(20)
    noises, predict = list(torch.randn(20, 2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))), ConvPredictor()
    steps, x = [], torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sample_ddim(predict, x, respace(1000, 20), DIFFUSION, eta=eta, rng=Replay(noises), clip=clip, callback=steps.append)
    assert [int(s.t[0]) for s in steps] == scheduler.timesteps.tolist()
    for step, noise in zip(steps, noises, strict=True):
        # use_clipped_model_output: eps follows the clipped pred_xstart, as guided-diffusion has it too.
        noise = noise if step.index else torch.zeros_like(noise)
        expected = scheduler.step(step.prediction.eps, int(step.t[0]), step.x_t, eta, use_clipped_model_output=clip is True, variance_noise=noise)
        torch.testing.assert_close(step.x_prev, expected.prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(step.pred_xstart, expected.pred_original_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("clip", [True, False])
def test_ddpm_equals_diffusers_step_by_step(variance, clip):
    name = {"learned": "learned_range"}.get(variance, variance)
    scheduler = DDPMScheduler(1000, 1e-4, 0.02, "linear", variance_type=name, clip_sample=clip)
    timesteps = respace(1000, 20, "ddpm")
    scheduler.set_timesteps(timesteps=timesteps[::-1].tolist())

    def noise(index):
        return torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(index))

    steps, predict = [], ConvPredictor()
    sample_ddpm(predict, noise(99), timesteps, DIFFUSION, variance=variance, rng=Replay(map(noise, range(19, 0, -1))), clip=clip, callback=steps.append)
    for step in steps:
        output = torch.cat([step.prediction.eps, step.prediction.log_variance], 1) if variance == "learned" else step.prediction.eps
        expected = scheduler.step(output, int(step.t[0]), step.x_t, generator=torch.Generator().manual_seed(step.index))
        torch.testing.assert_close(step.x_prev, expected.prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(step.pred_xstart, expected.pred_original_sample, rtol=1e-4, atol=1e-4)
    assert steps[-1].index == 0


def test_ddim_with_eta_one_is_ddpm_with_the_posterior_variance():
    for rule, weight in ((rule, weight) for rule in ("mean", "mean_variance") for weight in (None, 3.0)):
        found = run("ddim_eta", ConvPredictor(weight), [1, 2], rule=rule)
        rng = SampleRNG([1, 2])
        x, timesteps = rng.randn("init", SHAPE).double(), respace(1000, 8, "ddpm")
        ddim = sample_ddim(ConvPredictor(weight), x, timesteps, DIFFUSION, eta=1.0, rule=rule, rng=rng)
        torch.testing.assert_close(ddim, run("ddpm_fixed_small", ConvPredictor(weight), [1, 2], rule=rule), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(ddim, found)


# ---- against guided-diffusion


@pytest.fixture(scope="module")
def io(fixtures):
    stored = np.load(fixtures / "adm_tiny_io.npz")
    return {name: torch.from_numpy(stored[name]) for name in stored.files}


def first_step(io, row, *, rule="mean", clip=True, guided=False, timesteps=None):
    """The DDPM step from x[row] at t[row] to the timestep before it, with the stored network output in place of the network."""
    eps, share = io["model_output"][row : row + 1].chunk(2, 1)
    # The stored gradient is that of log p(y | x), which guidance climbs; ours is a loss, which it descends.
    grad = -io["guide_grad"][row : row + 1] if guided else None
    steps, timesteps = [], timesteps or [int(io["t"][row]) - 1, int(io["t"][row])]
    rng = Replay(itertools.repeat(torch.zeros(1, 3, 32, 32)), seeds=(0,))
    predict = lambda x_t, t, rng: Prediction(eps, share, grad)  # noqa: E731
    options = {"rule": rule, "variance": "learned", "rng": rng, "clip": clip, "callback": steps.append}
    sample_ddpm(predict, io["x"][row : row + 1], timesteps, DIFFUSION, **options)
    return steps[0]


@pytest.mark.parametrize("row", [0, 1])
def test_ddpm_step_equals_guided_diffusion(io, row):
    plain = first_step(io, row)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(plain.x_prev[0], io["p_mean"][row], **close)
    torch.testing.assert_close(plain.pred_xstart[0], io["p_pred_xstart"][row], **close)
    torch.testing.assert_close(2 * plain.std.log()[0], io["p_log_variance"][row], **close)
    torch.testing.assert_close(first_step(io, row, clip=False).x_prev[0], io["p_mean_unclipped"][row], **close)
    torch.testing.assert_close(first_step(io, row, rule="mean_variance", guided=True).x_prev[0], io["condition_mean"][row], **close)
    torch.testing.assert_close(first_step(io, row, rule="score", guided=True).x_prev[0], io["condition_score_mean"][row], **close)
    # A chain of one step ends in the guided pred_xstart itself.
    alone = first_step(io, row, rule="score", guided=True, timesteps=[int(io["t"][row])])
    torch.testing.assert_close(alone.x_prev[0], io["condition_score_pred_xstart"][row], **close)


@pytest.fixture(scope="module")
def unet(fixtures):
    return load_unet(fixtures / "adm_tiny.pt")[0].eval()


def adm(unet, pull=0.0):
    def predict(x_t, t, rng):
        eps, share = unet(x_t, t).sample.chunk(2, 1)
        return Prediction(eps, share, pull * x_t if pull else None)

    return predict


@pytest.mark.parametrize(("key", "pull"), [("ddim25_eta0", 0.0), ("ddim25_eta0_cond_minus_0p05x", 0.05)])
def test_ddim_trajectory_equals_guided_diffusion(io, unet, key, pull):
    found = sample_ddim(adm(unet, pull), io["x"], respace(1000, 25), DIFFUSION, rule="score", rng=SampleRNG([0, 1]))
    torch.testing.assert_close(found, io[key], rtol=1e-3, atol=1e-3)


def test_respaced_ddpm_step_equals_guided_diffusion(io, unet):
    steps, timesteps = [], respace(1000, 25, "ddpm")
    rng = Replay(itertools.repeat(torch.zeros(2, 3, 32, 32)))
    # A step knows its own abar and the one before it: index 12 of the whole chain is index 1 of the chain of these two.
    sample_ddpm(adm(unet), io["x"], timesteps[11:13], DIFFUSION, variance="learned", rng=rng, callback=steps.append)
    torch.testing.assert_close(steps[0].x_prev, io["ddpm25_index12_mean"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(2 * steps[0].std.log(), io["ddpm25_index12_log_variance"], rtol=1e-4, atol=1e-4)


# ---- guidance


@pytest.mark.parametrize(("sampler", "rule"), EVERY)
def test_zero_gradient_changes_no_bit_and_a_gradient_does(sampler, rule):
    seeds = [1, 2]
    plain = run(sampler, ConvPredictor(None), seeds, rule=rule)
    assert torch.equal(run(sampler, ConvPredictor(0.0), seeds, rule=rule), plain)
    assert not torch.allclose(run(sampler, ConvPredictor(5.0), seeds, rule=rule), plain)


@pytest.mark.parametrize(("sampler", "rule"), EVERY)
def test_guidance_descends_its_loss(sampler, rule):
    losses = {}
    for weight in (0.0, 20.0):
        steps = []
        run(sampler, ConvPredictor(weight), [1, 2, 3], rule=rule, steps=20, clip=False, callback=steps.append)
        losses[weight] = float(steps[-1].prediction.losses["dc"].mean())
    assert losses[20.0] < losses[0.0]


@pytest.mark.parametrize("sampler", ["ddim_eta", "ddpm_learned"])
def test_guidance_leaves_the_samplers_noise_alone(sampler):
    """With eps = 0 unclipped, x_0 is linear in the noise and guidance adds a constant: the same one whatever the seed."""

    def predict(weight):
        def constant(x_t, t, rng):
            rng.randn("prior", SHAPE)
            zeros = torch.zeros_like(x_t)
            return Prediction(zeros, zeros) if weight is None else Prediction(zeros, zeros, zeros + weight)

        return constant

    moved = run(sampler, predict(0.1), [1, 2, 3], clip=False) - run(sampler, predict(None), [1, 2, 3], clip=False)
    torch.testing.assert_close(moved, moved.mean().expand_as(moved), rtol=1e-9, atol=1e-9)
    assert float(moved.abs().min()) > 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rules_differ_by_a_factor_of_the_gradient(sampler):
    """Every rule takes a factor times the gradient from the mean: 1, Sigma, and for DDPM's score rule beta / sqrt(1 - beta)."""
    chain = DIFFUSION.respaced(respace(1000, 8, "ddpm"))
    expected = {"mean": np.ones(8), "mean_variance": chain.betas if sampler == "ddpm_fixed_large" else chain.posterior_variance}
    if sampler.startswith("ddpm"):
        expected["score"] = chain.betas / (1 - chain.betas) ** 0.5
    for rule, factors in expected.items():
        steps = []
        run(sampler, ConvPredictor(2.0), [4], rule=rule, callback=steps.append)
        for step in steps:
            factor = step.std**2 if rule == "mean_variance" and sampler == "ddpm_learned" else factors[step.index]
            torch.testing.assert_close(step.shift, factor * step.prediction.grad, rtol=1e-9, atol=1e-300)


def test_without_noise_the_posterior_variance_pushes_twice_as_hard_as_the_score():
    steps = {rule: [] for rule in ("score", "mean_variance")}
    for rule, seen in steps.items():
        zeros = lambda x_t, t, rng: Prediction(torch.zeros_like(x_t), grad=torch.ones_like(x_t))  # noqa: E731
        x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        sample_ddim(zeros, x, np.arange(1000), DIFFUSION, rule=rule, rng=SampleRNG([0]), callback=seen.append)
    ratio = [float(b.shift / a.shift) for a, b in zip(steps["score"], steps["mean_variance"], strict=True)]
    assert ratio[200:800] == pytest.approx([2.0] * 600, rel=0.02)


# ---- a Gaussian world in which the guided posterior is known

SPREAD, NOISE, OBSERVED = 0.6, 0.8, 1.3  # x_0 ~ N(0, SPREAD^2); y = x_0 + N(0, NOISE^2) was observed
POSTERIOR_VARIANCE = 1 / (SPREAD**-2 + NOISE**-2)
POSTERIOR_MEAN = POSTERIOR_VARIANCE * OBSERVED / NOISE**2


def gaussian_world(x_t, t, rng):
    """The exact eps, and L = -log p(y | x_t), where x_0 | x_t ~ N(m x_t, v) and y | x_t ~ N(m x_t, v + NOISE^2)."""
    abar = DIFFUSION.abar(t, x_t)
    total = abar * SPREAD**2 + 1 - abar
    m, v = abar.sqrt() * SPREAD**2 / total, SPREAD**2 * (1 - abar) / total
    miss = OBSERVED - m * x_t
    loss = (miss.square() / (2 * (v + NOISE**2))).flatten(1).sum(1)
    return Prediction((1 - abar).sqrt() * x_t / total, grad=-m * miss / (v + NOISE**2), losses={"observation": loss})


def test_ddim_score_rule_reaches_the_known_posterior():
    """DDIM is affine here, x_0 = a x_T + b, so two starting points give the whole law N(b, a^2) without drawing a sample."""
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    low, high = sample_ddim(gaussian_world, x, np.arange(1000), DIFFUSION, rule="score", rng=SampleRNG([0, 1]), clip=False).flatten().tolist()
    assert low == pytest.approx(POSTERIOR_MEAN, rel=0.01)
    assert (high - low) ** 2 == pytest.approx(POSTERIOR_VARIANCE, rel=0.02)


@pytest.mark.parametrize(("rule", "variance"), [("score", "fixed_small"), ("score", "fixed_large"), ("mean_variance", "fixed_small")])
def test_ddpm_reaches_the_known_posterior(rule, variance):
    rng = SampleRNG([0])
    x = rng.randn("init", (1, 100, 100))
    found = sample_ddpm(gaussian_world, x, np.arange(1000), DIFFUSION, rule=rule, variance=variance, rng=rng, clip=False)
    # 10,000 draws: one standard error is 0.005 for the mean and 1.4 % for the variance.
    assert float(found.mean()) == pytest.approx(POSTERIOR_MEAN, abs=0.02)
    assert float(found.var()) == pytest.approx(POSTERIOR_VARIANCE, rel=0.06)


def test_mean_rule_is_mean_variance_once_sigma_is_in_the_weight():
    timesteps = respace(1000, 25)
    chain = DIFFUSION.respaced(timesteps)

    def weighted(x_t, t, rng):
        prediction = gaussian_world(x_t, t, rng)
        return Prediction(prediction.eps, grad=prediction.grad * float(chain.posterior_variance[int(t[0]) // 40]))

    x = SampleRNG([0]).randn("init", (1, 10, 10)).double()
    by_mean = sample_ddpm(weighted, x, timesteps, DIFFUSION, rule="mean", rng=SampleRNG([0]), clip=False)
    by_variance = sample_ddpm(gaussian_world, x, timesteps, DIFFUSION, rule="mean_variance", rng=SampleRNG([0]), clip=False)
    torch.testing.assert_close(by_mean, by_variance, rtol=1e-9, atol=1e-9)


# ---- independence


@pytest.mark.parametrize(("sampler", "rule"), EVERY)
def test_alone_equals_batched_and_a_shard_of_eight_equals_eight_of_one(sampler, rule):
    together = run(sampler, ConvPredictor(2.0), range(8), rule=rule, steps=4)
    for seed in range(8):
        assert torch.equal(run(sampler, ConvPredictor(2.0), [seed], rule=rule, steps=4)[0], together[seed])


def test_float32_and_repeated_runs():
    rng = SampleRNG([1, 2])
    x, timesteps = rng.randn("init", SHAPE), respace(1000, 8)
    predict = lambda x_t, t, rng: Prediction(0.9 * x_t)  # noqa: E731
    first = sample_ddim(predict, x, timesteps, DIFFUSION, eta=1.0, rng=SampleRNG([1, 2]))
    assert first.dtype == torch.float32
    assert torch.equal(first, sample_ddim(predict, x, timesteps.tolist(), DIFFUSION, eta=1.0, rng=SampleRNG([1, 2])))
    assert float(first.abs().max()) <= 1 + 1e-6


# ---- telemetry and errors


def test_guidance_strength_measures_what_the_rule_took():
    steps, chain = [], DIFFUSION.respaced(respace(1000, 5, "ddpm"))
    run("ddim", ConvPredictor(2.0), [1, 2], rule="score", steps=5, clip=False, callback=steps.append)
    for step in steps:
        strength = guidance_strength(step)
        abar = DIFFUSION.alphas_cumprod[int(step.t[0])]
        norm = lambda x: x.flatten(1).norm(dim=1)  # noqa: E731
        expected = (1 - abar) ** 0.5 * norm(step.prediction.grad) / norm(step.prediction.eps)
        torch.testing.assert_close(strength["shift_over_eps"].double(), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(strength["grad_rms"].double(), norm(step.prediction.grad) / 192**0.5, rtol=1e-5, atol=0)
        std = np.exp(chain.posterior_log_variance[step.index] / 2)  # clipped: that of the last step is not 0
        torch.testing.assert_close(strength["shift_over_std"].double(), norm(step.shift) / std / 192**0.5, rtol=1e-5, atol=0)
        assert strength["shift_over_std"].isfinite().all()
    run("ddpm_learned", ConvPredictor(None), [1, 2], callback=lambda step: steps.append(guidance_strength(step)))
    assert all(float(v.abs().max()) == 0 for v in steps[-1].values())


@pytest.mark.parametrize("term", ["eps", "log_variance", "grad", "loss dc"])
def test_what_is_not_finite_is_named(term):
    def predict(x_t, t, rng):
        prediction = ConvPredictor(1.0)(x_t, t, rng)
        if int(t[0]) == 428:
            broken = prediction.losses["dc"] if term == "loss dc" else getattr(prediction, term)
            broken[1] = float("nan")
        return prediction

    with pytest.raises(FloatingPointError, match=f"{term} is not finite at t = 428 for seed 22$"):
        run("ddpm_learned", predict, [11, 22, 33])


def test_a_step_that_overflows_and_a_bad_start_are_named():
    def predict(x_t, t, rng):
        # Finite itself, but its weight 1 / sqrt(abar_t) carries the prediction of x_0 over the top.
        return Prediction(torch.full_like(x_t, 1.7e308 if int(t[0]) == 428 else 0.0))

    with pytest.raises(FloatingPointError, match="x_prev is not finite at t = 428 for seed 11, 22"):
        run("ddim", predict, [11, 22], clip=False)
    x = torch.tensor([0.0, float("inf")]).reshape(2, 1, 1, 1)
    with pytest.raises(FloatingPointError, match="x_t is not finite at t = 960 for seed 6"):
        sample_ddim(predict, x, respace(1000, 25), DIFFUSION, rng=SampleRNG([5, 6]))


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (sample_ddim, {"rule": "sum"}, "rule is 'sum'.*'mean'"),
        (sample_ddpm, {"rule": "sum"}, "rule is 'sum'.*'score'"),
        (sample_ddpm, {"variance": "large"}, "variance is 'large'.*fixed_large"),
        (sample_ddpm, {"variance": "learned"}, "has no log_variance"),
        (sample_ddim, {"clip": "eps"}, "clip is .eps.*pred_xstart"),
        (sample_ddpm, {"clip": "pred_xstart"}, "clip is 'pred_xstart', expected True or False"),
        (sample_ddim, {"eta": 1.5}, "eta is 1.5.*0 to 1"),
        (sample_ddim, {"eta": float("nan")}, "eta is nan"),
        (sample_ddim, {"timesteps": [40, 0]}, "ascending"),
        (sample_ddim, {"rng": SampleRNG([1])}, "2 samples.*1 seeds"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(sampler, options, message):
    options = {"timesteps": [0, 40], "diffusion": DIFFUSION, "rng": SampleRNG([1, 2]), **options}
    with pytest.raises(ValueError, match=message) as caught:
        sampler(lambda x_t, t, rng: Prediction(x_t), torch.zeros(2, *SHAPE), **options)
    assert "\n" not in str(caught.value)
