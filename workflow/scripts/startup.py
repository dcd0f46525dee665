"""CPU seconds that a job of this study spends on starting Python and importing its libraries."""

import json
import resource
import subprocess
import sys

STAGE = "import dag.stages.sampling, diffusers.models.unets.unet_2d"


def measure() -> float:
    """User and system time of one process that imports what a stage imports."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", STAGE], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if "snakemake" in globals():
    with open(snakemake.output[0], "w") as file:  # noqa: F821
        json.dump({"import_cpu_seconds": round(measure(), 2)}, file)
