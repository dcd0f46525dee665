"""Stage plan: what a study costs on GPUs, in operations, hours, memory and disk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml
from torch import nn

from dag.stages.artefacts import writing
from dag.stages.counting import Counted, trained
from dag.stages.resources import CORE_GFLOPS, measuring
from dag.stages.study import Study, decoder_block_count

TRAINING = 3  # a step of training is a forward pass and one backward pass, which counts twice: for the inputs and for the weights
GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """One row of the plan. flop: of all jobs; precision: "bf16", "fp32", or "float64" on CPU cores; weights, activations: bytes in the memory of one GPU
    at once (of a core's job: in the machine's); disk: bytes written; formula: of flop."""

    stage: str
    jobs: int
    flop: float
    formula: str
    precision: str = "fp32"
    weights: float = 0
    activations: float = 0
    disk: float = 0

    @property
    def memory(self) -> float:
        return (self.weights + self.activations) / GIB

    def hours(self, gpu, share: float) -> float:
        """Of one GPU, a row of the table of GPUs; a stage on cores takes none."""
        if self.precision == "float64":
            return 0.0
        return self.flop / (share * 1e12 * (gpu.bf16_tflops if self.precision == "bf16" else gpu.tf32_tflops)) / 3600


def size(module: nn.Module) -> int:
    """Bytes of its parameters in fp32."""
    return 4 * sum(p.numel() for p in module.parameters())


def costs(study: Study, c: Counted) -> list[Cost]:
    """The rows of the plan, in the order of the study."""
    uses = {use: where.count or 0 for use, where in study.uses.items() if use != "unet" and (use != "judge" or study.trains_judge)}
    return [*_data(study, c, uses), *_trainings(study, c), *_samples(study, c), *_measurements(study, c, uses)]


def _data(study: Study, c: Counted, uses: dict[str, int]) -> Iterator[Cost]:
    s, heads, pictures = c.size, study["heads"], sum(uses.values())
    yield Cost("prepare", len(uses), 0, "no network", disk=3 * s * s * pictures)
    if "estimator" in study.config:
        yield Cost("label", len(uses), pictures * c.estimator, "pictures x estimator", disk=7 * s * s * pictures)
    stored = {n: n * levels for n, levels in heads["labels"].items()}
    every, few = (2 * sum(a * b * d for block, (a, b, d) in c.shapes.items() if blocks is None or block in blocks) for blocks in (None, c.taps))
    validation = uses["validation"] * len(heads["validation_t"])
    numbers = sum(rows * (every if n == heads["guide"] else few) for n, rows in stored.items()) + validation * every
    flop = sum(rows * (c.forward if n == heads["guide"] else c.to_taps) for n, rows in stored.items()) + validation * c.forward
    yield Cost("features", len(stored) + 1, flop, "images x levels x U-Net (to the last tap, or whole)", weights=size(c.unet), disk=numbers)


def _trainings(study: Study, c: Counted) -> Iterator[Cost]:
    """Variants, and the prior of a control, are counted as the networks that they stand for."""
    recipe, blocks, runs = study["heads"]["training"], decoder_block_count(study.unet_architecture()), study.runs
    varied = {(row.heads, variant) for name, row in runs.iterrows() if (variant := study.variant_of(name, "heads"))}
    pairs = len(study["heads"]["labels"]) + len(varied)
    flop = TRAINING * recipe["steps"] * recipe["batch_size"] * c.head * (pairs + blocks / 2)
    yield Cost("heads", pairs + 1, flop, f"{TRAINING} x steps x batch x heads, and one on each block")
    recipe = study["prior"]["training"]
    processes, parts = recipe.get("processes", 1), recipe.get("gradient_accumulation_steps", 1)
    at_once = recipe["batch_size"] // (processes * parts)
    formula = f"{TRAINING} x steps x batch x prior; memory of {at_once} = {recipe['batch_size']} / ({processes} GPU{'s' * (processes > 1)} x {parts} parts)"
    priors = {(row.prior, study.variant_of(name, "prior"), row.control == "shuffled_prior") for name, row in runs.iterrows()}
    for side in sorted({side for side, *_ in priors}):
        jobs = sum(side == other for other, *_ in priors)
        flop = TRAINING * recipe["steps"] * recipe["batch_size"] * c.prior[side] * jobs
        held = {"weights": 4 * size(c.priors[side]), "activations": at_once * trained(c.priors[side], side)}
        yield Cost(f"prior {side}", jobs, flop, formula, recipe.get("precision", "fp32"), **held)


def _samples(study: Study, c: Counted) -> Iterator[Cost]:
    section, s = study["sampling"], c.size
    for name, row in study.runs.iterrows():
        one, kept = c.guided[bool(row.w_dc), row.prior if row.w_dp else None]
        weights = size(c.unet) + size(c.heads) + (size(c.priors[row.prior]) if row.w_dp else 0)
        jobs = math.ceil(row.n / (study.compute["shard_size"] or row.n))
        held = {"weights": weights, "activations": kept * section["batch_size"], "disk": 3 * s * s * row.n}
        yield Cost(f"sample {name}", jobs, row.n * row.steps * one, f"{row.n:,} x {row.steps} steps", section.get("precision", "fp32"), **held)


def _measurements(study: Study, c: Counted, uses: dict[str, int]) -> Iterator[Cost]:
    s, section, runs = c.size, study["evaluation"], study.runs
    described = int(runs.n.sum()) + uses["reference"] + uses["heldout"]
    flop = described * (c.judge + c.to_taps + c.head + 2 * c.extractor)
    disk = described * (8 * s * s + 12 * section["dims"])
    yield Cost("describe", len(runs) + 2, flop, "pictures x (judge + U-Net to the last tap + heads + 2 x extractor)", weights=size(c.unet), disk=disk)
    yield Cost("known answers", 1, 10 * uses["heldout"] * c.extractor, "10 x held-out pictures x extractor")
    for stage in ("moments", "measure_sweep", "measure"):
        mib, gflop = measuring(study, stage, uses["reference"])
        hours = gflop / CORE_GFLOPS / 3600
        yield Cost(stage.replace("_", ", "), 1, gflop * 1e9, f"{hours:,.1f} core-hours at {CORE_GFLOPS} GFLOP/s a core", "float64", mib * 2**20)
    section = study["downstream"]
    recipe, trainings = section["training"], (1 + len(section["sources"])) * section["seeds"]
    flop = trainings * (TRAINING * recipe["steps"] * recipe["batch_size"] + uses["test"]) * c.down
    formula = f"sources x seeds x {TRAINING} x steps x batch x network"
    yield Cost("downstream", 2 + len(section["sources"]), flop, formula, recipe.get("precision", "fp32"))


def plan(study: Study, *, gpus: Path, out: Path, more: Path | None = None, share: float = 0.3) -> None:
    """Write what the study costs: FLOP, GPU-hours, memory and disk of each stage, with the formulae.

    gpus: a table of GPUs with their peak throughput and memory. more: keys of the config that another size of the study has, which is planned
    too. share: of a GPU's peak which a job is taken to reach.
    """
    studies = [study]
    if more is not None:
        changes = yaml.safe_load(more.read_text())
        changed = {key: {**study[key], **value} if isinstance(value, dict) else value for key, value in changes.items()}
        studies.append(Study({**study.config, **changed}, str(more)))
    counted, table = Counted(study), pd.read_csv(gpus, sep="\t")
    lines = [*_head(study, counted, share), *(line for each in studies for line in _section(each, costs(each, counted), table, share))]
    with writing(out) as aside:
        aside.write_text("\n".join(lines) + "\n")


def _head(study: Study, c: Counted, share: float) -> Iterator[str]:
    yield f"""# What the study `{study["study"]}` costs

