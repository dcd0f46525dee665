"""Depth-aware guidance against the naive step, finite differences and gradients known in closed form; what it must leave alone."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DModel
from naive import NaiveGuidance, NaiveHead, naive_eps

from dag.diffusion import Diffusion, Prediction, respace
from dag.guidance import Consistency, DepthGuidance, Prior, UNetPredictor, depth_consistency, depth_prior
from dag.heads import build_heads
from dag.sampling import RULES, SampleRNG, sample_ddim, sample_ddpm
from dag.unet import decoder_blocks

DIFFUSION = Diffusion()
SIZE, SHAPE = 16, (3, 16, 16)
BLOCKS = {"strong": [0, 1, 2], "weak": [1]}
SAMPLERS = {
    "ddim": sample_ddim,
    "ddim_eta": lambda *args, **options: sample_ddim(*args, eta=0.7, **options),
    "ddpm": sample_ddpm,
}


def make_unet(channels: int = 3, out_channels: int | None = None, seed: int = 0) -> UNet2DModel:
    torch.manual_seed(seed)
    unet = UNet2DModel(
        in_channels=channels,
        out_channels=out_channels or channels,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
    )
    return unet.eval().requires_grad_(False)


def make_heads(unet: UNet2DModel) -> torch.nn.ModuleDict:
    torch.manual_seed(2)
    heads = build_heads(BLOCKS, {b.index: b.channels for b in decoder_blocks(unet)}, width=8, time_width=8)
    for module in heads.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return heads.eval().requires_grad_(False)


class World:
    """A random U-Net, heads and prior of one precision, and what is built from them."""

    def __init__(self, dtype=torch.float64, kind: str = "v_prediction", out_channels: int = 3):
        self.dtype, self.kind = dtype, kind
        self.unet = make_unet(out_channels=out_channels)
        self.heads = make_heads(self.unet).to(dtype)
        self.unet, self.prior_unet = self.unet.to(dtype), make_unet(1, seed=1).to(dtype)
        self.plain = UNetPredictor(self.unet, DIFFUSION, kind)
        self.prior = UNetPredictor(self.prior_unet, DIFFUSION, "v_prediction").eps

    def terms(self, w_dc=3.0, w_dp=2.0, tau=(200, 400), reduction="mean", prior=None) -> list:
        return [Consistency(w_dc, reduction), Prior(w_dp, prior or self.prior, DIFFUSION, SIZE // 2, tau, reduction)]

    def guided(self, window=(0, 999), **options) -> DepthGuidance:
        return DepthGuidance(self.plain, self.heads, self.terms(**options), window)

    def naive(self, w_dc=3.0, w_dp=2.0, tau=(200, 400), reduction="mean") -> NaiveGuidance:
        def prior(d_tau, tau):
            return naive_eps(self.prior_unet, DIFFUSION, "v_prediction", d_tau, tau)

        heads = {name: NaiveHead(head) for name, head in self.heads.items()}
        options = {"w_dc": w_dc, "w_dp": w_dp, "prior": prior, "resolution": SIZE // 2, "tau": tau, "reduction": reduction}
        return NaiveGuidance(self.unet, DIFFUSION, self.kind, heads, **options)

    def start(self, seeds) -> tuple[torch.Tensor, SampleRNG]:
        rng = SampleRNG(seeds)
        return rng.randn("init", SHAPE).to(self.dtype), rng

    def depths(self, x, t) -> dict[str, torch.Tensor]:
        _, features = self.plain.taps(x, t, (0, 1, 2), with_grad=torch.is_grad_enabled())
        return {name: head(features, t, SIZE) for name, head in self.heads.items()}


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def single() -> World:
    return World(torch.float32)


T = torch.tensor([850, 40])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def sample(name, predict, seeds, *, world, steps=3, rule="score", rng=None, **options):
    x, own = world.start(seeds)
    return SAMPLERS[name](predict, x, respace(1000, steps, "ddpm"), DIFFUSION, rule=rule, rng=rng or own, clip=False, **options)


# ---- against the naive step


def compare(world, tolerance, **options):
    x, _ = world.start([5, 6])
    ours, theirs = (predict(x, T, SampleRNG([5, 6])) for predict in (world.guided(**options), world.naive(**options)))
    assert ours.losses.keys() == theirs.losses.keys() == {"dc", "dp"}
    for name in ("dc", "dp"):
        assert ours.losses[name].shape == (2,)
        assert relative(ours.losses[name], theirs.losses[name]) < tolerance
    assert relative(ours.eps, theirs.eps) < tolerance
    for mine, other in zip(ours.grad, theirs.grad, strict=True):
        assert relative(mine, other) < tolerance
    return ours


@pytest.mark.parametrize(("kind", "out_channels"), [("v_prediction", 3), ("epsilon", 3), ("epsilon", 6), ("sample", 3)])
def test_fused_step_equals_the_naive_one(kind, out_channels):
    """In float64 to rounding, for every prediction type; a U-Net with learned variance keeps it."""
    ours = compare(World(kind=kind, out_channels=out_channels), 1e-10)
    assert (ours.log_variance is None) == (out_channels == 3)


@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"tau": (300, 300)}, {"w_dc": 0.1, "w_dp": -4.0}])
def test_fused_step_equals_the_naive_one_for_every_option(world, options):
    compare(world, 1e-10, **options)


def test_fused_step_equals_the_naive_one_in_float32(single):
    compare(single, 1e-5)


def test_sum_is_mean_times_pixels(world):
    x, _ = world.start([5, 6])
    mean, total = (world.guided(reduction=r)(x, T, SampleRNG([5, 6])).losses for r in ("mean", "sum"))
    torch.testing.assert_close(total["dc"], mean["dc"] * SIZE**2)
    torch.testing.assert_close(total["dp"], mean["dp"] * (SIZE // 2) ** 2)


def test_sum_with_the_weight_divided_by_the_pixels_draws_the_same_pictures(single):
    """To the last bit: numbers of pixels that are powers of two divide without rounding."""
    mean, total = {"w_dc": 3.0, "w_dp": 2.0}, {"w_dc": 3.0 / SIZE**2, "w_dp": 2.0 / (SIZE // 2) ** 2, "reduction": "sum"}
    for rule in RULES:
        drawn = [sample("ddpm", single.guided(**options), [5, 6], world=single, rule=rule) for options in (mean, total)]
        assert torch.equal(*drawn)
        assert not torch.equal(drawn[0], sample("ddpm", single.plain, [5, 6], world=single, rule=rule))


# ---- gradients


def directional(function, x, direction, h=1e-4) -> torch.Tensor:
    """Central difference of a loss (b,) along a direction."""
    with torch.no_grad():
        return (function(x + h * direction) - function(x - h * direction)) / (2 * h)


def test_gradient_against_finite_differences(world):
    """DPG's is that of its whole loss; DCG's is that of the loss with the strong depth held where it is, and not of the free one."""
    x, _ = world.start([5, 6])
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    held = world.depths(x, T)["strong"]
    prior = world.terms(tau=(300, 300))[1]
    losses = {
        "dc": lambda x: depth_consistency(held, world.depths(x, T)["weak"]),
        "dp": lambda x: prior(world.depths(x, T), T, SampleRNG([5, 6])),
    }
    weights = {"dc": {"w_dc": 3.0, "w_dp": 0.0}, "dp": {"w_dc": 0.0, "w_dp": 2.0}}
    for name, loss in losses.items():
        grad = world.guided(tau=(300, 300), **weights[name])(x, T, SampleRNG([5, 6])).grad
        expected = max(weights[name].values()) * directional(loss, x, direction)
        torch.testing.assert_close((grad * direction).flatten(1).sum(1), expected, rtol=1e-6, atol=0)
    grad = world.guided(w_dp=0.0)(x, T, SampleRNG([5, 6])).grad
    free = directional(lambda x: depth_consistency(**world.depths(x, T)), x, direction)
    assert not torch.allclose((grad * direction).flatten(1).sum(1), 3.0 * free, rtol=0.05)


@pytest.mark.parametrize("weights", [{"w_dp": 0.0}, {"w_dc": 0.0}, {}])
def test_a_small_step_against_the_gradient_lowers_the_loss(world, weights):
    guided = world.guided(tau=(300, 300), **weights)
    x, _ = world.start([5, 6])
    before = guided(x, T, SampleRNG([5, 6]))
    step = 1e-3 / before.grad.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    after = guided(x - step * before.grad, T, SampleRNG([5, 6]))
    total = {"dc": weights.get("w_dc", 3.0), "dp": weights.get("w_dp", 2.0)}
    old, new = (sum(total[name] * loss for name, loss in p.losses.items()) for p in (before, after))
    assert (new < old).all()


class IdentityPredictor:
    """eps = 0, and x_t itself as the feature of block 0."""

    def __call__(self, x_t, t, rng):
        return self.taps(x_t, t, (), with_grad=False)[0]

    def taps(self, x_t, t, blocks, with_grad):
        return Prediction(torch.zeros_like(x_t.detach())), {0: x_t}


class Scale:
    """A head with a known gradient: depth is the first channel times a factor."""

    blocks = (0,)

    def __init__(self, factor):
        self.factor, self.calls = factor, 0

    def __call__(self, features, t, size):
        self.calls += 1
        return self.factor * features[0][:, :1]


def test_stop_gradient_of_the_strong_branch_in_closed_form():
    """d_S = a x, d_W = b x: grad |sg(a x) - b x|^2 = -2 b (a - b) x, where without the stop it would be 2 (a - b)^2 x."""
    a, b, w = 3.0, 0.5, 7.0
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    guided = DepthGuidance(IdentityPredictor(), {"strong": Scale(a), "weak": Scale(b)}, [Consistency(w, "sum")])
    found = guided(x, T, SampleRNG([0, 1]))
    torch.testing.assert_close(found.grad[:, 0], -w * 2 * b * (a - b) * x[:, 0])
    assert not found.grad[:, 1:].any()
    torch.testing.assert_close(found.losses["dc"], ((a - b) * x[:, 0]).square().sum((1, 2)))


def test_prior_gradient_reaches_the_strong_branch_in_closed_form():
    """d_S = a x, eps_phi = c d_tau: L = |n - c (s a x + r n)|^2 and grad L = -2 c s a (n - c d_tau), s = sqrt(abar), r = sqrt(1 - abar)."""
    a, c, w, tau = 3.0, 0.4, 7.0, 250
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    term = Prior(w, lambda d_tau, tau: c * d_tau, DIFFUSION, SIZE, (tau, tau), "sum")
    found = DepthGuidance(IdentityPredictor(), {"strong": Scale(a)}, [term])(x, T, SampleRNG([0, 1]))
    noise = SampleRNG([0, 1]).randn("prior", (1, SIZE, SIZE)).double()
    s, r = DIFFUSION.alphas_cumprod[tau] ** 0.5, (1 - DIFFUSION.alphas_cumprod[tau]) ** 0.5
    residual = noise - c * (s * a * x[:, :1] + r * noise)
    torch.testing.assert_close(found.grad[:, :1], -w * 2 * c * s * a * residual)
    torch.testing.assert_close(found.losses["dp"], residual.square().sum((1, 2, 3)))


def test_prior_works_at_its_own_resolution():
    """A prior at a quarter of the side sees means of 4x4 pixels, so each pixel gets a sixteenth of its cell's gradient."""
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    seen = []
    term = Prior(1.0, lambda d_tau, tau: seen.append(d_tau.detach()) or d_tau, DIFFUSION, SIZE // 4, (0, 0), "sum")
    grad = DepthGuidance(IdentityPredictor(), {"strong": Scale(1.0)}, [term])(x, T, SampleRNG([0, 1])).grad[:, :1]
    assert seen[0].shape == (2, 1, 4, 4)
    noise = SampleRNG([0, 1]).randn("prior", (1, 4, 4)).double()
    mean = x[:, :1].unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))
    torch.testing.assert_close(seen[0], DIFFUSION.q_sample(mean, torch.tensor([0, 0]), noise))
    cells = grad.unfold(2, 4, 4).unfold(3, 4, 4)
    torch.testing.assert_close(cells, cells[..., :1, :1].expand_as(cells))
    torch.testing.assert_close(cells[..., 0, 0], -2 * (noise - seen[0]) * DIFFUSION.alphas_cumprod[0] ** 0.5 / 16)


