"""Table 3: depth prior guidance with priors of several resolutions."""

import pandas as pd
import run_rows
from table_format import Column, Table


def build(runs: pd.DataFrame, distances: pd.DataFrame) -> Table:
    """runs: metrics/runs.csv. distances: metrics/distances.csv. Rows by resolution, the baselines they are compared with first."""
    selected = run_rows.select(runs, "table3")
    unguided = selected[["w_dc", "w_dp"]].astype(float).eq(0).all(axis=1)
    guided = run_rows.measured(runs, distances, list(selected.loc[~unguided].sort_values("prior", kind="stable")["run"]))
    baselines = list(dict.fromkeys([*selected.loc[unguided, "run"], *guided["baseline"].dropna()]))
    frame = pd.concat([run_rows.measured(runs, distances, baselines), guided], ignore_index=True)
    frame.loc[: len(baselines) - 1, "prior"] = None  # no prior guides them, whatever the sheet says
    csv = frame[
        ["run", "prior", "sampler", "steps", "w_dc", "w_dp", *run_rows.numbers(frame), "baseline", *run_rows.PROTOCOL, "first_seed", "seconds_per_sample"]
    ]
    settings = [Column("run", "run"), Column("prior (px)", "prior", digits=0), Column("w_dc", "w_dc"), Column("w_dp", "w_dp")]
    columns = [*settings, *run_rows.metric_columns(frame), Column("s / sample", "seconds_per_sample", digits=3)]
    return Table(
        csv.astype({"prior": "Int64", "steps": "Int64", "first_seed": "Int64"}),
        "Table 3: resolution of the depth prior",
        run_rows.protocol_note(frame) + " The first row is unguided.",
        run_rows.by_protocol(frame, columns),
    )


if job := globals().get("snakemake"):  # set by the rule's `script:`
    build(pd.read_csv(job.input.runs), pd.read_csv(job.input.distances)).write(**job.output)
