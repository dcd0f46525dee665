"""Distances against closed forms, brute force and clean-fid's own code."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest

from dag.metrics.bootstrap import bootstrap
from dag.metrics.distances import METRICS, Moments, Reference, fd_infinity, frechet_distance, kid, moments, paired_bootstrap, precision_recall


def rows(n: int, d: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    """Correlated normal rows whose mixing matrix depends on d alone."""
    mixing = np.random.default_rng(d).standard_normal((d, d)) / d**0.5
    return spread * np.random.default_rng(seed).standard_normal((n, d)) @ mixing


# Moments


def test_moments_are_those_of_numpy_in_float64():
    features = (1000 + rows(300, 7)).astype(np.float32)
    mu, sigma = moments(features)
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(mu, features.astype(np.float64).mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-10)


def test_merged_moments_equal_the_whole_to_1e12():
    features = 50 + rows(5000, 12)
    whole = Moments().update(features)
    merged = Moments()
    for shard in np.split(features, [1, 2, 700, 701, 4800]):  # single rows and empty accumulators are shards too
        merged.merge(Moments()).merge(Moments().update(shard))
    assert merged.n == whole.n == 5000
    np.testing.assert_allclose(merged.mu, whole.mu, rtol=1e-12)
    np.testing.assert_allclose(merged.sigma, whole.sigma, atol=1e-12 * np.abs(whole.sigma).max())


def test_rows_that_are_equal_in_every_shard_have_no_covariance():
    shards = Moments()
    for _ in range(3):
        shards.update(np.full((1000, 3), 0.1))  # whose sum is not 100
    with pytest.raises(ValueError, match="all 3000 rows of features are equal"):
        _ = shards.sigma


def test_merging_leaves_the_merged_shard_as_it_was():
    shard = Moments().update(rows(20, 3))
    before = shard.sigma.copy()
    Moments().merge(shard).update(rows(20, 3, seed=1))
    np.testing.assert_array_equal(shard.sigma, before)


# Frechet distance


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    rng = np.random.default_rng(3)
    basis, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    a, b = rng.uniform(0.01, 4, 20), rng.uniform(0.01, 4, 20)
    mu1, mu2 = rng.standard_normal((2, 20))
    expected = np.square(mu1 - mu2).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(mu1, (basis * a) @ basis.T, mu2, (basis * b) @ basis.T) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_in_two_dimensions_is_the_closed_form():
    # For 2 x 2 matrices tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)); these two do not commute.
    s1, s2 = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    product = s1 @ s2
    expected = 1 + 4 + np.trace(s1) + np.trace(s2) - 2 * (np.trace(product) + 2 * np.linalg.det(product) ** 0.5) ** 0.5
    assert frechet_distance([1, 2], s1, [0, 0], s2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
def test_frechet_distance_equals_cleanfid():
    pytest.importorskip("cleanfid")
    if tuple(map(int, version("scipy").split(".")[:2])) >= (1, 18):
        pytest.skip("clean-fid's own distance needs scipy below 1.18")
    from cleanfid.fid import frechet_distance as theirs

    first, second = moments(rows(600, 64)), moments(0.1 + rows(500, 64, seed=1, spread=1.3))
    assert frechet_distance(*first, *second) == pytest.approx(theirs(*first, *second), rel=1e-6)


def test_frechet_distance_of_equal_moments_is_zero_and_symmetric():
    first, second = moments(rows(300, 30)), moments(rows(200, 30, seed=1))
    assert frechet_distance(*first, *first) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(*first, *second) == pytest.approx(frechet_distance(*second, *first), rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(40, 60), (60, 60), (90, 60), (2, 60)])
def test_nuclear_norm_form_equals_eigen_form(n, d):
    reference = Reference(*moments(rows(400, d)))
    features = 0.2 + rows(n, d, seed=5)
    assert reference.distance(features) == pytest.approx(frechet_distance(*moments(features), reference.mu, reference.sigma), rel=1e-6)


def test_distances_import_neither_torch_nor_scipy():
    code = "import sys, dag.metrics.distances; sys.exit(any(m in sys.modules for m in ('torch', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Kernel distance, precision and recall, extrapolation


def test_kid_equals_brute_force():
    a, b = rows(9, 4), 0.5 + rows(7, 4, seed=1)

    def mean(pairs):
        return np.mean([(x @ y / 4 + 1) ** 3 for x, y in pairs])

    def within(x):
        return mean([(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])

    assert kid(a, b) == pytest.approx(within(a) + within(b) - 2 * mean([(x, y) for x in a for y in b]), rel=1e-10)


def test_kid_is_unbiased():
    values = [kid(rows(10, 5, seed=2 * i), rows(10, 5, seed=2 * i + 1)) for i in range(400)]
    assert min(values) < 0
    assert abs(np.mean(values)) < 3 * np.std(values) / 20


def test_precision_and_recall_of_planted_sets():
    real = np.arange(20.0)[:, None] * [1, 0.5]
    assert precision_recall(real, real[::2]) == (1.0, 1.0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)
    # Every fake row lies on a real one, but all of them on the first few: nothing reaches the far end.
    precision, recall = precision_recall(real, real[:5])
    assert precision == 1.0
    assert recall < 0.5
    half_outside = np.concatenate([real, real + 1000])
    assert precision_recall(real, half_outside) == (0.5, 1.0)


def test_precision_and_recall_equal_brute_force():
    def share(centres, points):
        radius = [sorted(np.linalg.norm(centres - c, axis=1))[3] for c in centres]
        return np.mean([any(np.linalg.norm(p - c) <= radius[i] for i, c in enumerate(centres)) for p in points])

    real, fake = rows(60, 3), rows(40, 3, seed=1, spread=1.5)
    assert precision_recall(real, fake, k=3) == (share(real, fake), share(fake, real))


def test_fd_infinity_takes_away_the_bias_of_small_samples():
    d = 24
    mixing = np.random.default_rng(d).standard_normal((d, d)) / d**0.5
    truth = Reference(np.zeros(d), mixing.T @ mixing)
    features = rows(1000, d, seed=1)
    assert abs(fd_infinity(features, truth, seed=0)) < truth.distance(features) / 3
    assert fd_infinity(features, truth, seed=0) == fd_infinity(features, truth, seed=0) != fd_infinity(features, truth, seed=1)


# Intervals


def estimates(draws: int, n: int, d: int, metric: str, **options) -> np.ndarray:
    """Value, low and high of distances and of differences, (2, 3, draws), of samples drawn again and again."""
    spectrum = np.sqrt(np.linspace(1, 0.05, d))
    real = Reference(np.zeros(d), np.diag(spectrum**2)) if metric.startswith("fd") else np.random.default_rng(7).standard_normal((300, d)) * spectrum
    rng = np.random.default_rng(1)
    found = []
    for seed in range(draws):
        baseline = 0.1 + 1.2 * rng.standard_normal((n, d)) * spectrum
        features = baseline + 0.36 * rng.standard_normal((n, d)) * spectrum
        e = paired_bootstrap(real, features, baseline, metric=metric, seed=seed, **options)
        found.append(((e.value, e.low, e.high), (e.diff, e.diff_low, e.diff_high)))
    return np.moveaxis(found, 0, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "n"), [("fd", 64), ("fd_infinity", 256), ("kid", 256), ("precision", 256), ("recall", 256)])
def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say(metric, n):
    for value, low, high in estimates(400, n, 8, metric, resamples=200 if metric != "fd_infinity" else 100):
        assert 0.92 <= ((low <= value.mean()) & (value.mean() <= high)).mean() <= 0.98


@pytest.mark.parametrize(("metric", "n", "d"), [("fd_infinity", 256, 20), ("recall", 128, 8)])
def test_bootstrap_intervals_are_as_wide_as_the_numbers_spread(metric, n, d):
    """Of numbers that are not smooth: chance of their own, or neighbours that change, must not be counted as if it were that of the samples."""
    for value, low, high in estimates(30, n, d, metric, resamples=60):
        assert 0.6 < (high - low).mean() / (2 * 1.96 * value.std(ddof=1)) < 1.45


def test_bootstrap_of_a_planted_difference():
    truth, baseline = Reference(*moments(rows(1000, 10))), 0.3 + rows(100, 10, seed=1)
    estimate = paired_bootstrap(truth, baseline - 0.3, baseline)
    assert estimate.value == pytest.approx(truth.distance(baseline - 0.3), rel=1e-9)
    assert estimate.diff == pytest.approx(truth.distance(baseline - 0.3) - truth.distance(baseline), rel=1e-9)
    assert estimate.low < estimate.value < estimate.high
    assert estimate.diff_low < estimate.diff < estimate.diff_high < 0
    assert estimate.p < 1e-6


def test_bootstrap_pairs_cancel_what_the_seeds_share():
    truth, baseline = Reference(*moments(rows(1000, 10))), 1.5 * rows(100, 10, seed=1)
    paired = paired_bootstrap(truth, 0.97 * baseline, baseline)
    shuffled = paired_bootstrap(truth, 0.97 * baseline[np.random.default_rng(0).permutation(100)], baseline)
    assert paired.diff == pytest.approx(shuffled.diff)
    assert paired.diff_high - paired.diff_low < 0.3 * (shuffled.diff_high - shuffled.diff_low)


def test_p_values_of_a_mean_are_those_of_the_paired_t_test():
    from scipy.stats import ttest_rel

    for shift in (0.0, 0.02, 0.05):
        values = rows(200, 1, seed=5)[:, 0]
        pair = np.concatenate([values + shift + 0.2 * rows(200, 1, seed=6)[:, 0], values])
        found = bootstrap(lambda chosen, pair=pair: float(pair[chosen].mean()), 200, paired=True, resamples=2000)
        assert found.p == pytest.approx(ttest_rel(pair[:200], pair[200:]).pvalue, abs=0.02)


def test_intervals_of_skewed_numbers_miss_on_the_side_on_which_a_t_interval_does():
    """The mean of few exponential numbers: an interval is too low more often than too high, but not many times as often."""
    low = high = 0
    for seed in range(300):
        values = np.random.default_rng(seed).exponential(size=72)
        found = bootstrap(lambda chosen, values=values: float(values[chosen].mean()), 72, paired=False, resamples=100, seed=seed)
        low, high = low + (found.low > 1), high + (found.high < 1)
    assert low / 300 < 0.05
    assert high / 300 < 0.08


def test_p_is_below_five_per_cent_where_the_interval_leaves_out_zero():
    truth, baseline = Reference(*moments(rows(1000, 4))), rows(60, 4, seed=1)
    for shift in np.linspace(0, 0.3, 12):
        found = paired_bootstrap(truth, baseline + shift * (1 + rows(60, 4, seed=2)), baseline, resamples=30)
        assert (found.p < 0.05) == (found.diff_low * found.diff_high > 0)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_p_values_are_level_where_both_are_equally_far(shift):
    """Also where every sample has moved the same way, from one side of the reference to the other."""
    truth, p = Reference(np.zeros(4), np.eye(4)), []
    for seed in range(100):
        shared = rows(60, 4, seed=3 * seed)
        pair = [shared + side * shift / 2 + 0.3 * rows(60, 4, seed=3 * seed + i) for i, side in ((1, -1), (2, 1))]
        p.append(paired_bootstrap(truth, *pair, resamples=100, seed=seed).p)
    assert 0.35 < np.mean(p) < 0.65
    assert np.mean(np.array(p) <= 0.1) < 0.2


@pytest.mark.parametrize("d", [10, 60])
def test_bootstrap_alone_and_with_itself(d):
    truth, features = Reference(*moments(rows(1000, d))), rows(40, d, seed=1)
    alone, with_itself = paired_bootstrap(truth, features), paired_bootstrap(truth, features, features)
    assert (alone.diff, alone.diff_low, alone.diff_high, alone.p) == (None, None, None, None)
    assert (alone.n, alone.low, alone.high) == (40, pytest.approx(with_itself.low), pytest.approx(with_itself.high))
    assert with_itself.diff == pytest.approx(0, abs=1e-9)
    assert paired_bootstrap((truth.mu, truth.sigma), features) == alone


ALONE = {
    "fd": lambda real, x: frechet_distance(*moments(x), *moments(real)),
    "fd_infinity": lambda real, x: fd_infinity(x, moments(real), seed=0),
    "kid": lambda real, x: kid(x, real),
    "precision": lambda real, x: precision_recall(real, x)[0],
    "recall": lambda real, x: precision_recall(real, x)[1],
}


@pytest.mark.parametrize("metric", METRICS)
def test_bootstrap_takes_every_metric(metric):
    real, baseline = rows(150, 4), rows(60, 4, seed=1)
    features = 0.5 * baseline
    estimate = paired_bootstrap(real, features, baseline, metric=metric, resamples=20)
    assert estimate.value == pytest.approx(ALONE[metric](real, features), rel=1e-8)
    assert estimate.diff == pytest.approx(ALONE[metric](real, features) - ALONE[metric](real, baseline), rel=1e-6, abs=1e-9)
    assert estimate.diff_low <= estimate.diff <= estimate.diff_high
    assert 0 <= estimate.p <= 1
    # Half the spread: further off, every image plausible, few of the real ones covered.
    assert (estimate.diff > 0) == (metric != "recall")


@pytest.mark.parametrize(("metric", "low", "high"), [("fd", 0, np.inf), ("precision", 0, 1), ("recall", 0, 1)])
def test_intervals_end_where_the_numbers_do(metric, low, high):
    real = rows(400, 4)
    found = [paired_bootstrap(real, rows(12, 4, seed=seed), metric=metric) for seed in range(1, 30)]
    assert all(low <= e.low <= e.value <= e.high <= high for e in found)
    assert any(e.low == low or e.high == high for e in found)


@pytest.mark.parametrize("d", [5, 40])  # both forms
def test_bootstrap_of_a_distance_beyond_another(d):
    real, others = moments(rows(300, d)), moments(rows(200, d, seed=9))
    features, baseline, beside, beside_baseline = (0.1 * i + rows(30, d, seed=i) for i in range(1, 5))
    options = {"resamples": 20}
    found = paired_bootstrap(real, features, baseline, beyond=(others, beside, beside_baseline), **options)
    first, second = paired_bootstrap(real, features, baseline, **options), paired_bootstrap(others, beside, beside_baseline, **options)
    assert found.value == pytest.approx(np.log(first.value / second.value), rel=1e-9)
    before = np.log((first.value - first.diff) / (second.value - second.diff))
    assert found.diff == pytest.approx(found.value - before, rel=1e-9)
    assert found.diff_low < found.diff < found.diff_high
    scaled = paired_bootstrap((9 * real[0], 81 * real[1]), 9 * features, 9 * baseline, beyond=(others, beside, beside_baseline), **options)
    assert scaled.diff == pytest.approx(found.diff, rel=1e-6)  # the scale of either does not matter
    # What both have in common cancels in every resample.
    none = paired_bootstrap(real, features, baseline, beyond=(real, features, baseline), **options)
    assert (none.value, none.low, none.high, none.diff, none.diff_low, none.diff_high, none.p) == (0, 0, 0, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="29 rows of features do not belong to 30 rows"):
        paired_bootstrap(real, features, baseline, beyond=(others, beside[:-1], beside_baseline[:-1]))


# Refusals


def test_unknown_metrics_and_lacking_features_are_refused():
    with pytest.raises(ValueError, match="metric is 'fid', expected one of fd, fd_infinity, kid"):
        paired_bootstrap(rows(50, 3), rows(20, 3), metric="fid")
    with pytest.raises(ValueError, match="kid needs the features"):
        paired_bootstrap(moments(rows(50, 3)), rows(20, 3), metric="kid")


@pytest.mark.parametrize("distance", [kid, precision_recall, lambda a, b: Reference(*moments(a)).distance(b), lambda a, b: paired_bootstrap(moments(a), b)])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[:, :-1], "different width, "),
        (lambda x: np.where(np.arange(len(x))[:, None] == 3, np.nan, x), "NaN or infinity in 1 of 30 rows"),
        (lambda x: np.ones_like(x), "all 30 rows of features are equal"),
        (lambda x: x[:1], "1 rows of features"),
        (lambda x: x[0], r"shape \(5,\)"),
        (lambda x: x + 0j, "of the kind complex128, expected real numbers"),
    ],
)
def test_features_that_allow_no_distance_are_refused_by_name(distance, spoil, message):
    with pytest.raises(ValueError, match=message):
        distance(rows(30, 5), spoil(rows(30, 5, seed=1)))


def test_unequal_pairs_are_refused():
    with pytest.raises(ValueError, match="29 rows do not pair with 30"):
        paired_bootstrap(moments(rows(50, 5)), rows(30, 5), rows(29, 5))
    with pytest.raises(ValueError, match="baseline and reference: features of different width, 4 and 5"):
        paired_bootstrap(moments(rows(50, 5)), rows(30, 5), rows(30, 4))


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        ([0, 0], [[1, 2], [2, 1]], "smallest eigenvalue"),
        ([0, 0], [[1, 2], [0, 1]], "not symmetric"),
        ([0, 0, 0], np.eye(2), "expected"),
        ([0, np.nan], np.eye(2), "NaN"),
        ([0, 0, 0], np.eye(3), "different width, "),
    ],
)
def test_what_is_no_covariance_is_refused(mu, sigma, message):
    for pair in ((mu, sigma, [0, 0], np.eye(2)), ([0, 0], np.eye(2), mu, sigma)):
        with pytest.raises(ValueError, match=message):
            frechet_distance(*pair)


def test_what_is_no_covariance_is_refused_in_nuclear_norm_form_too():
    sigma, rows_beside = np.diag([1, 1, 1, 1, 1, -0.5]), rows(4, 6) * [1, 1, 1, 1, 1, 1e-9]  # its negative direction is none of theirs
    with pytest.raises(ValueError, match="eigenvalue below zero"):
        Reference(np.zeros(6), sigma).distance(rows_beside)
    singular = moments(rows(4, 6))
    assert Reference(*singular).distance(rows(4, 6)) == pytest.approx(0, abs=1e-6)


def test_too_few_rows_are_refused():
    for metric, least in (("fd_infinity", 10), ("recall", 8)):
        assert paired_bootstrap(rows(30, 3), rows(least, 3, seed=1), metric=metric, resamples=20).n == least
        with pytest.raises(ValueError, match=f"at least {least} are needed"):
            paired_bootstrap(rows(30, 3), rows(least - 1, 3, seed=1), metric=metric)
    with pytest.raises(ValueError, match="at least 8"):
        fd_infinity(rows(7, 3), moments(rows(9, 3)), seed=0)
    with pytest.raises(ValueError, match="at least 4"):
        precision_recall(rows(9, 3), rows(3, 3))
    with pytest.raises(ValueError, match="1 rows"):
        _ = Moments().update(rows(1, 3)).sigma