def test_loss_functions_alone():
    strong, weak = torch.rand(2, 1, 4, 4, requires_grad=True), torch.rand(2, 1, 4, 4, requires_grad=True)
    depth_consistency(strong, weak).sum().backward()
    assert strong.grad is None
    assert weak.grad.any()
    depth_prior(strong, lambda d_tau, tau: d_tau.sin(), DIFFUSION, T, torch.randn(2, 1, 4, 4)).sum().backward()
    assert strong.grad.any()


# ---- terms of one's own


class Flatness:
    """A third loss: depth should vary little."""

    name, heads = "flat", ("strong",)

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, depths, t, rng):
        return depths["strong"].flatten(1).var(1)


def test_a_third_term_adds_its_loss_and_gradient(world):
    x, _ = world.start([5, 6])

    def grad(*terms):
        return DepthGuidance(world.plain, world.heads, terms)(x, T, SampleRNG([5, 6]))

    both, first, second = grad(Consistency(3.0), Flatness(5.0)), grad(Consistency(3.0)), grad(Flatness(5.0))
    assert both.losses.keys() == {"dc", "flat"}
    torch.testing.assert_close(both.losses["flat"], world.depths(x, T)["strong"].flatten(1).var(1))
    torch.testing.assert_close(both.grad, first.grad + second.grad, rtol=1e-9, atol=1e-14)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(4))
    expected = 5 * directional(lambda x: world.depths(x, T)["strong"].flatten(1).var(1), x, direction)
    torch.testing.assert_close((second.grad * direction).flatten(1).sum(1), expected, rtol=1e-6, atol=0)


