"""Stages that make networks on the pretrained U-Net or beside it: features, heads, prior, judge. The U-Net itself: `pretraining`."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from dag.accelerator import here, on
from dag.data.depth import DepthCoding
from dag.data.features import FeatureFile, write_features
from dag.data.images import to_tensor
from dag.diffusion import Diffusion
from dag.processes import in_processes, team
from dag.stages.artefacts import write_csv, write_provenance
from dag.stages.data import read
from dag.stages.study import Study
from dag.training import OtherState, Recipe, denoising_loss, fit, generator, noised

# Streams of random choices that are no part of a training's own seed.
_BATCHES, _HEADS = 101, 102


def coding(study: Study) -> DepthCoding:
    return DepthCoding(study["depth"]["near"], study["depth"]["far"], study["depth"]["coding"])


def saved_beside(out: Path) -> tuple[Path, Path]:
    """State and log of the training that makes `out`."""
    return out.parent / f"{out.stem}.state.pt", out.parent / f"{out.stem}.log.jsonl"


def train(network: torch.nn.Module, loss, batch, recipe: Recipe, out: Path, data: str) -> torch.nn.Module:
    """fit with its state and log beside the output; `finished` drops the state. data: digest of what it trains on.

    A state of another config or other data is dropped: these networks take minutes.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    state, log = saved_beside(out)
    if not state.exists():
        log.unlink(missing_ok=True)
    network.to(here())
    start = {key: value.clone() for key, value in network.state_dict().items()}
    files = {"state": state, "log": log, "name": out.stem, "data": data}
    try:
        return fit(network, loss, batch, recipe, **files)
    except OtherState as error:
        shared = team(recipe.processes)
        shared.wait_for_everyone()  # to read it
        if shared.process_index == 0:
            warnings.warn(f"{error}; starting again", stacklevel=2)
            for file in saved_beside(out):
                file.unlink()
        shared.wait_for_everyone()  # until it is gone
        network.load_state_dict(start)
        return fit(network, loss, batch, recipe, **files)


def train_depth(
    images: torch.Tensor, depth: torch.Tensor, architecture: dict, recipe: Recipe, out: Path, *, augment: bool = False, turn: tuple[int, int] = (0, 1)
) -> torch.nn.Module:
    """A depth network, a judge or a downstream one, trained on images (n, 3, h, w) in [-1, 1] and their coded depth (n, 1, h, w).

    turn: (i, count) of the i-th of so many trainings, which all draw other batches.
    """
    from dag.estimators import augmented_depth_loss, depth_loss, depth_network, renew_statistics

    torch.manual_seed(recipe.seed)
    network = depth_network(architecture, images.shape[-1])

    def batch(step: int) -> tuple:
        rows = pick(step * turn[1] + turn[0], len(images), recipe.batch_size)
        return images[rows], depth[rows]

    loss = augmented_depth_loss if augment else depth_loss
    train(network, loss, batch, recipe, out, contents(images, depth, architecture=architecture, augment=augment, turn=turn))
    return renew_statistics(network, images)


def contents(*arrays: np.ndarray | torch.Tensor, **made) -> str:
    """A digest of training data, which may be a mapped file that is larger than the memory, and of what else makes the training what it is."""
    hasher = hashlib.sha256(json.dumps(made, sort_keys=True).encode() if made else b"")
    for array in arrays:
        hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # no copy
    return hasher.hexdigest()[:16]


def finished(out: Path) -> None:
    """Drop the resume state of a training whose result is safely written."""
    saved_beside(out)[0].unlink(missing_ok=True)


def pick(step: int, count: int, size: int) -> np.ndarray:
    """Row numbers of a training batch: random, but a function of the step alone."""
    return torch.randint(count, (size,), generator=generator(_BATCHES, step)).numpy()


