"""Stage plan: what a study costs on GPUs, in operations, hours, memory and disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from dag.data.domain import DOMAINS
from dag.stages.artefacts import writing
from dag.stages.counting import Counted, size
from dag.stages.resources import CORE_GFLOPS, PASS_SECONDS, measuring
from dag.stages.study import Study, decoder_block_count

TRAINING = 3  # a step of training is a forward pass and one backward pass, which counts twice: for the inputs and for the weights
COPIES = 4  # of the weights, while they are trained: themselves, their gradient, and the two moments of the optimiser
GIB = 2**30
# Bytes written, by what is written.
PICTURE, DEPTH, FEATURE, NUMBER = 3, 4, 2, 4


@dataclass(frozen=True)
class Cost:
    """One row of the plan. flop: of all jobs; precision: "bf16", "fp32", or "cores" for a stage without a GPU; weights, activations: bytes in the memory
    of one GPU at once (of a stage on cores: in the machine's); disk: bytes written; passes: forward and backward, one after the other, of all trainings;
    formula: of flop, and of the pictures at once where it is not clear."""

    stage: str
    jobs: int
    flop: float
    formula: str
    precision: str = "fp32"
    weights: float = 0
    activations: float = 0
    disk: float = 0
    passes: int = 0

    @property
    def memory(self) -> float:
        return (self.weights + self.activations) / GIB

    def hours(self, gpu, shares: tuple[float, float]) -> float:
        """Of one GPU, a row of the table of GPUs; a stage on cores takes none. shares: of the peaks of TF32 and bf16 that a job reaches."""
        if self.precision == "cores":
            return 0.0
        tf32, bf16 = shares
        seconds = self.flop / (1e12 * (bf16 * gpu.bf16_tflops if self.precision == "bf16" else tf32 * gpu.tf32_tflops))
        return max(seconds, self.passes * PASS_SECONDS) / 3600


def costs(study: Study, c: Counted) -> list[Cost]:
    """The rows of the plan, in the order of the study."""
    uses = {use: _pictures(study, use) for use in study.uses if use != "unet" and (use != "judge" or study.trains_judge)}
    return [*_data(study, c, uses), *_trainings(study, c), *_samples(study, c), *_measurements(study, c, uses)]


def _pictures(study: Study, use: str) -> int:
    """How many a use takes; of a whole split, as many as it officially has, or none where that is not known."""
    where = study.uses[use]
    return where.count or DOMAINS[study.domain_of(use)["name"]].splits.get(where.split, 0)


def _data(study: Study, c: Counted, uses: dict[str, int]) -> Iterator[Cost]:
    pixels, heads, pictures = c.size**2, study["heads"], sum(uses.values())
    without = sum(n for use, n in uses.items() if "estimator" in study.config and study.domain_of(use) is study["domain"])
    yield Cost("prepare", len(uses), 0, "no network", "cores", disk=pixels * (PICTURE * pictures + DEPTH * (pictures - without)))
    if "estimator" in study.config:
        flop, weights = c.estimator
        yield Cost("label", len(uses), without * flop, "pictures without depth x estimator", weights=weights, disk=(PICTURE + DEPTH) * pixels * pictures)
    if study.imports_unet:
        yield Cost("convert unet", 1, 0, "no network", "cores", weights=2 * size(c.unet), disk=size(c.unet))  # itself, and as it is written
    stored = {n: n * levels for n, levels in heads["labels"].items()}
    every, few = (FEATURE * sum(a * b * d for block, (a, b, d) in c.shapes.items() if blocks is None or block in blocks) for blocks in (None, c.taps))
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
    kept, passes = recipe["batch_size"] * c.trained_heads() * max(1, blocks / 2), (pairs + 1) * recipe["steps"]
    held = {"weights": COPIES * size(c.heads), "activations": kept, "disk": pairs * size(c.heads), "passes": passes}
    formula = f"{TRAINING} x steps x batch x heads, for each pair; a head on a single block counts half; memory of single blocks, which are trained together"
    yield Cost("heads", pairs + 1, flop, formula, **held)
    recipe = study["prior"]["training"]
    processes, parts = recipe.get("processes", 1), recipe.get("gradient_accumulation_steps", 1)
    at_once = recipe["batch_size"] // (processes * parts)
    formula = f"{TRAINING} x steps x batch x prior; memory of {at_once} = {recipe['batch_size']} / ({processes} GPU{'s' * (processes > 1)} x {parts} parts)"
    priors = {(row.prior, study.variant_of(name, "prior"), row.control == "shuffled_prior") for name, row in runs.iterrows()}
    for side in sorted({side for side, *_ in priors}):
        jobs = sum(side == other for other, *_ in priors)
        flop = TRAINING * recipe["steps"] * recipe["batch_size"] * c.prior[side] * jobs
        held = {"weights": COPIES * size(c.priors[side]), "activations": at_once * c.trained_prior(side), "disk": jobs * size(c.priors[side])}
        held["passes"] = jobs * recipe["steps"] * parts
        yield Cost(f"prior {side}", jobs, flop, formula, recipe.get("precision", "fp32"), **held)
    if study.trains_judge:
        recipe, (flop, weights) = study["judge"]["training"], c.judge
        yield Cost("judge", 1, TRAINING * recipe["steps"] * recipe["batch_size"] * flop, f"{TRAINING} x steps x batch x judge", disk=weights)
    else:
        yield Cost("judge", 1, 0, "is pretrained", "cores", weights=c.judge[1])


def step_name(consistency: bool, side: int | None) -> str:
    """What a sampling step computes, as the plan calls it."""
    terms = [*(["DCG"] if consistency else []), *([f"DPG at {side}"] if side else [])]
    return f"guided step, {' and '.join(terms)}" if terms else "U-Net"


def _samples(study: Study, c: Counted) -> Iterator[Cost]:
    section, bytes_ = study["sampling"], PICTURE * c.size**2
    precision, shard, joined = section.get("precision", "fp32"), study.compute["shard_size"], []
    for name, row in study.runs.iterrows():
        kind = bool(row.w_dc), row.prior if row.w_dp else None
        one, kept = c.guided[kind]
        weights = size(c.unet) + size(c.heads) + (size(c.priors[row.prior]) if row.w_dp else 0)
        jobs = math.ceil(row.n / (shard or row.n))
        joined += [row.n] if jobs > 1 else []
        held = {"weights": weights, "activations": kept * section["batch_size"], "disk": bytes_ * row.n}
        yield Cost(f"sample {name}", jobs, row.n * row.steps * one, f"{row.n:,} x {row.steps} x {step_name(*kind)}", precision, **held)
        if name == study["figures"]["guided"]:
            few = study["figures"]["trajectory_seeds"]
            held = {"weights": weights, "activations": kept * few}
            drawn = Cost("trajectory", 1, few * row.steps * one, f"{few} x {row.steps} x {step_name(*kind)}", precision, **held)
    yield Cost("join", len(joined), 0, "no network; the parts stay", "cores", disk=bytes_ * sum(joined))
    yield drawn


def _measurements(study: Study, c: Counted, uses: dict[str, int]) -> Iterator[Cost]:
    pixels, section, runs = c.size**2, study["evaluation"], study.runs
    described = int(runs.n.sum()) + uses["reference"] + uses["heldout"]
    flop = described * (c.judge[0] + c.to_taps + c.head + 3 * c.extractor[0])
    formula = "pictures x (judge + U-Net to the last tap + heads + 3 x extractor)"
    weights = size(c.unet) + size(c.heads) + c.judge[1] + c.extractor[1]
    yield Cost("describe", len(runs) + 2, flop, formula, weights=weights, disk=described * (2 * DEPTH * pixels + 3 * NUMBER * section["dims"]))
    faults = 10  # real depth, and three faults of three strengths
    yield Cost("known answers", 1, faults * uses["heldout"] * c.extractor[0], f"{faults} x held-out pictures x extractor", weights=c.extractor[1])
    for stage in ("moments", "measure_sweep", "measure"):
        mib, gflop = measuring(study, stage, uses["reference"])
        hours = gflop / CORE_GFLOPS / 3600
        yield Cost(stage.replace("_", ", "), 1, gflop * 1e9, f"{hours:,.1f} core-hours at {CORE_GFLOPS} GFLOP/s a core", "cores", mib * 2**20)
    section = study["downstream"]
    sources = 1 + len(section["sources"])  # the constant map trains nothing
    # A whole test picture is two squares, and is looked at mirrored, too.
    yield _downstream(
        "downstream", 1 + sources, section["training"], c.downstream, sources * section["seeds"], uses["test"] * (4 if section.get("whole") else 1)
    )
    if c.downstream_whole:
        recipe = section["reference_whole"]["training"]
        yield _downstream("downstream, whole pictures", 1, recipe, c.downstream_whole, section["seeds"], 2 * uses["test"])


def _downstream(stage: str, jobs: int, recipe: dict, network: tuple[int, int, int], trainings: int, tested: int) -> Cost:
    """Of the networks of table 4, of one size. network: FLOP, bytes of parameters and of kept activations for one picture."""
    (one, weights, kept), batch = network, recipe["batch_size"]
    flop = trainings * (TRAINING * recipe["steps"] * batch + tested) * one
    held = {"weights": COPIES * weights, "activations": batch * kept, "passes": trainings * recipe["steps"]}
    formula = f"sources x seeds x ({TRAINING} x steps x batch + test pictures) x network"
    return Cost(stage, jobs, flop, formula, recipe.get("precision", "fp32"), **held)


def plan(study: Study, *, gpus: Path, out: Path, more: Path | None = None, share: float = 0.12, share_bf16: float = 0.05) -> None:
    """Write what the study costs: FLOP, GPU-hours, memory and disk of each stage, with the formulae.

    gpus: a table of GPUs with their peak throughput and memory. more: keys of the config that another size of the study has, which is planned
    too. share, share_bf16: of a GPU's peak in TF32 and in bf16 which a job is taken to reach; an H200 has reached these in guided steps of eight
    pictures of 256 x 256 (docs/performance-gpu.md).
    """
    studies = [study]
    if more is not None:
        changes = yaml.safe_load(more.read_text())
        changed = {key: {**study[key], **value} if isinstance(value, dict) else value for key, value in changes.items()}
        studies.append(Study({**study.config, **changed}, str(more)))
    counted, table, shares = Counted(study), pd.read_csv(gpus, sep="\t"), (share, share_bf16)
    lines = [*_head(study, counted, shares), *(line for each in studies for line in _section(each, costs(each, counted), table, shares))]
    with writing(out) as aside:
        aside.write_text("\n".join(lines) + "\n")


def _head(study: Study, c: Counted, shares: tuple[float, float]) -> Iterator[str]:
    shards = f"samples / {size_:,}, rounded up" if (size_ := study.compute["shard_size"]) else "one"
    yield f"""# What the study `{study["study"]}` costs

Written by `snakemake plan` from the study's config and run sheets; nothing here but a GPU's share of its peak is measured. FLOP are counted on the real
architectures, built without weights, by PyTorch's own counter (matrix products and convolutions; a multiplication and an addition are two).

- GPU-hours = FLOP / (share x peak x 3600 s), the peak of bf16 and {shares[1]:g} of it where a stage says so, of TF32 and {shares[0]:g} of it elsewhere
  (`config/gpus.tsv`). That jobs reach these shares is measured on one GPU, in guided steps (`docs/performance-gpu.md`), and assumed of all. A training takes
  at least steps x parts x {PASS_SECONDS:g} s, as a small network keeps the GPU waiting for the host; that is an assumption, too. Reading stored features is
  not counted. A stage without a GPU has none.
- Jobs = one for each file that a stage writes; of a run, {shards}.
- Memory of one GPU = weights ({COPIES} times those of a training: themselves, gradient, two moments of the optimiser) + pictures at once x activations
  that are kept for the gradient, in fp32: an upper bound where a stage computes in bf16. Of a stage without a GPU it is the machine's.
- Disk = pictures x pixels x {PICTURE} bytes, {PICTURE + DEPTH} with depth; {FEATURE} bytes for each number of stored features; {2 * DEPTH} bytes a pixel and
  {3 * NUMBER} a feature's dimension for each described picture; {NUMBER} bytes a parameter. The assets themselves come on top.

## One picture

| network | GFLOP |
|---|---|"""
    one = {step_name(False, None): c.forward, "U-Net to the last tap": c.to_taps, "heads, strong and weak": c.head}
    one |= {f"prior at {side}": flop for side, flop in c.prior.items()}
    one |= {step_name(*kind): flop for kind, (flop, _) in c.guided.items()}
    one |= {"depth estimator": c.estimator[0], "judge": c.judge[0], "feature extractor": c.extractor[0], "downstream network": c.downstream[0]}
    one |= {"downstream network, whole pictures": c.downstream_whole[0]} if c.downstream_whole else {}
    yield from (f"| {name} | {flop / 1e9:,.1f} |" for name, flop in one.items() if flop)


def _section(study: Study, rows: list[Cost], gpus: pd.DataFrame, shares: tuple[float, float]) -> Iterator[str]:
    """The table of one size of the study, and which GPUs hold its jobs."""
    machines = list(gpus.itertuples())
    sizes = sorted({n for n, tables in zip(study.runs.n, study.runs.tables, strict=True) if "fig8" not in tables})
    yield from ("", f"## {', '.join(f'{n:,}' for n in sizes)} samples a run", "")
    yield "| stage | jobs | PFLOP | memory, GiB | disk, GB | " + " | ".join(f"{g.gpu}, h" for g in machines) + " | formula |"
    yield "|---" * (6 + len(machines)) + "|"
    for r in rows:
        hours = " | ".join(f"{r.hours(g, shares):,.2f}" if r.precision != "cores" else "–" for g in machines)
        memory = f"{r.memory:.1f}" if r.memory else ""
        yield f"| {r.stage} | {r.jobs} | {r.flop / 1e15:,.2f} | {memory} | {r.disk / 1e9:,.1f} | {hours} | {r.formula} |"
    total = " | ".join(f"{sum(r.hours(g, shares) for r in rows):,.1f}" for g in machines)
    disk, jobs, flop = (sum(getattr(r, key) for r in rows) for key in ("disk", "jobs", "flop"))
    yield f"| **all** | {jobs} | {flop / 1e15:,.1f} | | {disk / 1e9:,.1f} | {total} | |"
    yield ""
    need = {r.stage: r.memory for r in rows if r.precision != "cores"}
    for g in machines:
        larger = [stage for stage, gib in need.items() if gib >= g.memory_gib]
        held = "every job" if not larger else f"all but {', '.join(larger)}: lower their batch_size, or raise prior.training.gradient_accumulation_steps"
        yield f"- {g.gpu}, {g.memory_gib:g} GiB, holds {held}."
