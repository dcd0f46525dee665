"""Controls: guidance with its meaning taken away, beside the guidance and the baseline that it is to be told from."""

import pandas as pd
import run_rows
from table_format import Column, Table

_MEANING = {
    "none": "",
    "random_heads": "heads whose trained weights were put in random order",
    "shuffled_prior": "prior trained on depth maps with shuffled pixels",
    "flipped": "gradient with its sign reversed",
    "noise": "gradient replaced by noise of the same norm",
}


def build(runs: pd.DataFrame, distances: pd.DataFrame) -> Table:
    """runs: metrics/runs.csv. distances: metrics/distances.csv."""
    frame = run_rows.measured(runs, distances, list(run_rows.select(runs, "controls")["run"]), gap=True)
    frame.insert(1, "what", [_what(row) for row in frame.itertuples()])
    settings = ["run", "what", "control", "sampler", "steps", "w_dc", "w_dp", "strength", "unet_evaluations", "unet_gradients"]
    columns = [
        Column("run", "run"),
        Column("what it is", "what"),
        Column("forward + gradient", "cost"),
        run_rows.STRENGTH,
        *run_rows.own_head_columns(frame),
    ]
    csv = frame[[*settings, *run_rows.numbers(frame), "baseline", *run_rows.PROTOCOL, "first_seed", "seconds_per_sample"]]
    frame["cost"] = [f"{int(row.unet_evaluations)} + {int(row.unet_gradients)}" for row in frame.itertuples()]
    return Table(
        csv,
        "Controls: what guidance does without its meaning",
        run_rows.protocol_note(frame)
        + run_rows.own_head_note(frame)
        + " forward + gradient: evaluations of the U-Net and gradients through it for one sample. "
        "strength: change of eps as a share of |eps|, root mean squares, mean over steps and samples: of another one than the guidance's, a control differs by "
        "that, too. A control should not help; where one gains as much as the guidance, that gain is not due to depth. More unguided steps may help: guidance "
        "is worth its cost where it gains more than they do.",
        run_rows.by_protocol(frame, columns),
    )


def _what(row) -> str:
    if row.control != "none":
        return _MEANING[row.control]
    guided = float(row.w_dc) != 0 or float(row.w_dp) != 0
    return "guided" if guided else "unguided" if not isinstance(row.baseline, str) or not row.baseline else f"unguided, {int(row.steps)} steps"


if job := globals().get("snakemake"):  # set by the rule's `script:`
    build(pd.read_csv(job.input.runs), pd.read_csv(job.input.distances)).write(**job.output)
