"""Fig. 8 as a table: distances against the guidance weights, and which of them the other runs use as `best`."""

import json
from pathlib import Path

import pandas as pd
import run_rows
from table_format import Column, Table

_ORDER = {"baseline": 0, "w_dc": 1, "w_dp": 2, "both": 3}
_SWEEPS = {(False, False): "baseline", (True, False): "w_dc", (False, True): "w_dp", (True, True): "both"}


def build(runs: pd.DataFrame, distances: pd.DataFrame, best: set[str]) -> Table:
    """runs: metrics/runs.csv. distances: metrics/distances.csv. best: the runs whose weights `best` stands for elsewhere in the sheet.

    The table's column `sweep` says which weight a row varies.
    """
    frame = run_rows.measured(runs, distances, list(run_rows.select(runs, "fig8")["run"]))
    weights = frame[["w_dc", "w_dp"]].astype(float)
    frame["sweep"] = [_SWEEPS[dc != 0, dp != 0] for dc, dp in weights.itertuples(index=False)]
    frame["best"] = ["best" if run in best else "" for run in frame["run"]]
    frame = frame.assign(order=frame["sweep"].map(_ORDER)).sort_values(["order", "w_dc", "w_dp"], kind="stable", ignore_index=True)
    columns = [Column("run", "run"), Column("w_dc", "w_dc"), Column("w_dp", "w_dp"), *run_rows.metric_columns(frame), Column("", "best")]
    csv = [
        "sweep",
        "run",
        "w_dc",
        "w_dp",
        "best",
        "sampler",
        "steps",
        *run_rows.numbers(frame),
        "baseline",
        *run_rows.PROTOCOL,
        "first_seed",
        "seconds_per_sample",
    ]
    return Table(
        frame[csv],
        "Fig. 8: distances against the guidance weights w_dc and w_dp",
        f"{run_rows.protocol_note(frame)}{_disjoint(runs, frame)} best: the lowest dFID of its kind (w_dc alone, w_dp alone, both), used by the other tables.",
        run_rows.by_protocol(frame, columns),
    )


def _disjoint(runs: pd.DataFrame, frame: pd.DataFrame) -> str:
    """Say so when the weights were chosen on other seeds than the other tables are measured on."""
    others = runs[~runs["run"].isin(frame["run"])]
    return "" if others.empty or _seeds(others) & _seeds(frame) else " No other run uses these seeds."


def _seeds(frame: pd.DataFrame) -> set[int]:
    return {seed for row in frame.itertuples() for seed in range(int(row.first_seed), int(row.first_seed) + int(row.n))}


if job := globals().get("snakemake"):  # set by the rule's `script:`
    chosen = {choice["run"] for choice in json.loads(Path(job.input.scale).read_text(encoding="utf-8")).values()}
    build(pd.read_csv(job.input.runs), pd.read_csv(job.input.distances), chosen).write(**job.output)
