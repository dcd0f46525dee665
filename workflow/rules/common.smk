# What every rule file uses: the validated study, its folder, and how a stage is called.
import os
import sys

sys.path.insert(0, workflow.basedir)
from snakemake.exceptions import WorkflowError

from dag.stages.study import Study, StudyError, code_hash

try:
    STUDY = Study(config, "config")
except StudyError as error:
    raise WorkflowError(str(error))

RESULTS = str(STUDY.root)
RUNS = STUDY.runs
UNET = config["unet"]["path"] or f"{RESULTS}/models/unet"

# A stage reads the config as Snakemake resolved it (several files, --config). It is rewritten only when it changed, and what
# a rule depends on is its `params.stamp`, not this file: a changed key reruns only the rules that read it.
CONFIG = f"{RESULTS}/config.yaml"
STUDY.save(CONFIG)


wildcard_constraints:
    run="[A-Za-z0-9_]+",
    count=r"\d+",
    resolution=r"\d+",


def stamp(stage, *sections):
    """What a rule depends on besides its files: the code of its stage and the config sections that it reads."""
    return f"{code_hash('stages.' + stage)}-{STUDY.section_hash(*sections)}"


def run_stamp(wildcards):
    """A run depends on its own row of the sheet, not on the others."""
    return f"{stamp('sampling', 'sampling', 'depth', 'heads')}-{STUDY.run_hash(wildcards.run)}"


def dag(stage, threads=1):
    """The start of the command of a stage."""
    return f"{sys.executable} -m dag {stage} --config {CONFIG}"


def measured(*tables):
    """Runs that any of these tables asks for."""
    return [r for r in RUNS.index if set(str(RUNS.tables[r]).split(",")) & set(tables)]


SWEEP = measured("fig8")
FINAL = [r for r in RUNS.index if r not in SWEEP]
MEASUREMENTS = [f"{RESULTS}/metrics/distances.csv", f"{RESULTS}/metrics/runs.csv", f"{RESULTS}/samples/trajectory.npz"]
