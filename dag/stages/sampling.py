"""Stages sample (one run of the run sheet) and trajectory (a few seeds, watched on their way)."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dag import controls
from dag.accelerator import here
from dag.data.images import to_uint8
from dag.diffusion import Diffusion, respace
from dag.guidance import Consistency, DepthGuidance, Prior, UNetPredictor
from dag.heads import load_heads
from dag.interruption import Interrupted, noticing
from dag.sampling import Predict, SampleRNG, guidance_strength, sample_ddim, sample_ddpm
from dag.stages.artefacts import code_hash, content_hash, digest, write_provenance, writing
from dag.stages.shards import Drawn, split
from dag.stages.sheet import guidance_kind, span
from dag.stages.study import Study

# How U-Net and prior are computed where the config's `sampling` does not say.
COMPUTED = {"precision": "fp32", "channels_last": True, "checkpoint": False}


def predictor(study: Study, unet: Path) -> tuple[UNetPredictor, Diffusion, int]:
    """The U-Net as a predictor that computes as the config says, its diffusion, and its image size."""
    plain = UNetPredictor.load(unet, **{key: study["sampling"].get(key, usual) for key, usual in COMPUTED.items()})
    plain.unet.to(here())
    return plain, plain.diffusion, plain.unet.config.sample_size


def resolve(run: dict, scale: Path | None) -> dict:
    """The run with every weight `best` replaced by the optimum that the sweep found for runs of its kind."""
    if "best" not in (run["w_dc"], run["w_dp"]):
        return run
    if scale is None:
        raise ValueError(f"run {run['run']!r} has a weight 'best': --scale must name the file of the stage `scale`")
    best = json.loads(Path(scale).read_text())[guidance_kind(run)]
    return {**run, **{key: best[key] for key in ("w_dc", "w_dp") if run[key] == "best"}}


def guided(study: Study, run: dict, plain: UNetPredictor, heads: Path, prior: Path) -> Predict:
    """The predictor of a run, from its weights, heads and prior, and what its column `control` takes away."""
    reduction, terms = study["sampling"]["reduction"], []
    if run["w_dc"]:
        terms.append(Consistency(run["w_dc"], reduction))
    if run["w_dp"]:
        network, diffusion, resolution = predictor(study, prior)
        terms.append(Prior(run["w_dp"], network.eps, diffusion, resolution, span(run["tau"]), reduction))
    network = load_heads(heads).to(here())
    if run["control"] == "random_heads":
        network = controls.randomised(network)
    predict = DepthGuidance(plain, network, terms, span(run["window"]))
    wrappers = {"flipped": controls.flipped, "noise": controls.noise_instead}
    return wrappers[run["control"]](predict) if run["control"] in wrappers else predict


def trace(run: dict, predict, diffusion: Diffusion, size: int, seeds: list[int], study: Study, callback=None) -> torch.Tensor:
    """Images (b, 3, size, size) in [-1, 1] of one batch of seeds."""
    rng = SampleRNG(seeds, here())
    x = rng.randn("init", (3, size, size))
    timesteps = respace(diffusion.num_timesteps, run["steps"], run["sampler"])
    options = {"rule": run["rule"], "rng": rng, "clip": study["sampling"]["clip"], "callback": callback}
    if run["sampler"] == "ddim":
        return sample_ddim(predict, x, timesteps, diffusion, eta=run["eta"], **options)
    return sample_ddpm(predict, x, timesteps, diffusion, variance=study["sampling"]["variance"], **options)


def sample(
    study: Study,
    *,
    run: list[str],
    unet: Path,
    heads: list[Path],
    prior: list[Path],
    out: list[Path],
    scale: Path | None = None,
    first: int | None = None,
    stop: int | None = None,
) -> None:
    """Draw the samples of runs one after the other, with one U-Net: images, seeds, and the guidance's telemetry.

    heads, prior, out: one for each run, in the order of run. first, stop: draw only the seeds from first to before stop, a shard of a single run.
    Batches that an earlier try finished are kept, and a run that is there already, whole and of the same recipe, stays as it is.
    """
    if len({len(run), len(heads), len(prior), len(out)}) > 1:
        raise ValueError(f"{len(run)} runs, {len(heads)} files of heads, {len(prior)} priors and {len(out)} files to write, expected one of each for a run")
    if (first, stop) != (None, None) and len(run) > 1:
        raise ValueError(f"first and stop are a shard of one run, but there are {len(run)}: {', '.join(run)}")
    plain, done = predictor(study, unet), []
    for name, its_heads, its_prior, its_out in zip(run, heads, prior, out, strict=True):
        row = resolve(study.run(name), scale)
        files = [unet, its_heads, its_prior]
        study.inputs = [*files, *([scale] if scale else [])]
        start = row["first_seed"] if first is None else first
        seeds = range(start, row["first_seed"] + row["n"] if stop is None else stop)
        done.append(_sample(study, row, seeds, plain, files, its_out))
    # Not before: where a job ends early, Snakemake removes what it has written, and the batches are all there is of the runs before.
    for drawn in done:
        drawn.clear()


def _sample(study: Study, row: dict, seeds: range, plain: tuple[UNetPredictor, Diffusion, int], files: list[Path], out: Path) -> Drawn:
    """Write the samples of some seeds of a run, and what drew them. files: U-Net, heads, prior."""
    started, (unet, diffusion, size) = time.time(), plain
    recipe = sample_recipe(study, row, files)
    drawn = Drawn(out, recipe, study["sampling"]["batch_size"])
    if drawn.has_all(seeds, study.inputs):
        return drawn
    predict = guided(study, row, unet, *files[1:])
    drawn.take_in_earlier()
    batches = split(seeds.start, len(seeds), study["sampling"]["batch_size"])
    missing = [batch for batch in batches if drawn.find(*batch) is None]
    with noticing() as asked_to_stop:
        for start, end in tqdm(missing, desc=row["run"], unit="batch", disable=None):
            records: list[dict] = []

            def watch(step, records=records) -> None:
                records.append({"t": int(step.t[0]), **_telemetry(step)})
                if signal := asked_to_stop():
                    raise Interrupted(signal, f"{out} keeps its {len(drawn.parts)} finished batches")

            clock, batch = time.perf_counter(), list(range(start, end))
            images = to_uint8(trace(row, predict, diffusion, size, batch, study, watch))
            facts = {"seconds_per_sample": (time.perf_counter() - clock) / len(batch), "unet_evaluations": len(records)}
            drawn.add({"images": images, "seeds": np.array(batch), **_stack(records)}, unet_gradients=sum("grad_rms" in r for r in records), **facts)
    facts = drawn.join(batches)
    write_provenance(out, study, started, run=row, seeds=[seeds.start, len(seeds)], recipe=recipe, **facts)
    return drawn


def sample_recipe(study: Study, row: dict, files: list[Path]) -> str:
    """Hash of all that a sample depends on besides its seed: samples of one recipe belong together."""
    row = {key: value for key, value in row.items() if key not in ("run", "n", "first_seed", "tables")}
    versions = [torch.__version__, platform.machine(), torch.get_num_threads(), here().type]
    parts = [row, study["sampling"], [content_hash(file) for file in files], code_hash("stages.sampling"), versions]
    return digest(json.dumps(parts, sort_keys=True, default=str))


def _telemetry(step) -> dict:
    """Losses and strength of guidance in one step, (b,) each; nothing where it did not act."""
    if step.shift is None:
        return {}
    losses = {f"loss_{name}": loss for name, loss in step.prediction.losses.items()}
    return {name: value.cpu().numpy() for name, value in {**losses, **guidance_strength(step)}.items()}


def _stack(records: list[dict]) -> dict[str, np.ndarray]:
    """Per-step records of a batch as arrays (steps, n), zero where guidance did not act."""
    stacked = {"t": np.array([r["t"] for r in records])}
    for key in sorted({k for r in records for k in r} - {"t"}):
        width = next(len(r[key]) for r in records if key in r)
        stacked[key] = np.stack([r.get(key, np.zeros(width)) for r in records]).astype(np.float32)
    return stacked


def trajectory(study: Study, *, run: str, unet: Path, heads: Path, prior: Path, out: Path, scale: Path | None = None) -> None:
    """Noisy image, predicted image and depth read from both heads at some steps of a run (fig. 3)."""
    from dag.stages.models import coding

    started = time.time()
    row = resolve(study.run(run), scale)
    plain, diffusion, size = predictor(study, unet)
    network, code = load_heads(heads).to(here()), coding(study)
    blocks = sorted({b for head in network.values() for b in head.blocks})
    seeds = list(range(row["first_seed"], row["first_seed"] + study["figures"]["trajectory_seeds"]))
    timesteps = respace(diffusion.num_timesteps, row["steps"], row["sampler"])
    wanted = {int(timesteps[np.abs(timesteps - t).argmin()]) for t in study["figures"]["trajectory_t"]}
    frames: list[dict] = []

    def watch(step) -> None:
        if int(step.t[0]) not in wanted:
            return
        with torch.inference_mode():
            _, found = plain.taps(step.x_t, step.t, blocks, with_grad=False)
            depths = {name: code.decode(head(found, step.t, size))[:, 0].cpu().numpy() for name, head in network.items()}
        pictures = {"x_t": to_uint8(step.x_t), "pred_xstart": to_uint8(step.pred_xstart)}
        frames.append({"t": int(step.t[0]), **pictures, **depths})

    trace(row, guided(study, row, plain, heads, prior), diffusion, size, seeds, study, watch)
    with writing(out) as aside:
        np.savez(aside, seeds=np.array(seeds), **{k: np.stack([f[k] for f in frames]) for k in frames[0]})
    write_provenance(out, study, started, run=row)


def read_depth(images: torch.Tensor, seeds: list[int], plain: UNetPredictor, head, t: int) -> torch.Tensor:
    """Coded depth (b, 1, s, s) that a head reads from finished images (b, 3, s, s), whose noise belongs to their seeds."""
    return plain.read_depth(head, images, t, SampleRNG(seeds, images.device).randn("read", images.shape[1:]))
