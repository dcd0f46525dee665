"""Stages that make networks: pretrain (the U-Net), features, heads, prior, judge."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dag.data.depth import DepthCoding
from dag.data.features import FeatureFile, write_features
from dag.data.images import to_tensor
from dag.diffusion import Diffusion
from dag.stages.data import draw, read
from dag.stages.study import Study, write_csv, write_provenance, writing
from dag.training import Recipe, denoising_loss, fit, generator, in_processes

# Streams of random choices that are no part of a training's own seed.
_BATCHES, _HEADS = 101, 102


def coding(study: Study) -> DepthCoding:
    return DepthCoding(study["depth"]["near"], study["depth"]["far"], study["depth"]["coding"])


def train(network: torch.nn.Module, loss, batch, recipe: Recipe, out: Path) -> torch.nn.Module:
    """fit with its state and log beside the output; an old log goes when the training starts afresh."""
    out.parent.mkdir(parents=True, exist_ok=True)
    state, log = out.parent / f"{out.stem}.state.pt", out.parent / f"{out.stem}.log.jsonl"
    if not state.exists():
        log.unlink(missing_ok=True)
    return fit(network, loss, batch, recipe, state=state, log=log, name=out.stem)


def finished(out: Path) -> None:
    """Drop the resume state of a training whose result is safely written."""
    (out.parent / f"{out.stem}.state.pt").unlink(missing_ok=True)


def pick(step: int, count: int, size: int) -> np.ndarray:
    """Row numbers of a training batch: random, but a function of the step alone."""
    return torch.randint(count, (size,), generator=generator(_BATCHES, step)).numpy()


def pretrain(study: Study, *, out: Path) -> None:
    """Train the study's U-Net on drawn scenes, each seen once, and write it as a diffusers folder with its model card.

    Processes share every batch, each on one thread; a killed training goes on from its saved state with the same bits.
    """
    recipe = Recipe(**study["unet"]["training"])
    needed, available = recipe.steps * recipe.batch_size, study["data"]["unet"][1]
    if needed > available:
        raise ValueError(f"unet.training draws {needed} scenes (steps x batch_size); data.unet has {available}")
    out.parent.mkdir(parents=True, exist_ok=True)
    in_processes(_pretrain, recipe.processes, study, recipe, out)


def _pretrain(rank: int, study: Study, recipe: Recipe, out: Path) -> None:
    from diffusers.models.unets.unet_2d import UNet2DModel

    from dag.weights import save_unet

    started, size, first = time.time(), study["domain"]["size"], study["data"]["unet"][0]
    kind, diffusion, share = study["unet"]["prediction_type"], Diffusion(), recipe.batch_size // recipe.processes
    torch.manual_seed(recipe.seed)
    network = UNet2DModel(sample_size=size, in_channels=3, out_channels=3, **study["unet"]["architecture"])

    def batch(step: int) -> torch.Tensor:
        start = first + step * recipe.batch_size + rank * share
        return to_tensor(draw(study, np.arange(start, start + share))[0])

    train(network, denoising_loss(diffusion, kind), batch, recipe, out)
    if rank == 0:
        save_unet(network, out, prediction_type=kind, diffusion=diffusion)
        write_model_card(study, recipe, out, out.parent / f"{out.stem}.log.jsonl", recipe.steps)
        write_provenance(out, study, started, parameters=sum(p.numel() for p in network.parameters()))
        finished(out)


def snapshot(study: Study, *, state: Path, log: Path, out: Path) -> None:
    """Write the averaged weights of a U-Net whose training is still going on, to look at or to work with before it is done."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    from dag.weights import check_state, save_unet

    recipe, saved = Recipe(**study["unet"]["training"]), torch.load(state, map_location="cpu", weights_only=True)
    network = UNet2DModel(sample_size=study["domain"]["size"], in_channels=3, out_channels=3, **study["unet"]["architecture"])
    check_state(network, saved["ema"], state)
    network.load_state_dict(saved["ema"])
    save_unet(network, out, prediction_type=study["unet"]["prediction_type"], diffusion=Diffusion())
    write_model_card(study, recipe, out, log, saved["step"])


