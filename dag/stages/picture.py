"""Stage picture: samples of a model by itself, unguided and guided from the same seeds, as one picture."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from dag.accelerator import here
from dag.data.images import to_uint8
from dag.diffusion import respace
from dag.guidance import Consistency, DepthGuidance, Prior, UNetPredictor
from dag.networks import DepthHeads, DepthPrior
from dag.sampling import SampleRNG, sample_ddim
from dag.stages.artefacts import writing
from dag.stages.sampling import read_depth
from dag.stages.sheet import span
from dag.unet import picture_side

COLUMNS, SIDE = 16, 96  # samples beside one another; least pixels along the side of one
BATCH, READ_T = 16, 20


def picture(
    *,
    model: Path,
    grid: Path,
    heads: Path | None = None,
    prior: Path | None = None,
    w_dc: float = 0.0,
    w_dp: float = 0.0,
    n: int = 8,
    first_seed: int = 0,
    steps: int = 25,
    rule: Literal["score", "mean", "mean_variance"] = "score",
    tau: str = "300",
    window: str = "0-999",
) -> None:
    """Draw samples of a model, no study needed: the same seeds unguided and guided, as one picture.

    Rows, from the top: unguided, guided, and with heads the depth that the strong one reads from either, far bright. Without weights: unguided alone.
    `dag sample --model ...` is the same command.
    """
    _check(n, grid, heads, prior, w_dc, w_dp)
    plain = UNetPredictor.load(model, channels_last=True)
    plain.unet.to(here())
    networks = DepthHeads.load(heads).to(here()) if heads else {}
    terms = [Consistency(w_dc)] if w_dc else []
    if w_dp:
        depth_prior = DepthPrior.load(prior).to(here())
        terms.append(Prior(w_dp, depth_prior, depth_prior.diffusion, depth_prior.resolution, _span("tau", tau)))
    predictors = {"unguided": plain} | ({"guided": DepthGuidance(plain, networks, terms, _span("window", window))} if terms else {})
    rows: dict[str, list[np.ndarray]] = {}
    batches = [list(range(start, min(start + BATCH, first_seed + n))) for start in range(first_seed, first_seed + n, BATCH)]
    with tqdm(total=len(batches) * len(predictors) * steps, desc=grid.name, unit="step", disable=None) as bar:
        for seeds, (name, predict) in itertools.product(batches, predictors.items()):
            x = _draw(predict, plain, seeds, steps, rule, lambda step: bar.update())
            rows.setdefault(name, []).append(to_uint8(x))
            if heads:
                rows.setdefault(f"depth, {name}", []).append(_coloured(read_depth(x.clamp(-1, 1), seeds, plain, networks["strong"], READ_T)))
    # Pictures above depths.
    rows = {name: np.concatenate(rows[name]) for name in sorted(rows, key=lambda name: name.startswith("depth"))}
    _write(list(rows.values()), grid)
    sys.stdout.write(f"{grid}: seeds {first_seed} to {first_seed + n - 1}, w_dc {w_dc:g}, w_dp {w_dp:g}; rows: {'; '.join(rows)}\n")


def _check(n: int, grid: Path, heads: Path | None, prior: Path | None, w_dc: float, w_dp: float) -> None:
    if n < 1:
        raise ValueError(f"--n is {n}, expected at least 1")
    if grid.suffix.lower() != ".png":
        raise ValueError(f"--grid is {grid}, expected a name that ends in .png")
    if heads is None and (w_dc or w_dp):
        raise ValueError("--w-dc and --w-dp need --heads: a file of `dag heads` (a study writes results/<study>/models/heads/), or a folder of DepthHeads")
    if prior is None and w_dp:
        raise ValueError("--w-dp needs --prior: a folder of `dag prior` (a study writes results/<study>/models/prior<resolution>)")
    if heads is not None and not heads.exists():
        raise ValueError(f"--heads is {heads}, which does not exist: a study writes heads, and so does examples/guide_your_own.py (guided/heads)")


def _draw(predict, plain: UNetPredictor, seeds: list[int], steps: int, rule: str, callback: Callable) -> torch.Tensor:
    size, channels = picture_side(plain.unet), plain.unet.config.in_channels
    rng, timesteps = SampleRNG(seeds, here()), respace(plain.diffusion.num_timesteps, steps, "ddim")
    return sample_ddim(predict, rng.randn("init", (channels, size, size)), timesteps, plain.diffusion, rule=rule, rng=rng, callback=callback)


def _span(option: str, text: str) -> tuple[int, int]:
    try:
        return span(text)
    except ValueError:
        raise ValueError(f"--{option} is {text!r}, expected a timestep, or LOW-HIGH") from None


def _coloured(coded: torch.Tensor) -> np.ndarray:
    """Coded depth (b, 1, s, s) as colours (b, s, s, 3) uint8, far bright."""
    from matplotlib import colormaps

    return (colormaps["magma"](((coded[:, 0] + 1) / 2).clamp(0, 1).cpu().numpy())[..., :3] * 255).round().astype(np.uint8)


def _write(rows: list[np.ndarray], out: Path) -> None:
    """Rows of pictures (n, s, s, 3), COLUMNS of them beside one another, the next ones below; enlarged by a whole factor."""
    from matplotlib.image import imsave

    count, size = rows[0].shape[:2]
    bands = []
    for start in range(0, count, COLUMNS):
        for row in rows:
            band = np.hstack(row[start : start + COLUMNS])
            bands.append(np.pad(band, ((0, 0), (0, min(count, COLUMNS) * size - band.shape[1]), (0, 0)), constant_values=255))
    factor = max(1, SIDE // size)
    with writing(out) as aside:
        imsave(aside, np.vstack(bands).repeat(factor, 0).repeat(factor, 1))