def features(study: Study, *, unet: Path, data: Path, levels: str, blocks: Literal["heads", "all"], out: Path, count: int | None = None) -> None:
    """Decoder features of the first `count` images of a data file, or of all, at several noise levels.

    levels: how many timesteps, spread over the whole range, each image is noised to; or "validation", the config's own list.
    blocks: "heads" (those of the strong and weak head) or "all".
    """
    from dag.sampling import SampleRNG
    from dag.unet import feature_shapes, forward_with_taps
    from dag.weights import load_unet

    if levels != "validation" and not (levels.isdecimal() and int(levels)):
        raise ValueError(f"levels is {levels!r}, expected 'validation' or a whole number from 1")
    started = time.time()
    network, meta = load_unet(unet)
    network.to(here())
    diffusion = Diffusion(meta["num_timesteps"], meta["beta_start"], meta["beta_end"], meta["beta_schedule"])
    arrays = read(data, "images", "ids")
    if count is not None and count > len(arrays["ids"]):
        raise ValueError(f"{data}: holds {len(arrays['ids'])} images, expected the {count} that are asked for")
    x_start, ids = to_tensor(arrays["images"][:count]), arrays["ids"][:count]
    shapes = feature_shapes(network, x_start.shape[-1])
    if blocks == "heads":
        shapes = {b: shapes[b] for b in sorted({*study["heads"]["strong"], *study["heads"]["weak"]})}
    if levels == "validation":
        t = np.tile(study["heads"]["validation_t"], (len(ids), 1))
    else:
        t = np.stack([spread_timesteps(int(i), int(levels), diffusion.num_timesteps) for i in ids])
    image, level = np.divmod(np.arange(t.size), t.shape[1])

    def batches() -> Iterator[dict]:
        for start in range(0, t.size, study["sampling"]["batch_size"]):
            rows = slice(start, start + study["sampling"]["batch_size"])
            noise = torch.cat([SampleRNG([int(ids[i])]).randn(f"features {j}", x_start.shape[1:]) for i, j in zip(image[rows], level[rows], strict=True)])
            clean, noise, steps = on(here(), (x_start[image[rows]], noise, torch.from_numpy(t.reshape(-1)[rows])))
            with torch.inference_mode():
                yield forward_with_taps(network, diffusion.q_sample(clean, steps, noise), steps, shapes, stop_after_taps=True)[1]

    write_features(out, shapes, image, t.reshape(-1), batches())
    write_provenance(out, study, started, beside=".provenance.json")


def spread_timesteps(seed: int, levels: int, num_timesteps: int) -> np.ndarray:
    """One random timestep in each of `levels` equal parts of the range; a function of the seed."""
    return ((np.arange(levels) + np.random.default_rng([seed, levels]).random(levels)) / levels * num_timesteps).astype(int)


def heads(
    study: Study,
    *,
    kind: Literal["pair", "blocks"],
    data: Path,
    features: Path,
    validation: Path,
    validation_features: Path,
    out: Path,
    metrics: Path,
    variant: str = "none",
) -> None:
    """Train depth heads on stored features and measure them on the validation images.

    kind: "pair" (the strong and the weak head, together) or "blocks" (one head on each single decoder block). variant: of the config's `variants`.
    """
    from dag.heads import build_heads, head_loss
    from dag.weights import save_module

    started, study = time.time(), study.varied(variant)
    stored, labels = FeatureFile(features), read(data, "depth")["depth"]
    depth = coding(study).encode(torch.from_numpy(labels))[:, None]
    names = {"strong": study["heads"]["strong"], "weak": study["heads"]["weak"]} if kind == "pair" else {f"block{b}": [b] for b in stored.channels}
    sizes = {k: study["heads"][k] for k in ("width", "layers", "time_width")}
    recipe = Recipe(**study["heads"]["training"])
    torch.manual_seed(_HEADS + recipe.seed)
    network = build_heads(names, stored.channels, **sizes)
    used = {b for blocks in names.values() for b in blocks}

    def batch(step: int) -> tuple:
        rows = pick(step, len(stored.t), recipe.batch_size)
        return stored.read(rows, used), torch.from_numpy(stored.t[rows]), depth[stored.image[rows]]

    train(network, head_loss, batch, recipe, out, contents(stored.rows, depth))
    meaning = {key: study["depth"][key] for key in ("near", "far", "coding")}
    save_module(network, {"blocks": names, "channels": stored.channels, "sizes": sizes, "depth": meaning}, out)
    count = int(stored.image.max()) + 1
    write_csv(_validate_heads(study, network, names, count, labels[:count], validation, validation_features), metrics)
    write_provenance(out, study, started, labels=count, heads=names, variant=variant)
    finished(out)


