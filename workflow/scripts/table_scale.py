"""Fig. 8 as a table: distances against the guidance weights, and which of them the other runs use as `best`."""

import json
from pathlib import Path

import pandas as pd
import run_rows
from table_format import Column, Table

_ORDER = {"baseline": 0, "w_dc": 1, "w_dp": 2, "both": 3}
_CALLED = {"w_dc": "w_dc alone", "w_dp": "w_dp alone", "both": "both"}
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
        f"{run_rows.protocol_note(frame)}{_disjoint(runs, frame)} best: the lowest dFID of its kind (w_dc alone, w_dp alone, both), used by the other tables."
        f"{_caveats(frame)}",
        run_rows.by_protocol(frame, columns),
    )


def _caveats(frame: pd.DataFrame) -> str:
    """Say so where what is best of its kind lies at the end of the weights that were tried, or is not better than no guidance."""
    said, none = [], frame.loc[frame["sweep"] == "baseline", "dfid"]
    for sweep, rows in frame[frame["sweep"] != "baseline"].groupby("sweep", sort=False):
        weights = rows[["w_dc", "w_dp"]].astype(float)
        for name, chosen in weights[rows["best"] == "best"].iterrows():
            ends = [word for word, end in (("lowest", weights.min()), ("highest", weights.max())) if len(rows) > 1 and (chosen == end).all()]
            worse = ["higher in dFID than no guidance"] * bool((rows.loc[name, "dfid"] >= none).any())
            if told := [*(f"the {word} of those tried" for word in ends), *worse]:
                said.append(f" Of {_CALLED[sweep]}, the best is {' and '.join(told)}.")
    return "".join(said)


def _disjoint(runs: pd.DataFrame, frame: pd.DataFrame) -> str:
    """Say so when the weights were chosen on other seeds than the other tables are measured on."""
    others = runs[~runs["run"].isin(frame["run"])]
    return "" if others.empty or _seeds(others) & _seeds(frame) else " No other run uses these seeds."


def _seeds(frame: pd.DataFrame) -> set[int]:
    return {seed for row in frame.itertuples() for seed in range(int(row.first_seed), int(row.first_seed) + int(row.n))}


if job := globals().get("snakemake"):  # set by the rule's `script:`
    chosen = {choice["run"] for choice in json.loads(Path(job.input.scale).read_text(encoding="utf-8")).values()}
    build(pd.read_csv(job.input.runs), pd.read_csv(job.input.distances), chosen).write(**job.output)
