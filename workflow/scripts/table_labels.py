"""Fig. 4b as a table: depth error of the strong and the weak head against the number of labelled images."""

from collections.abc import Mapping

import intervals
import pandas as pd
from table_format import Block, Column, Table

_ORDER = {"strong": 0, "weak": 1, "constant": 2}


def build(errors: pd.DataFrame, levels: Mapping[int, int] | None = None) -> Table:
    """errors: the rows of all metrics/heads/labels*.csv; with a column abs_rel_aligned, the table has a second block for it.

    levels: noise levels stored for each image, by label count (`heads.labels`).
    """
    metrics = {"abs_rel": "", "abs_rel_aligned": "Aligned in scale and shift, image by image"}
    metrics = {name: title for name, title in metrics.items() if name in errors}
    rows = []
    for (head, blocks, labels, t), group in errors.groupby(["head", "blocks", "labels", "t"], sort=True, dropna=False):
        rows.append([head, blocks, labels, t, len(group), *(number for name in metrics for number in intervals.over_images(group[name]))])
    measured = [f"{name}{part}" for name in metrics for part in ("", "_low", "_high")]
    frame = pd.DataFrame(rows, columns=["head", "blocks", "labels", "t", "n", *measured])
    frame = frame.sort_values("head", key=lambda heads: heads.map(_ORDER), kind="stable", ignore_index=True)
    return Table(
        frame,
        "Fig. 4b: AbsRel of the strong and the weak head against the number of labelled images",
        f"AbsRel = mean |d − d_true| / d_true, lower is better; mean over {frame['n'].iloc[0]} validation images [95 % bootstrap interval over images]; "
        "no alignment, metres"
        + (", in the first block" if len(metrics) > 1 else "")
        + ". constant: the mean depth map of the labelled images, as coded."
        + (f" All train as long, once, on {_stored(levels)}." if levels else ""),
        [_block(frame, name, title) for name, title in metrics.items()],
    )


def _stored(levels: Mapping[int, int]) -> str:
    told = ", ".join(f"{count:,} (of {labels:,} image{'s' * (labels > 1)})" for labels, count in levels.items())
    return f"features at as many noise levels of each image: {told}"


def _block(frame: pd.DataFrame, metric: str, title: str) -> Block:
    """A row per head and label count, a column per t."""
    wide = frame.pivot(index=["head", "labels"], columns="t", values=[metric, f"{metric}_low", f"{metric}_high"])
    wide.columns = [name.replace(metric, f"t{t}", 1) for name, t in wide.columns]
    rows = frame[["head", "blocks", "labels"]].drop_duplicates(["head", "labels"]).merge(wide, left_on=["head", "labels"], right_index=True)
    columns = [Column(f"t = {t}", f"t{t}", interval=True, digits=3) for t in sorted(frame["t"].unique())]
    return Block(title, rows, [Column("head", "head"), Column("blocks", "blocks"), Column("labels", "labels"), *columns])


if job := globals().get("snakemake"):  # set by the rule's `script:`
    build(pd.concat([pd.read_csv(path) for path in job.input.errors]), job.params.levels).write(**job.output)