def test_only_needed_heads_run_and_once():
    heads = {"strong": Scale(1.0), "weak": Scale(2.0), "other": Scale(3.0)}
    prior = Prior(1.0, lambda d_tau, tau: d_tau, DIFFUSION, 8, (9, 9))
    x = torch.randn(2, *SHAPE)
    DepthGuidance(IdentityPredictor(), heads, [prior, Flatness(1.0), Consistency(0.0)])(x, T, SampleRNG([0, 1]))
    assert [head.calls for head in heads.values()] == [1, 0, 0]


# ---- without guidance


@pytest.mark.parametrize(("name", "rule"), list(itertools.product(SAMPLERS, RULES)))
def test_zero_weights_and_an_empty_window_change_no_bit_and_weights_do(single, name, rule):
    plain = sample(name, single.plain, [5, 6], world=single, rule=rule)
    assert torch.equal(sample(name, single.guided(w_dc=0, w_dp=0), [5, 6], world=single, rule=rule), plain)
    assert torch.equal(sample(name, single.guided(window=(400, 498)), [5, 6], world=single, rule=rule), plain)
    for weights in ({"w_dp": 0}, {"w_dc": 0}):
        moved = sample(name, single.guided(**weights), [5, 6], world=single, rule=rule)
        assert moved.isfinite().all()
        assert not torch.equal(moved[0], plain[0])
        assert not torch.equal(moved[1], plain[1])


