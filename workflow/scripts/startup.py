"""CPU seconds that a job of this study spends on starting Python and importing its libraries."""

import json
import resource
import subprocess
import sys

START = "import dag.__main__; dag.__main__.collect_seldom(); import "
KINDS = {
    "plain": START + "dag.stages.evaluation",
    "torch": START + "dag.stages.models, torch._dynamo",  # which optimisers import
    "diffusers": START + "dag.stages.sampling, diffusers.models.unets.unet_2d",
}
REPEATS = 3  # the least of them: a start beside a busy neighbour costs more


def measure(statement: str) -> float:
    """User and system time of one process that runs this statement."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if "snakemake" in globals():
    with open(snakemake.output[0], "w") as file:  # noqa: F821
        json.dump({kind: round(min(measure(statement) for _ in range(REPEATS)), 2) for kind, statement in KINDS.items()}, file)
