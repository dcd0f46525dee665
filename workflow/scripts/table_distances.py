"""Other distances of the runs of table 1, or 2: FD-infinity, KID, precision and recall, of judged depth and of images."""

import pandas as pd
import run_rows
from table_format import Column, Table

TITLES = {"fd_infinity": "FD∞ ↓", "kid": "1,000 KID ↓", "precision": "precision ↑", "recall": "recall ↑"}
_SCALE = {"kid": 1000}
_OF = {"d": "Judged depth", "": "Images"}


def build(runs: pd.DataFrame, distances: pd.DataFrame, table: str = "table1") -> Table:
    """runs: metrics/runs.csv. distances: metrics/distances.csv. table: "table1" or "table2"."""
    names = [*run_rows.select(runs, table)["run"], "real"]
    known = distances.set_index(["metric", "run"])
    blocks, parts = [], []
    for prefix, title in _OF.items():
        frame = pd.DataFrame({"run": names})
        columns = [Column("run", "run")]
        for kind, heading in TITLES.items():
            rows = known.loc[f"{prefix}{kind}"].loc[names]
            for number in ("value", "low", "high", "diff", "diff_low", "diff_high"):
                frame[kind + {"value": ""}.get(number, f"_{number}")] = rows[number].to_numpy() * _SCALE.get(kind, 1)
            frame[f"{kind}_p"] = rows["p"].to_numpy()
            columns += [Column(heading, kind, interval=True), Column("Δ", f"{kind}_diff", interval=True, difference_of=kind, p=f"{kind}_p")]
        for fact in (*run_rows.PROTOCOL, "baseline"):
            frame[fact] = rows[fact].to_numpy()
        parts.append(frame.assign(of=title))
        blocks += run_rows.by_protocol(frame, columns, title)
    whole = pd.concat(parts, ignore_index=True)
    how = "; ".join(f"{e}, {d} dimensions, n = {n}" for e, d, n in whole[run_rows.PROTOCOL].drop_duplicates().itertuples(index=False))
    return Table(
        whole[["of", *[c for c in whole.columns if c != "of"]]],
        f"{table.replace('table', 'Table ')} by other distances",
        f"Features: {how}. FD∞: Fréchet distance extrapolated to infinitely many samples; KID: unbiased, polynomial kernel; precision and recall with k = 3. "
        "[95 % intervals by subsampling samples (of differences: pairs), for this n and these reference images]; Δ: difference to the baseline of the same "
        f"sampler and seeds, paired by seed; {run_rows.CHANCE} real: held-out real images."
        f"{run_rows.too_few(whole)}",
        blocks,
    )


if job := globals().get("snakemake"):  # set by the rule's `script:`
    build(pd.read_csv(job.input.runs), pd.read_csv(job.input.distances), job.params.table).write(**job.output)
