"""Hashes of all tables and figures, and of what each was made from."""

import json
from pathlib import Path

from dag.stages.artefacts import content_hash, size


def build(drawn: list[tuple[list[str], list[str]]]) -> list[dict]:
    """One record for the files of each table and figure that is there: hashes of its outputs and inputs."""
    return [
        {
            "outputs": {path: {"bytes": size(path), "sha256": content_hash(path)} for path in outputs},
            "inputs": {path: content_hash(path) for path in inputs},
        }
        for outputs, inputs in drawn
        if all(Path(path).exists() for path in outputs)
    ]


if job := globals().get("snakemake"):  # set by the rule's `script:`
    Path(job.output[0]).write_text(json.dumps({"records": build(job.params.drawn)}, indent=1) + "\n", encoding="utf-8")
