"""Table 1, or 2: each guidance alone and both together, against the unguided baseline."""

import pandas as pd
import run_rows
from table_format import Block, Column, Table, published_block

_GUIDANCE = {(False, False): "baseline", (False, True): "dpg", (True, False): "dcg", (True, True): "dcg+dpg"}
_SETTINGS = ["guidance", "run", "sampler", "steps", "w_dc", "w_dp"]


def build(runs: pd.DataFrame, distances: pd.DataFrame, published: pd.DataFrame, table: str = "table1", dataset: str | None = None) -> Table:
    """runs: metrics/runs.csv. distances: metrics/distances.csv. published: config/published.tsv.
    table: "table1" or "table2". dataset: the published one that the study repeats."""
    names = list(run_rows.select(runs, table)["run"])
    frame = run_rows.measured(runs, distances, [*names, "real"], gap=True)
    frame.insert(0, "guidance", [_guidance(row) for row in frame.itertuples()])
    csv = frame[[*_SETTINGS, *run_rows.numbers(frame), "baseline", *run_rows.PROTOCOL, "first_seed", "seconds_per_sample"]]
    csv = csv.astype({"steps": "Int64", "first_seed": "Int64"})
    settings = [Column("run", "run"), Column("sampler", "sampler"), Column("steps", "steps"), Column("w_dc", "w_dc"), Column("w_dp", "w_dp")]
    columns = [*settings, *run_rows.own_head_columns(frame), Column("s / sample", "seconds_per_sample", digits=3)]
    context = "Published, for context only: another domain, 256 × 256 pixels, another judge and extractor; not comparable with the numbers above."
    return Table(
        csv,
        f"{table.replace('table', 'Table ')}: distances of guided and unguided samples to real images",
        run_rows.protocol_note(frame) + run_rows.own_head_note(frame) + " real: held-out real images, the floor.",
        [*run_rows.by_protocol(frame, columns), *(_repeated(published, dataset) if dataset else published_block(published, table, context))],
    )


def _repeated(published: pd.DataFrame, dataset: str) -> list[Block]:
    """The authors' numbers for the same dataset, whichever of their tables has them."""
    rows = published[(published["dataset"] == dataset) & (published["metric"] == "dfid")]
    if rows.empty:
        raise ValueError(f"config/published.tsv: no dFID of {dataset!r}, which the config's `published` names")
    context = f"Published for {dataset}. The authors state neither judge, extractor nor reference images: compare differences rather than values."
    return published_block(rows, rows["table"].iloc[0], context)


def _guidance(row) -> str:
    return "" if pd.isna(row.w_dc) else _GUIDANCE[float(row.w_dc) != 0, float(row.w_dp) != 0]


if job := globals().get("snakemake"):  # set by the rule's `script:`
    files, chosen = job.input, job.params
    runs, distances, published = pd.read_csv(files.runs), pd.read_csv(files.distances), pd.read_csv(files.published, sep="\t", dtype=str)
    build(runs, distances, published, chosen.table, chosen.dataset).write(**job.output)