def test_guidance_acts_inside_its_window_only(single):
    steps = []
    sample("ddim", single.guided(window=(333, 666)), [5], world=single, steps=4, callback=steps.append)
    assert [(int(s.t[0]), s.prediction.grad is not None, sorted(s.prediction.losses)) for s in steps] == [
        (999, False, []),
        (666, True, ["dc", "dp"]),
        (333, True, ["dc", "dp"]),
        (0, False, []),
    ]


def test_samples_outside_the_window_get_no_gradient_from_those_inside(world):
    x, _ = world.start([5, 6])
    found, alone = world.guided(window=(100, 999))(x, T, SampleRNG([5, 6])), world.guided()(x[:1], T[:1], SampleRNG([5]))
    assert not found.grad[1].any()
    assert relative(found.grad[:1], alone.grad) < 1e-10


# ---- random numbers


class Listening(SampleRNG):
    """Writes down what is drawn."""

    def __init__(self, seeds):
        super().__init__(seeds)
        self.drawn: list[tuple[str, str, torch.Tensor]] = []

    def randn(self, stream, shape):
        self.drawn.append(("randn", stream, super().randn(stream, shape)))
        return self.drawn[-1][2]

    def randint(self, stream, low, high):
        self.drawn.append(("randint", stream, super().randint(stream, low, high)))
        return self.drawn[-1][2]

    def of(self, stream):
        return [numbers for _, s, numbers in self.drawn if s == stream]