def _validate_heads(study: Study, network, names: dict, count: int, labels: np.ndarray, validation: Path, validation_features: Path) -> pd.DataFrame:
    """Depth errors of every head, and of the mean training map, on each validation image at each noise level."""
    from dag.metrics.depth_errors import DepthProtocol

    protocol, aligned = (DepthProtocol(alignment=how, max_depth=study["depth"]["far"]) for how in ("none", "scale_shift"))
    stored, arrays = FeatureFile(validation_features), read(validation)
    rows = []
    for t in sorted(set(stored.t)):
        index = np.flatnonzero(stored.t == t)
        true, ids = arrays["depth"][stored.image[index]], arrays["ids"][stored.image[index]]
        valid = arrays["valid"][stored.image[index]] if "valid" in arrays else None
        estimates = {"constant": np.broadcast_to(coding(study).mean(labels), true.shape)}
        with torch.inference_mode():
            for name, head in network.items():
                parts = []
                for i in np.array_split(index, max(1, len(index) // 32)):
                    found, steps = on(here(), (stored.read(i, names[name]), torch.full((len(i),), int(t))))
                    parts.append(head(found, steps, true.shape[-1]))
                estimates[name] = coding(study).decode(torch.cat(parts))[:, 0].cpu().numpy()
        for name, estimate in estimates.items():
            blocks = "+".join(map(str, names.get(name, [])))
            records = protocol.evaluate(estimate, true, valid)
            if not study.drawn:  # real depth is compared with other work in this alignment
                records = [{**r, "abs_rel_aligned": a["abs_rel"]} for r, a in zip(records, aligned.evaluate(estimate, true, valid), strict=True)]
            for i, errors in zip(ids, records, strict=True):
                rows.append({"head": name, "blocks": blocks, "labels": count, "t": int(t), "image": int(i), **errors})
    return pd.DataFrame(rows)


def prior(study: Study, *, resolution: int, data: Path, out: Path, pixels: Literal["in_place", "shuffled"] = "in_place", variant: str = "none") -> None:
    """Train the diffusion prior over depth maps at one resolution, on depth alone.

    pixels: "in_place", or "shuffled", a control: a prior over depth maps whose pixels lie in random order. variant: of the config's `variants`.
    Several processes (prior.training.processes) share every batch: up to rounding they train as one does. Raises ValueError on a resolution
    that the config does not name.
    """
    if pixels not in ("in_place", "shuffled"):
        raise ValueError(f"--pixels is {pixels!r}, expected in_place or shuffled")
    study = study.varied(variant)
    if resolution not in study["prior"]["resolutions"]:
        raise ValueError(f"--resolution is {resolution}, expected one of prior.resolutions, {study['prior']['resolutions']}")
    recipe = Recipe(**study["prior"]["training"])
    in_processes(_prior, recipe.processes, study, recipe, resolution, data, out, pixels, variant)


def _prior(rank: int, study: Study, recipe: Recipe, resolution: int, data: Path, out: Path, pixels: str, variant: str) -> None:
    import torch.nn.functional as F
    from diffusers.models.unets.unet_2d import UNet2DModel

    from dag.controls import shuffled_pixels
    from dag.weights import save_unet

    started = time.time()
    depth = coding(study).encode(torch.from_numpy(read(data, "depth", only=True)["depth"]))[:, None]
    depth = F.interpolate(depth, size=(resolution, resolution), mode="area")
    if pixels == "shuffled":
        depth = shuffled_pixels(depth)
    torch.manual_seed(recipe.seed)
    network = UNet2DModel(sample_size=resolution, in_channels=1, out_channels=1, **study["prior"]["architecture"])
    kind, diffusion = study["prior"]["prediction_type"], Diffusion()

    def batch(step: int) -> tuple[torch.Tensor, ...]:
        whole = noised(depth[pick(step, len(depth), recipe.batch_size)], diffusion, generator(recipe.seed, step))
        return tuple(part.chunk(recipe.processes)[rank] for part in whole)

    train(network, denoising_loss(diffusion, kind), batch, recipe, out, kind + contents(depth))
    if rank == 0:
        save_unet(network, out, prediction_type=kind, diffusion=diffusion, dtype=torch.float32)
        write_provenance(out, study, started, resolution=resolution, depth_maps=len(depth), pixels=pixels, variant=variant)
        finished(out)


def judge(study: Study, *, out: Path, data: Path | None = None, name: Literal["judge", "second_judge"] = "judge") -> None:
    """The depth judge of dFID: trained on the pictures of `data.judge` (data), or the pretrained network that the config names.

    Of a pretrained one the file holds its name and the hashes of its weights. name: the section of the config that describes it.
    """
    from dag.estimators import load_pretrained
    from dag.weights import save_module

    started, size = time.time(), study["domain"]["size"]
    if name not in study.config:
        raise ValueError(f"{study.source}: {name} is missing; the stage `judge` needs it")
    if "model" in (section := study[name]):
        _, facts = load_pretrained(section["model"], coding(study), section.get("output", "inverse"), section.get("bounds"))
        save_module(torch.nn.Module(), {"pretrained": {**section, "sha256": facts["sha256"]}}, out)
        write_provenance(out, study, started, judge=facts)
        return
    if data is None:
        raise ValueError(f"{name}: --data is missing: {name}.model names no pretrained network, so one is trained on pictures")
    recipe, architecture, arrays = Recipe(**section["training"]), {"sample_size": size, **section["architecture"]}, read(data, "images", "depth")
    pairs = to_tensor(arrays["images"]), coding(study).encode(torch.from_numpy(arrays["depth"]))[:, None]
    network = train_depth(*pairs, architecture, recipe, out, augment=section.get("augment", False))
    save_module(network, {"architecture": architecture}, out)
    write_provenance(out, study, started)
    finished(out)
