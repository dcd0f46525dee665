"""Sensitivities: the guided run with one choice changed that the paper leaves open."""

from collections.abc import Mapping

import pandas as pd
import run_rows
from table_format import Column, Table

CHOICES = ["sampler", "steps", "eta", "rule", "tau", "prior", "heads", "window", "variant"]


def build(runs: pd.DataFrame, distances: pd.DataFrame, variants: Mapping[str, Mapping] | None = None) -> Table:
    """runs: metrics/runs.csv. distances: metrics/distances.csv. variants: the config's. The first guided row is the one that the others change."""
    frame = run_rows.measured(runs, distances, list(run_rows.select(runs, "sensitivity")["run"]))
    guided = frame[frame[["w_dc", "w_dp"]].astype(float).ne(0).any(axis=1)]
    default = guided.iloc[0] if len(guided) else None
    frame.insert(1, "changed", [_changed(row, default, variants or {}) for _, row in frame.iterrows()])
    metrics = ("dfid", *[run_rows.SECOND] * (run_rows.SECOND in frame), "fid")
    columns = [Column("run", "run"), Column("changed", "changed"), run_rows.STRENGTH, *run_rows.metric_columns(frame, metrics)]
    csv = frame[["run", "changed", *CHOICES, "w_dc", "w_dp", "strength", *run_rows.numbers(frame), "baseline", *run_rows.PROTOCOL, "first_seed"]]
    return Table(
        csv,
        "Sensitivity: guidance with one choice changed that the paper leaves open",
        run_rows.protocol_note(frame) + " strength: change of eps as a share of |eps|, root mean squares, mean over steps and samples. The weights stay those "
        "of the default, though another rule gives them another unit." + run_rows.SECOND_JUDGE * (run_rows.SECOND in frame),
        run_rows.by_protocol(frame, columns),
    )


def _changed(row, default, variants: Mapping[str, Mapping]) -> str:
    if default is None or (float(row["w_dc"]) == 0 and float(row["w_dp"]) == 0):
        return "unguided"
    changed = {choice: row[choice] for choice in CHOICES if str(row[choice]) != str(default[choice])}
    changed |= variants.get(changed.pop("variant", ""), {})
    return ", ".join(f"{choice} {value}" for choice, value in changed.items()) or "default"


if job := globals().get("snakemake"):  # set by the rule's `script:`
    build(pd.read_csv(job.input.runs), pd.read_csv(job.input.distances), job.params.variants).write(**job.output)