def test_guidance_draws_from_its_own_stream_and_leaves_the_samplers_noise(single):
    listeners = {}
    for key, predict in {"plain": single.plain, "guided": single.guided(), "dcg": single.guided(w_dp=0)}.items():
        listeners[key] = Listening([5, 6])
        sample("ddpm", predict, [5, 6], world=single, steps=4, rng=listeners[key])
    plain, guided = listeners["plain"], listeners["guided"]
    assert {stream for _, stream, _ in plain.drawn} == {"step"}
    assert {stream for _, stream, _ in listeners["dcg"].drawn} == {"step"}
    assert {stream for _, stream, _ in guided.drawn} == {"step", "prior"}
    assert len(plain.of("step")) == 3
    assert all(torch.equal(a, b) for a, b in zip(plain.of("step"), guided.of("step"), strict=True))


@pytest.mark.parametrize("tau", [(0, 999), (120, 130), (77, 77)])
def test_tau_is_fixed_or_drawn_for_every_sample_and_step(tau):
    seen, rng = [], Listening([1, 2, 3])
    term = Prior(1.0, lambda d_tau, tau: seen.append(tau) or d_tau, DIFFUSION, 8, tau)
    guided = DepthGuidance(IdentityPredictor(), {"strong": Scale(1.0)}, [term])
    for _ in range(60):
        guided(torch.zeros(3, *SHAPE), torch.tensor([4, 5, 6]), rng)
    seen = torch.stack(seen)
    assert (seen.min(), seen.max()) == tau if tau[1] - tau[0] < 20 else (seen.min() < 50 and seen.max() > 950)
    kinds = [kind for kind, _, _ in rng.drawn]
    if tau[0] == tau[1]:
        assert "randint" not in kinds
    else:
        assert len({tuple(row) for row in seen.T.tolist()}) == 3
        assert kinds == ["randint", "randn"] * 60
    assert {stream for _, stream, _ in rng.drawn} == {"prior"}


# ---- independence of samples


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_shard_of_eight_equals_eight_of_one_in_float64_to_rounding(world, name):
    """The samplers are exact (`test_sampling.py`); a U-Net is not, because matrix products of one row add up in another order than those of eight."""
    together = sample(name, world.guided(), range(8), world=world)
    alone = torch.cat([sample(name, world.guided(), [seed], world=world) for seed in range(8)])
    assert relative(together, alone) < 1e-13


def test_alone_equals_batched_in_float32_to_1e_4(single):
    """The same in float32: over three steps below 1e-4 of the largest value."""
    together = sample("ddpm", single.guided(), [5, 6], world=single)
    alone = torch.cat([sample("ddpm", single.guided(), [seed], world=single) for seed in (5, 6)])
    assert relative(together, alone) < 1e-4
    assert torch.equal(together, sample("ddpm", single.guided(), [5, 6], world=single))


# ---- what is not finite


class Poison:
    """A term whose loss, or whose gradient alone, is not finite for the second sample."""

    name, weight, heads = "poison", 1.0, ("strong",)

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, depths, t, rng):
        mean = depths["strong"].flatten(1).mean(1)
        if self.kind == "grad":  # sqrt(0): its derivative is infinite, and infinity times 0 is NaN
            return (mean * torch.tensor([1.0, 0.0])).abs().sqrt()
        return mean / torch.tensor([1.0, 0.0])


