"""Ours and clean-fid's Frechet distance on the same features, and the cost of intervals: python benchmarks/frechet.py.

Prints CPU seconds of one thread, which what else the machine does changes little, and the ratio of runs side by side.
"""

import time

import numpy as np
import torch
from cleanfid.fid import frechet_distance as clean_fid

from dag.metrics.distances import Reference, moments, paired_bootstrap
from dag.metrics.extractors import load_extractor


def seconds(function, repeats: int = 1) -> tuple[float, object]:
    """The least CPU time of some calls, and the last one's result."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        times.append(time.process_time() - start)
    return min(times), result


def features(n: int, d: int, seed: int) -> np.ndarray:
    """Correlated rows whose spectrum falls as that of real features does."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(d).standard_normal((d, d)) / np.sqrt(d) * (1 / np.sqrt(1 + np.arange(d)))[:, None]
    return (rng.standard_normal((n, d)) @ mixing + 0.02 * seed).astype(np.float32)


def against_clean_fid(d: int = 2048, n: int = 2560) -> None:
    real, fake = features(n, d, 0), features(n, d, 1)
    (mu, sigma), reference = moments(fake), Reference(*moments(real))
    theirs, expected = seconds(lambda: clean_fid(mu, sigma, reference.mu, reference.sigma))
    cold, _ = seconds(lambda: reference.root)
    ours, found = seconds(lambda: reference.distance_to(mu, sigma), 2)
    print(f"Frechet distance, d = {d}, n = {n}: clean-fid {theirs:.1f} s, ours {ours:.2f} s (reference's root, once: {cold:.1f} s)")
    print(f"  ratio {theirs / ours:.1f}, relative difference {abs(found - expected) / expected:.1e}")


def small_n(d: int = 1280, n: int = 1000) -> None:
    reference, fake = Reference(*moments(features(2 * d, d, 0))), features(n, d, 1)
    whole, _ = seconds(lambda: reference.distance(fake))
    print(f"Frechet distance, d = {d}, n = {n}, moments included: {whole:.2f} s (expected under 3)")


def intervals(n: int = 256, d: int = 80) -> None:
    reference, pair = Reference(*moments(features(1000, d, 0))), (features(n, d, 1), features(n, d, 2))
    whole, _ = seconds(lambda: paired_bootstrap(reference, *pair, resamples=200))
    print(f"paired bootstrap, 200 resamples, n = {n}, d = {d}: {whole:.1f} s (expected under 10)")


def throughput(count: int = 256) -> None:
    """Images a second through the extractor, and through its bare network on a tensor that is already there, in turn."""
    extractor, pictures = load_extractor("efficientnet_lite0", dims=80), np.random.default_rng(0).integers(0, 256, (count, 128, 128, 3), dtype=np.uint8)
    batch = torch.from_numpy(pictures[:8]).permute(0, 3, 1, 2).float().contiguous()

    def bare() -> None:
        with torch.inference_mode():
            for _ in range(count // 8):
                extractor.network(batch)

    extractor(pictures[:8])
    times = [(seconds(lambda: extractor(pictures))[0], seconds(bare)[0]) for _ in range(3)]
    whole, alone = (min(column) for column in zip(*times, strict=True))
    print(f"extractor: {count / whole:.0f} images/s, its bare network {count / alone:.0f}: {alone / whole:.0%} (expected at least 90 %)")


if __name__ == "__main__":
    torch.set_num_threads(1)
    against_clean_fid()
    small_n()
    intervals()
    throughput()