Written by `snakemake plan` from {json.dumps(study["runs"])} and the study's config; nothing here is measured. FLOP are counted on the real
architectures, built without weights, by PyTorch's own counter (matrix products and convolutions; a multiplication and an addition are two).
GPU-hours = FLOP / ({share:g} x peak x 3600 s), the peak of bf16 where a stage says so and of TF32 elsewhere (`config/gpus.tsv`); that a job reaches
the share {share:g} of it is an assumption. Memory of one GPU = weights (of a training four times: gradient and optimiser) + pictures at once x activations
that are kept for the gradient, in fp32; of stages in core-hours it is the machine's.

## One picture

| network | GFLOP |
|---|---|"""
    one = {"U-Net": c.forward, "U-Net to the last tap": c.to_taps, "heads, strong and weak": c.head}
    one |= {f"prior at {side}": flop for side, flop in c.prior.items()}
    one |= {"guided step, DCG": c.guided[True, None][0]}
    one |= {f"guided step, DCG and DPG at {side}": c.guided[True, side][0] for side in c.priors}
    one |= {"depth estimator": c.estimator, "judge": c.judge, "feature extractor": c.extractor, "downstream network": c.down}
    yield from (f"| {name} | {flop / 1e9:,.1f} |" for name, flop in one.items() if flop)


def _section(study: Study, rows: list[Cost], gpus: pd.DataFrame, share: float) -> Iterator[str]:
    """The table of one size of the study, and which GPUs hold its jobs."""
    machines = list(gpus.itertuples())
    sizes = sorted({n for n, tables in zip(study.runs.n, study.runs.tables, strict=True) if "fig8" not in tables})
    yield from ("", f"## {', '.join(f'{n:,}' for n in sizes)} samples a run", "")
    yield "| stage | jobs | PFLOP | memory, GiB | disk, GB | " + " | ".join(f"{g.gpu}, h" for g in machines) + " | formula |"
    yield "|---" * (6 + len(machines)) + "|"
    for r in rows:
        hours = " | ".join(f"{r.hours(g, share):,.2f}" if r.precision != "float64" else "–" for g in machines)
        memory = f"{r.memory:.1f}" if r.memory else ""
        yield f"| {r.stage} | {r.jobs} | {r.flop / 1e15:,.2f} | {memory} | {r.disk / 1e9:,.1f} | {hours} | {r.formula} |"
    total = " | ".join(f"{sum(r.hours(g, share) for r in rows):,.1f}" for g in machines)
    disk, jobs, flop = (sum(getattr(r, key) for r in rows) for key in ("disk", "jobs", "flop"))
    yield f"| **all** | {jobs} | {flop / 1e15:,.1f} | | {disk / 1e9:,.1f} | {total} | |"
    yield ""
    need = {r.stage: r.memory for r in rows if r.precision != "float64"}
    for g in machines:
        larger = [stage for stage, gib in need.items() if gib >= g.memory_gib]
        held = "every job" if not larger else f"all but {', '.join(larger)}: lower sampling.batch_size, or raise prior.training.gradient_accumulation_steps"
        yield f"- {g.gpu}, {g.memory_gib:g} GiB, holds {held}."