@pytest.mark.parametrize(("name", "rule"), [("ddim", "score"), ("ddpm", "mean")])
@pytest.mark.parametrize(("kind", "term"), [("loss", "loss poison"), ("grad", "grad")])
def test_what_is_not_finite_stops_the_run_with_seed_t_and_term(single, name, rule, kind, term):
    guided = DepthGuidance(single.plain, single.heads, [Consistency(1.0), Poison(kind)], window=(0, 600))
    with pytest.raises(FloatingPointError, match=f"^{term} is not finite at t = 500 for seed 31$"):
        sample(name, guided, [30, 31], world=single, rule=rule)


def test_a_prior_that_fails_is_named(single):
    guided = single.guided(prior=lambda d_tau, tau: d_tau * float("nan"))
    with pytest.raises(FloatingPointError, match="^loss dp is not finite at t = 999 for seed 30, 31$"):
        sample("ddim", guided, [30, 31], world=single)


# ---- U-Nets and their options


def test_learned_variance_reaches_the_sampler():
    world = World(torch.float32, "epsilon", 6)
    guided = world.guided()
    x, rng = world.start([5, 6])
    plain, steered = world.plain(x, T, rng), guided(x, T, rng)
    assert plain.log_variance.shape == x.shape
    assert relative(steered.log_variance, plain.log_variance) < 1e-5
    assert not steered.log_variance.requires_grad
    learned, fixed = (sample("ddpm", guided, [5, 6], world=world, variance=v) for v in ("learned", "fixed_small"))
    assert learned.isfinite().all()
    assert not torch.equal(learned, fixed)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_predictor_turns_every_prediction_type_into_eps(kind):
    world = World(kind=kind)
    x, _ = world.start([5, 6])
    expected = naive_eps(world.unet, DIFFUSION, kind, x, T)
    torch.testing.assert_close(world.plain(x, T, None).eps, expected, rtol=1e-9, atol=1e-9)
    with torch.enable_grad():
        x.requires_grad_()
        ours, theirs = (torch.autograd.grad(e.square().sum(), x)[0] for e in (world.plain.eps(x, T), naive_eps(world.unet, DIFFUSION, kind, x, T)))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_prediction_carries_no_graph(single):
    x, rng = single.start([5, 6])
    with torch.enable_grad():
        for predict in (single.plain, single.guided()):
            found = predict(x, T, rng)
            assert not any(v.requires_grad for v in (found.eps, *found.losses.values(), *([found.grad] if found.grad is not None else [])))


def test_blocks_beyond_the_deepest_tap_are_outside_the_graph(single):
    x, rng = single.start([5, 6])
    graph, modules = {}, {"first": single.unet.conv_in, "last": single.unet.conv_out}
    hooks = [m.register_forward_hook(lambda _, __, out, name=name: graph.update({name: out.requires_grad})) for name, m in modules.items()]
    single.guided()(x, T, rng)
    for hook in hooks:
        hook.remove()
    assert graph == {"first": True, "last": False}


def test_a_loss_over_the_whole_batch_is_refused(single):
    class Mean(Flatness):
        def __call__(self, depths, t, rng):
            return super().__call__(depths, t, rng).mean()

    x, rng = single.start([5, 6])
    with pytest.raises(ValueError, match=r"term 'flat' returned a loss of shape \(\), expected \(2,\): one number per sample"):
        DepthGuidance(single.plain, single.heads, [Mean(1.0)])(x, T, rng)


def test_guidance_works_under_inference_mode(single):
    expected = sample("ddpm", single.guided(), [5, 6], world=single)
    with torch.inference_mode():
        assert torch.equal(sample("ddpm", single.guided(), [5, 6], world=single), expected)


def test_checkpointing_and_bfloat16_keep_the_gradient(single):
    x, _ = single.start([5, 6])

    def grad(**options):
        return DepthGuidance(UNetPredictor(single.unet, DIFFUSION, single.kind, **options), single.heads, single.terms())(x, T, SampleRNG([5, 6]))

    full, saved, half = grad(), grad(checkpoint=True), grad(precision="bf16")
    assert relative(saved.grad, full.grad) < 1e-5
    assert half.grad.dtype == half.eps.dtype == torch.float32
    assert float(F.cosine_similarity(half.grad.flatten(), full.grad.flatten(), dim=0)) > 0.98
    assert 1e-6 < relative(half.eps, full.eps) < 0.05
    assert UNetPredictor(single.unet, DIFFUSION, "epsilon", precision="bf16")(x, T).eps.dtype == torch.float32
    prior = UNetPredictor(single.prior_unet, DIFFUSION, "v_prediction", precision="bf16", checkpoint=True).eps(x[:, :1], T)
    assert prior.dtype == torch.float32
    assert 1e-6 < relative(prior, single.prior(x[:, :1], T)) < 0.05


