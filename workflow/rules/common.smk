# What every rule file uses: the validated study, its folder, and how a stage is called.
import os
import shlex
import signal
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, workflow.basedir)

from dag.data.domain import DOMAINS
from dag.stages.artefacts import code_hash
from dag.stages.resources import asked, processes
from dag.stages.sheet import compared_in
from dag.stages.study import Study, StudyError

try:
    STUDY = Study(config, os.fspath(workflow.configfiles[-1]) if workflow.configfiles else "config")
except StudyError as error:
    # One line and a status, where an exception would be shown with the place in this file.
    sys.exit(f"snakemake: {error}")

# Slurm's warning before a time limit reaches every process of a job step; the stage acts on it, the Snakemake above it must live until it has.
signal.signal(signal.SIGUSR1, signal.SIG_IGN)

RESULTS = str(STUDY.root)
RUNS = STUDY.runs

# A stage reads the config as Snakemake resolved it (several files, --config). What a rule depends on is its `params.stamp`, not this
# file: a changed key reruns only the rules that read it.
CONFIG = str(STUDY.saved_config)


def check_arrays():
    """Refuse to start where the Slurm plugin would forget jobs of an array: it does where not all that are ready may start at once (its issue 473)."""
    slots, rate, count = workflow.resource_settings.nodes, workflow.scheduling_settings.max_jobs_per_timespan, len(workflow.dag)
    if getattr(workflow.executor_settings, "array_jobs", None) and min(slots, rate.max_jobs) < count:
        sys.exit(
            f"snakemake: jobs is {slots} and max-jobs-per-timespan {rate.max_jobs}, expected at least {count}, the jobs of this plan: "
            "raise both in profiles/slurm/config.yaml, or remove slurm-array-jobs there"
        )


onstart:
    check_arrays()
    try:
        STUDY.save()
    except (StudyError, OSError) as error:
        sys.exit(f"snakemake: {error}")


def ending(names):
    """Wildcard constraint: the end of a file's name, an underscore and one of these, or nothing."""
    return "|" + "|".join(f"_{name}" for name in names)


wildcard_constraints:
    run="|".join([*RUNS.index, "real", "reference"]),
    labels=r"\d+",
    variant=ending(config.get("variants", {})),
    resolution=r"\d+",


ASSETS = expand(f"{RESULTS}/assets/{{name}}.json", name=config.get("assets", {}))


def assets_at(path):
    """What was found of the assets of others in a place of the config: rules read the place itself only after that."""
    return [] if path is None else [f"{RESULTS}/assets/{name}.json" for name in STUDY.assets_at(path)]


IMPORTED = STUDY.imports_unet


def unet(wildcards):
    """The pretrained U-Net, or the one that this study makes. A damaged one is refused before any job starts."""
    path = config["unet"]["path"]
    if path is None or IMPORTED:
        return f"{RESULTS}/models/unet"
    try:
        STUDY.check_weights()
    except StudyError as error:
        sys.exit(f"snakemake: {error}")
    return path


@cache
def stamp(stage, *sections, study=STUDY):
    """What a rule depends on besides its files: the code of its stage and the config sections that it reads."""
    code = code_hash(f"stages.{stage}")
    return f"{code}-{study.section_hash(*sections)}"


def varied(wildcards):
    """The study as the variant in a file's name has it."""
    return STUDY.varied(wildcards.variant[1:] or "none")


def variant_option(wildcards):
    return f"--variant {wildcards.variant[1:]}" if wildcards.variant else ""


def domain_stamp(stage, *sections, use=None):
    """Stamp of a rule that reads or draws the domain's pictures, or those of the domain of a use."""
    place = STUDY.domain_of(use)
    section = stamp(stage, "domain" if place is STUDY["domain"] else "downstream.domain", *sections)
    code = code_hash(f"data.{DOMAINS[place['name']].module}")
    return f"{section}-{code}"


def unet_stamp(stage, *sections):
    """Stamp of a rule that reads the U-Net."""
    return f"{stamp(stage, *sections)}-{STUDY.weights_hash()}"


def run_stamp(run):
    """A run depends on its own row of the sheet, not on the others."""
    return f"{unet_stamp('sampling', 'sampling')}-{STUDY.run_hash(run)}"


@cache
def shards_stamp(run):
    """Of the seeds of a run, a shard depends on its own."""
    return f"{unet_stamp('sampling', 'sampling')}-{STUDY.run_hash(run, 'n', 'first_seed')}"


def one_of(names):
    """Wildcard constraint: one of these names; of none, nothing."""
    return "|".join(sorted(names)) or "(?!)"


# What a job that can use a GPU asks for: on a cluster, and of `--resources gpu=N` on one machine.
GPU = 0 if STUDY.compute["device"] == "cpu" else 1


def dag(stage, config_file=True, apart=False):
    """The start of the command of a stage, as a param. Snakemake does not compare params that depend on threads: the same Python
    under another name (python, python3, a clone that moved) must not rerun a study. apart: each thread computes numbers of its own, its
    linear algebra in itself, so that they do not depend on how many threads there are."""
    study = f" --config {CONFIG}" if config_file else ""
    alone = "OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 " if apart else ""
    return lambda wildcards, threads: f"{alone}{shlex.quote(sys.executable)} -m dag {stage}{study} --threads {threads}"


def measured(*tables):
    """Runs that any of these tables asks for."""
    return [r for r in RUNS.index if set(RUNS.tables[r].split(",")) & set(tables)]


def heads_name(run):
    """Of the heads that guide a run, as their file is called."""
    count, variant = RUNS.at[run, "heads"], STUDY.variant_of(run, "heads")
    return f"labels{config['heads']['guide'] if count == 'guide' else count}{'_' if variant else ''}{variant}"


def prior_name(run):
    """Of the prior that guides a run, as its folder ends."""
    variant = STUDY.variant_of(run, "prior")
    return f"{RUNS.at[run, 'prior']}{'_' if variant else ''}{variant}{'_shuffled' if RUNS.at[run, 'control'] == 'shuffled_prior' else ''}"


COMPARISON = next(iter(compared_in(RUNS.tables)), "table1")
COMPARED = measured(COMPARISON)
SWEEP = measured("fig8")
FINAL = [r for r in RUNS.index if r not in SWEEP]
MEASUREMENTS = [f"{RESULTS}/metrics/distances.csv", f"{RESULTS}/metrics/runs.csv", f"{RESULTS}/samples/trajectory.npz"]
# Of the reference pictures.
MOMENTS = f"{RESULTS}/metrics/moments.npz"
