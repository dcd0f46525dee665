"""What guidance gains against how long the U-Net was trained: `snakemake gain`."""

from collections.abc import Sequence

import pandas as pd
import run_rows
from table_format import Column, Table


def build(runs: pd.DataFrame, distances: Sequence[pd.DataFrame], images: Sequence[int], compared: Sequence[str]) -> Table:
    """runs: metrics/runs.csv. distances: of each U-Net, the shortest trained first. images: how many each saw. compared: the unguided and the guided run."""
    parts = [run_rows.measured(runs, table, list(compared)).assign(images=count) for table, count in zip(distances, images, strict=True)]
    frame = pd.concat(parts, ignore_index=True)
    columns = [Column("training images", "images"), Column("run", "run"), *run_rows.metric_columns(frame)]
    csv = frame[["images", "run", "sampler", "steps", "w_dc", "w_dp", *run_rows.numbers(frame), "baseline", *run_rows.PROTOCOL, "first_seed"]]
    return Table(
        csv,
        "Gain of guidance against the training of the U-Net",
        run_rows.protocol_note(frame) + " training images: how many the U-Net was trained on; the last is the study's own. Each U-Net has its own heads; "
        "all share the prior, and the weights of the guidance that were found on the study's own U-Net.",
        run_rows.by_protocol(frame, columns),
    )


if job := globals().get("snakemake"):  # set by the rule's `script:`
    tables = [pd.read_csv(path) for path in job.input.distances]
    build(pd.read_csv(job.input.runs), tables, job.params.images, job.params.compared).write(**job.output)