def test_channels_last_changes_nothing_but_rounding(world):
    x, _ = world.start([5, 6])
    predictor = UNetPredictor(copy.deepcopy(world.unet), DIFFUSION, world.kind, channels_last=True)
    assert predictor.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    found = DepthGuidance(predictor, world.heads, world.terms())(x, T, SampleRNG([5, 6]))
    expected = world.guided()(x, T, SampleRNG([5, 6]))
    assert relative(found.eps, expected.eps) < 1e-10
    assert relative(found.grad, expected.grad) < 1e-10


# ---- what is refused


def test_blocks_that_the_unet_lacks_are_refused(single):
    with pytest.raises(ValueError, match=r"head 'weak' asks for decoder blocks \[4\]; there are \[0, 1, 2, 3\]"):
        build_heads({"strong": [0], "weak": [4]}, {b.index: b.channels for b in decoder_blocks(single.unet)})
    head = Scale(1.0)
    head.blocks = (4,)
    x, rng = single.start([5, 6])
    with pytest.raises(ValueError, match="no decoder block 4 in this U-Net: blocks are numbered 0 to 3"):
        DepthGuidance(single.plain, {"strong": head}, [Flatness(1.0)])(x, T, rng)


def test_bad_arguments_are_refused_in_one_line(single):
    heads, training = {"strong": Scale(1.0)}, make_heads(single.unet).train()
    cases = [
        (lambda: DepthGuidance(single.plain, heads, [Consistency(1.0)]), r"needs the heads \['weak'\]; there are \['strong'\]"),
        (lambda: DepthGuidance(single.plain, training, [Consistency(1.0)]), r"heads \['strong', 'weak'\] are in training mode, expected eval"),
        (lambda: DepthGuidance(single.plain, heads, [Flatness(1.0), Flatness(2.0)]), "terms named .*'flat', 'flat'.*expected different"),
        (lambda: DepthGuidance(single.plain, heads, [], (5, 4)), r"window is \(5, 4\), expected"),
        (lambda: Prior(1.0, None, DIFFUSION, 8, (5, 4)), r"tau is \(5, 4\), expected 0 <= low <= high < 1000"),
        (lambda: Prior(1.0, None, DIFFUSION, 8, (0, 1000)), r"tau is \(0, 1000\)"),
        (lambda: depth_consistency(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), "max"), "reduction is 'max', expected one of"),
        (lambda: UNetPredictor(single.unet, DIFFUSION, "flow"), "prediction_type is 'flow', expected one of"),
        (lambda: UNetPredictor(single.unet, DIFFUSION, precision="fp16"), "precision is 'fp16', expected one of"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_heads_that_no_term_reads_may_be_in_training_mode(single):
    heads, x = make_heads(single.unet), single.start([5, 6])[0]
    expected = DepthGuidance(single.plain, heads, [Flatness(1.0)])(x, T, SampleRNG([5, 6])).grad
    heads["weak"].train()
    found = DepthGuidance(single.plain, heads, [Flatness(1.0)])(x, T, SampleRNG([5, 6])).grad
    assert expected.any()
    assert torch.equal(found, expected)


def test_depth_is_read_without_the_decoder_after_the_deepest_block():
    world = World()
    x, noise = (torch.randn(2, *SHAPE, dtype=world.dtype, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    head, t = world.heads["weak"], torch.full((2,), 20)
    _, features = world.plain.taps(DIFFUSION.q_sample(x, t, noise), t, head.blocks, with_grad=False)
    ran = []
    world.unet.conv_out.register_forward_hook(lambda *_: ran.append(True))
    assert torch.equal(world.plain.read_depth(head, x, 20, noise), head(features, t, SIZE))
    assert not ran