def write_model_card(study: Study, recipe: Recipe, out: Path, log: Path, steps: int) -> None:
    """README.md (the model card) and training.csv (the loss curve) beside the weights. steps: how many were made."""
    from dag.weights import sha256

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    # A resumed training logs the steps since its last state again: the last line of a step counts.
    curve = pd.DataFrame({row["step"]: row for row in lines if row["step"] <= steps}.values()).sort_values("step")
    done = steps == recipe.steps
    progress = f"{steps:,} steps" if done else f"a snapshot after {steps:,} of {recipe.steps:,} steps"
    command = "`snakemake --cores all pretrain`" + ("" if done else ", from whose saved state `dag snapshot` wrote this")
    write_csv(curve[["step", "loss", "learning_rate"]], out / "training.csv")
    weights = out / "unet" / "diffusion_pytorch_model.safetensors"
    size, name = study["domain"]["size"], study["domain"]["name"]
    unet, tail = study["unet"], curve.loss.tail(10).mean()
    facts = {
        "data": f"{steps * recipe.batch_size:,} drawn scenes of the domain `{name}`, seeds {study['data']['unet'][0]} on, each seen once",
        "architecture": "UNet2DModel: " + ", ".join(f"{key} {value}" for key, value in unet["architecture"].items()),
        "prediction type": f"{unet['prediction_type']}; T = 1000, linear betas 1e-4..0.02",
        "training": f"{progress} of {recipe.batch_size}, AdamW, learning rate {recipe.learning_rate:g} with warm-up over {recipe.warmup} steps and "
        f"cosine decay, EMA {recipe.ema}, {recipe.precision}, seed {recipe.seed}, {recipe.processes} processes",
        "loss": f"{curve.loss.iloc[0]:.4f} at step {curve.step.iloc[0]}, {tail:.4f} in the last ten lines of `training.csv`, the loss curve",
        "weights": f"fp16 safetensors, SHA-256 `{sha256(weights)}`",
        "made by": command,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    card = f"""# {name} {size}x{size}: the small study's pretrained diffusion U-Net

An unconditional pixel-space U-Net in the layout of diffusers: `DDIMPipeline.from_pretrained` reads this folder.

| | |
|---|---|
{table}

Meant for studying guidance on a small machine: its rooms are drawn, not photographed.
"""
    with writing(out / "README.md") as aside:
        aside.write_text(card)


def images_and_depths(study: Study, data: Path, batch_size: int) -> Callable[[int], tuple]:
    """Batches (image, coded depth) of a data file, for depth networks."""
    arrays = read(data)
    images, depth = to_tensor(arrays["images"]), coding(study).encode(torch.from_numpy(arrays["depth"]))[:, None]

    def batch(step: int) -> tuple:
        rows = pick(step, len(images), batch_size)
        return images[rows], depth[rows]

    return batch


def features(study: Study, *, unet: Path, data: Path, levels: str, blocks: str, count: int, out: Path) -> None:
    """Decoder features of the first `count` images of a data file at several noise levels.

    levels: how many timesteps, spread over the whole range, each image is noised to; or "validation", the config's own list.
    blocks: "heads" (those of the strong and weak head) or "all".
    """
    from dag.sampling import SampleRNG
    from dag.unet import feature_shapes, forward_with_taps
    from dag.weights import load_unet

    network, meta = load_unet(unet)
    diffusion = Diffusion(meta["num_timesteps"], meta["beta_start"], meta["beta_end"], meta["beta_schedule"])
    arrays = read(data)
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
            steps = torch.from_numpy(t.reshape(-1)[rows])
            with torch.inference_mode():
                yield forward_with_taps(network, diffusion.q_sample(x_start[image[rows]], steps, noise), steps, shapes, stop_after_taps=True)[1]

    write_features(out, shapes, image, t.reshape(-1), batches())


def spread_timesteps(seed: int, levels: int, num_timesteps: int) -> np.ndarray:
    """One random timestep in each of `levels` equal parts of the range; a function of the seed."""
    return ((np.arange(levels) + np.random.default_rng([seed, levels]).random(levels)) / levels * num_timesteps).astype(int)


def heads(study: Study, *, kind: str, data: Path, features: Path, validation: Path, validation_features: Path, out: Path, metrics: Path) -> None:
    """Train depth heads on stored features and measure them on the validation images.

    kind: "pair" (the strong and the weak head, together) or "blocks" (one head on each single decoder block).
    """
    from dag.heads import build_heads, head_loss
    from dag.weights import save_module

    started = time.time()
    stored, labels = FeatureFile(features), read(data)["depth"]
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

    train(network, head_loss, batch, recipe, out)
    save_module(network, {"blocks": names, "channels": stored.channels, "sizes": sizes}, out)
    count = int(stored.image.max()) + 1
    write_csv(_validate_heads(study, network, names, count, labels[:count], validation, validation_features), metrics)
    write_provenance(out, study, started, labels=count, heads=names)
    finished(out)


def _validate_heads(study: Study, network, names: dict, count: int, labels: np.ndarray, validation: Path, validation_features: Path) -> pd.DataFrame:
    """Depth errors of every head, and of the mean training map, on each validation image at each noise level."""
    from dag.metrics.depth_errors import DepthProtocol

    protocol = DepthProtocol(alignment="none", max_depth=study["depth"]["far"])
    stored, arrays = FeatureFile(validation_features), read(validation)
    rows = []
    for t in sorted(set(stored.t)):
        index = np.flatnonzero(stored.t == t)
        true, ids = arrays["depth"][stored.image[index]], arrays["ids"][stored.image[index]]
        estimates = {"constant": np.broadcast_to(labels.mean(0), true.shape)}
        with torch.inference_mode():
            for name, head in network.items():
                parts = [
                    head(stored.read(i, names[name]), torch.full((len(i),), int(t)), true.shape[-1]) for i in np.array_split(index, max(1, len(index) // 32))
                ]
                estimates[name] = coding(study).decode(torch.cat(parts))[:, 0].numpy()
        for name, estimate in estimates.items():
            blocks = "+".join(map(str, names.get(name, [])))
            for i, errors in zip(ids, protocol.evaluate(estimate, true), strict=True):
                rows.append({"head": name, "blocks": blocks, "labels": count, "t": int(t), "image": int(i), **errors})
    return pd.DataFrame(rows)


def prior(study: Study, *, resolution: int, data: Path, out: Path) -> None:
    """Train the diffusion prior over depth maps at one resolution, on depth alone."""
    import torch.nn.functional as F
    from diffusers.models.unets.unet_2d import UNet2DModel

    from dag.weights import save_unet

    started = time.time()
    depth = coding(study).encode(torch.from_numpy(read(data)["depth"]))[:, None]
    depth = F.interpolate(depth, size=(resolution, resolution), mode="area")
    recipe = Recipe(**study["prior"]["training"])
    torch.manual_seed(recipe.seed)
    network = UNet2DModel(sample_size=resolution, in_channels=1, out_channels=1, **study["prior"]["architecture"])
    kind, diffusion = study["prior"]["prediction_type"], Diffusion()
    train(network, denoising_loss(diffusion, kind), lambda step: depth[pick(step, len(depth), recipe.batch_size)], recipe, out)
    save_unet(network, out, prediction_type=kind, diffusion=diffusion, dtype=torch.float32)
    write_provenance(out, study, started, resolution=resolution, depth_maps=len(depth))
    finished(out)


def judge(study: Study, *, data: Path, out: Path) -> None:
    """Train the depth judge of dFID, on scenes that nothing else uses."""
    from dag.estimators import DepthUNet, depth_loss
    from dag.weights import save_module

    started = time.time()
    recipe, architecture = Recipe(**study["judge"]["training"]), {"sample_size": study["domain"]["size"], **study["judge"]["architecture"]}
    torch.manual_seed(recipe.seed)
    network = DepthUNet(architecture)
    train(network, depth_loss, images_and_depths(study, data, recipe.batch_size), recipe, out)
    save_module(network, {"architecture": architecture}, out)
    write_provenance(out, study, started)
    finished(out)
