"""Tables of the forward process against diffusers, closed forms and the outputs of guided-diffusion's own code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from dag.diffusion import PREDICTION_TYPES, SCHEDULES, Diffusion, respace


@pytest.fixture(scope="module")
def io(fixtures):
    return np.load(fixtures / "adm_tiny_io.npz")


@pytest.fixture
def draws():
    generator = torch.Generator().manual_seed(0)
    x_start, noise = torch.randn(2, 6, 3, 4, 4, generator=generator, dtype=torch.float64)
    return x_start, noise, torch.tensor([0, 1, 37, 500, 811, 999])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_and_noising_equal_diffusers(schedule, draws):
    x_start, noise, t = draws
    scheduler = DDPMScheduler(1000, 1e-4, 0.02, schedule)
    diffusion = Diffusion(1000, 1e-4, 0.02, schedule)
    np.testing.assert_allclose(diffusion.alphas_cumprod, scheduler.alphas_cumprod.numpy(), rtol=2e-5)
    torch.testing.assert_close(diffusion.q_sample(x_start, t, noise), scheduler.add_noise(x_start, noise, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(diffusion.target(x_start, t, noise, "v_prediction"), scheduler.get_velocity(x_start, noise, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_prediction_type_leads_back_to_the_noise(prediction_type, draws):
    x_start, noise, t = draws
    diffusion = Diffusion()
    x_t = diffusion.q_sample(x_start, t, noise)
    eps = diffusion.to_eps(diffusion.target(x_start, t, noise, prediction_type), x_t, t, prediction_type)
    torch.testing.assert_close(eps, noise, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(diffusion.pred_xstart(x_t, t, eps), x_start, rtol=1e-9, atol=1e-9)


def test_posterior_is_bayes_rule(draws):
    """N(x_t; sqrt(alpha) x, beta) N(x; sqrt(abar_prev) x_0, 1 - abar_prev), multiplied as Gaussians in x."""
    x_start, noise, t = draws
    x_start, noise, t = x_start[1:], noise[1:], t[1:]
    diffusion = Diffusion()
    x_t = diffusion.q_sample(x_start, t, noise)
    mean, variance, log_variance = diffusion.posterior(x_start, x_t, t)
    beta = torch.from_numpy(diffusion.betas)[t].reshape(-1, 1, 1, 1)
    abar_prev = torch.from_numpy(diffusion.alphas_cumprod)[t - 1].reshape(-1, 1, 1, 1)
    precision = (1 - beta) / beta + 1 / (1 - abar_prev)
    torch.testing.assert_close(variance, 1 / precision, rtol=1e-9, atol=0)
    torch.testing.assert_close(mean, ((1 - beta).sqrt() / beta * x_t + abar_prev.sqrt() / (1 - abar_prev) * x_start) / precision, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(log_variance.exp(), variance, rtol=1e-12, atol=0)


def test_posterior_at_zero_is_x_start_with_clipped_log_variance(draws):
    x_start, noise, _ = draws
    diffusion, t = Diffusion(), torch.zeros(6, dtype=torch.long)
    mean, variance, log_variance = diffusion.posterior(x_start, noise, t)
    torch.testing.assert_close(mean, x_start, rtol=1e-12, atol=1e-12)
    assert (variance == 0).all()
    torch.testing.assert_close(log_variance, diffusion.posterior(x_start, noise, t + 1)[2])


def test_posterior_equals_guided_diffusion(io):
    t = torch.from_numpy(io["t"])
    mean, _, _ = Diffusion().posterior(torch.from_numpy(io["p_pred_xstart"]), torch.from_numpy(io["x"]), t)
    torch.testing.assert_close(mean, torch.from_numpy(io["p_mean"]), rtol=1e-5, atol=1e-6)


def test_respaced_chain_keeps_abar_and_rebuilds_the_posterior(draws):
    diffusion, (x_start, x_t, _) = Diffusion(), draws
    whole = diffusion.respaced(np.arange(1000))
    np.testing.assert_allclose(whole.betas, diffusion.betas, rtol=1e-11)
    np.testing.assert_allclose(whole.posterior_variance, diffusion.posterior_variance, rtol=1e-10)
    timesteps = respace(1000, 25, "ddpm")
    chain = diffusion.respaced(timesteps)
    assert chain.num_timesteps == 25
    np.testing.assert_array_equal(chain.alphas_cumprod, diffusion.alphas_cumprod[timesteps])
    np.testing.assert_allclose(np.cumprod(1 - chain.betas), chain.alphas_cumprod, rtol=1e-12)
    # diffusers' DDIM variance at eta = 1 is the posterior variance of the step from t to prev.
    scheduler = DDIMScheduler(1000, 1e-4, 0.02, "linear")
    for i in (1, 12, 24):
        expected = scheduler._get_variance(int(timesteps[i]), int(timesteps[i - 1]))
        assert chain.posterior(x_start, x_t, torch.full((6,), i))[1].flatten().tolist() == pytest.approx([float(expected)] * 6, rel=1e-3)


def test_respace_equals_guided_diffusion(io):
    np.testing.assert_array_equal(respace(1000, 25, "ddim"), io["ddim25_timesteps"])
    np.testing.assert_array_equal(respace(1000, 25, "ddpm"), io["ddpm25_timesteps"])


@pytest.mark.parametrize("steps", [2, 5, 10, 20, 25, 50, 100, 250, 500, 1000])
def test_respace_equals_diffusers_where_they_agree(steps):
    leading = DDIMScheduler(1000, timestep_spacing="leading")
    leading.set_timesteps(steps)
    np.testing.assert_array_equal(respace(1000, steps, "ddim"), leading.timesteps.numpy()[::-1])
    linspace = DDPMScheduler(1000, timestep_spacing="linspace")
    linspace.set_timesteps(steps)
    # Ties such as 166.5 may round either way.
    assert np.abs(respace(1000, steps, "ddpm") - linspace.timesteps.numpy()[::-1]).max() <= 1


@pytest.mark.parametrize("total", [7, 50, 1000])
def test_respace_takes_exactly_the_asked_number_or_refuses(total):
    """The fractional stride added step by step, ties and rounding errors among it; the integer one by search: the smallest of 1..total-1 that fits."""
    for steps in range(1, total + 1):
        fractional, place = [], 0.0
        for _ in range(steps):
            fractional.append(round(place))
            place += (total - 1) / max(1, steps - 1)
        assert respace(total, steps, "ddpm").tolist() == fractional
        assert len(set(fractional)) == steps
        assert steps == 1 or fractional[-1] == total - 1
        stride = next((i for i in range(1, total) if len(range(0, total, i)) == steps), None)
        if stride is None:
            with pytest.raises(ValueError, match="no integer stride"):
                respace(total, steps, "ddim")
        else:
            np.testing.assert_array_equal(respace(total, steps, "ddim"), np.arange(0, total, stride))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: respace(1000, 25, "dpm"), "'dpm'.*'ddim' or 'ddpm'"),
        (lambda: respace(1000, 600), r"600.*\[500, 1000\]"),
        (lambda: respace(1000, 0, "ddpm"), "0.*1 to 1000"),
        (lambda: respace(1000, 1001, "ddpm"), "1001.*1 to 1000"),
        (lambda: Diffusion(beta_end=1.0), r"beta_end = 1\.0"),
        (lambda: Diffusion(num_timesteps=0), "num_timesteps = 0"),
        (lambda: Diffusion(schedule="cosine"), "'cosine'"),
        (lambda: Diffusion().respaced([]), "at least one integer"),
        (lambda: Diffusion().respaced([0.5, 3.0]), "integer"),
        (lambda: Diffusion().respaced([40, 0]), "ascending"),
        (lambda: Diffusion().respaced([0, 0, 5]), "ascending"),
        (lambda: Diffusion().respaced([0, 1000]), "to 999"),
        (lambda: Diffusion().respaced([-40, 0]), "from -40 to 0, expected .* from 0 to 999"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
