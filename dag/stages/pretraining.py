"""The U-Net that a study takes as given: pretrain and snapshot train it on the domain's pictures, convert brings a published one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dag import accelerator
from dag.accelerator import here
from dag.data.images import to_tensor
from dag.data.squares import RandomSquares
from dag.diffusion import Diffusion
from dag.processes import in_processes
from dag.stages.artefacts import write_csv, write_provenance, writing
from dag.stages.data import pictures
from dag.stages.models import saved_beside
from dag.stages.study import Study
from dag.training import Recipe, denoising_loss, fit, generator, noised


def pretrain(study: Study, *, out: Path, images: int | None = None) -> None:
    """Train the study's U-Net and write it as a diffusers folder with its model card.

    Of a drawn domain every scene is seen once; the pictures of a dataset are seen again and again, as random squares, mirrored or not.
    Processes share every batch, each on one thread; a killed training goes on from its saved state with the same bits. images: train by the
    same recipe, but on about so many, the whole batches of it.
    """
    if missing := [key for key in ("architecture", "prediction_type", "training") if key not in study["unet"]]:
        raise ValueError(f"{study.source}: unet.{missing[0]} is missing; `pretrain` needs it")
    recipe = Recipe(**study["unet"]["training"])
    if images is not None:
        recipe = shortened(recipe, images)
    needed, available = recipe.steps * recipe.batch_size, study.uses["unet"].count
    if study.drawn and needed > available:
        raise ValueError(f"unet.training draws {needed} scenes (steps x batch_size); data.unet has {available}")
    out.parent.mkdir(parents=True, exist_ok=True)
    # One thread draws too slowly for a GPU: the job's other CPUs help, each on batches of its own.
    workers = max(0, torch.get_num_threads() // recipe.processes - 1) if here().type == "cuda" else 0
    in_processes(_pretrain, recipe.processes, study, recipe, out, workers)


def shortened(recipe: Recipe, images: int) -> Recipe:
    """The recipe for a training on fewer images, a whole number of batches; the warm-up takes at most a tenth of it."""
    steps = round(images / recipe.batch_size)
    return replace(recipe, steps=steps, warmup=min(recipe.warmup, steps // 10))


def _pretrain(rank: int, study: Study, recipe: Recipe, out: Path, workers: int) -> None:
    from diffusers.models.unets.unet_2d import UNet2DModel

    from dag.weights import save_unet

    started, size = time.time(), study["domain"]["size"]
    kind, diffusion, share = study["unet"]["prediction_type"], Diffusion(), recipe.batch_size // recipe.processes
    torch.manual_seed(recipe.seed)
    network = UNet2DModel(sample_size=size, in_channels=3, out_channels=3, **study["unet"]["architecture"]).to(here())

    squares, data = training_squares(study)

    def batch(step: int) -> tuple[torch.Tensor, ...]:
        start = step * recipe.batch_size + rank * share
        # Each process draws scenes and noise of its own share alone: models/rooms32 was trained so.
        return noised(to_tensor(squares(np.arange(start, start + share))), diffusion, generator(recipe.seed, step, rank))

    state, log = saved_beside(out)
    if rank == 0 and not state.exists():
        log.unlink(missing_ok=True)
    # A state of another config is refused, not dropped: it may hold hours of work.
    fit(network, denoising_loss(diffusion, kind), batch, recipe, state=state, log=log, name=out.stem, data=data, workers=workers)
    if rank == 0:
        save_unet(network, out, prediction_type=kind, diffusion=diffusion)
        write_model_card(study, recipe, out, log, recipe.steps)
        write_provenance(out, study, started, parameters=sum(p.numel() for p in network.parameters()))
        state.unlink(missing_ok=True)


def training_squares(study: Study) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """Pictures (n, s, s, 3) uint8 by their positions in the order of training, whole numbers from 0, and what tells them from others."""
    source, index = pictures(study, "unet")
    size, name = study["domain"]["size"], study["domain"]["name"]
    if study.drawn:
        first = int(index[0])
        return lambda positions: source.squares(first + positions, size).images, f"{name} from seed {first}"
    crop = study["unet"].get("crop", 1.0)
    return RandomSquares((source.image(int(i))[source.part] for i in index), size, crop), f"{name} {study['data']['unet']}, squares from {crop}"


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


def convert(source: str, out: Path, *, flags: str | None = None, precision: str = "fp16") -> None:
    """Write a pretrained U-Net as a diffusers folder, which `UNet2DModel.from_pretrained` and `DDPMPipeline.from_pretrained` read.

    source: a guided-diffusion .pt, a diffusers folder or hub name, or a .safetensors of this project. flags: for a .pt without its flags
    beside it, their file or the name of a preset. precision: fp16, bf16 or fp32 weights. What it was made from is in source.json there.
    """
    from dag.weights import load_unet, save_unet

    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if precision not in kinds:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(kinds)}")
    unet, meta = load_unet(source, flags)
    diffusion = Diffusion(meta["num_timesteps"], meta["beta_start"], meta["beta_end"], meta["beta_schedule"])
    save_unet(unet, out, prediction_type=meta["prediction_type"], diffusion=diffusion, dtype=kinds[precision], flat=True)
    with writing(out / "source.json") as aside:
        aside.write_text(json.dumps({"source": source, "flags": flags, "precision": precision, **meta}, indent=1) + "\n")


def write_model_card(study: Study, recipe: Recipe, out: Path, log: Path, steps: int) -> None:
    """README.md (the model card) and training.csv (the loss curve) beside the weights. steps: how many were made."""
    from dag.weights import sha256

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    # A resumed training logs the steps since its last state again: the last line of a step counts.
    curve = pd.DataFrame({row["step"]: row for row in lines if row["step"] <= steps}.values()).sort_values("step")
    done = steps == recipe.steps
    progress = f"{steps:,} steps" if done else f"a snapshot after {steps:,} of {recipe.steps:,} steps"
    whole = recipe.steps == Recipe(**study["unet"]["training"]).steps
    config = "" if study["study"] == "rooms" else f" --configfile config/{study['study']}.yaml"  # that of rooms is Snakemake's default
    command = f"`snakemake --cores all {'pretrain' if whole else 'gain'}{config}`" + ("" if done else ", from whose saved state `dag snapshot` wrote this")
    write_csv(curve[["step", "loss", "learning_rate"]], out / "training.csv")
    weights = out / "unet" / "diffusion_pytorch_model.safetensors"
    size, name = study["domain"]["size"], study["domain"]["name"]
    unet, tail = study["unet"], curve.loss.tail(10).mean()
    facts = {
        "data": _data(study, steps * recipe.batch_size),
        "architecture": "UNet2DModel: " + ", ".join(f"{key} {value}" for key, value in unet["architecture"].items()),
        "prediction type": f"{unet['prediction_type']}; T = 1000, linear betas 1e-4..0.02",
        "training": f"{progress} of {recipe.batch_size}, AdamW, learning rate {recipe.learning_rate:g} with warm-up over {recipe.warmup} steps and "
        f"cosine decay, EMA {recipe.ema}, {recipe.precision}, seed {recipe.seed}, {recipe.processes} processes on {accelerator.name()}",
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

Meant for studying guidance on a small machine: {f"its {name} are drawn, not photographed" if study.drawn else "it has seen few pictures and may repeat them"}.
"""
    with writing(out / "README.md") as aside:
        aside.write_text(card)


def _data(study: Study, seen: int) -> str:
    name, use = study["domain"]["name"], study.uses["unet"]
    if study.drawn:
        return f"{seen:,} drawn scenes of the domain `{name}`, seeds {use.first} on, each seen once"
    part = f"`{study['data']['unet']}`" if use.split or use.count else "all pictures"
    return f"{seen:,} random squares, mirrored or not, of the domain `{name}`, {part}; smallest side {study['unet'].get('crop', 1.0):g} of the short one"
