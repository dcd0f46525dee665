"""Fig. 4a as a table: depth error of a head on each single decoder block, at each noise level."""

import intervals
import pandas as pd
from table_format import Block, Column, Table


def build(errors: pd.DataFrame, resolutions: list[int]) -> Table:
    """errors: metrics/heads/blocks.csv. resolutions: pixels along a side of each block's output, in the order of the blocks."""
    rows = []
    for (head, labels, t), group in errors.groupby(["head", "labels", "t"], sort=False):
        block = int(head.removeprefix("block")) if head.startswith("block") else None
        resolution = None if block is None else resolutions[block]
        mean, low, high = intervals.over_images(group["abs_rel"])
        rows.append([head, block, resolution, labels, t, len(group), mean, low, high])
    frame = pd.DataFrame(rows, columns=["head", "block", "resolution", "labels", "t", "n", "abs_rel", "abs_rel_low", "abs_rel_high"])
    frame = frame.astype({"block": "Int64", "resolution": "Int64"}).sort_values(["block", "t"], kind="stable", ignore_index=True)
    return Table(
        frame,
        "Fig. 4a: AbsRel of depth read off a single decoder block of the frozen U-Net",
        f"AbsRel = mean |d − d_true| / d_true, lower is better; mean over {_span(frame['n'])} validation images [95 % bootstrap interval over images]; "
        f"no alignment, metres; heads trained on {_span(frame['labels'])} labelled images. constant: the mean of the training depth maps, as coded.",
        [Block("", _by_t(frame), [Column("head", "head"), Column("resolution (px)", "resolution"), *_columns(frame)])],
    )


def _by_t(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per head, three columns per t."""
    wide = frame.pivot(index="head", columns="t", values=["abs_rel", "abs_rel_low", "abs_rel_high"])
    wide.columns = [name.replace("abs_rel", f"t{t}", 1) for name, t in wide.columns]
    heads = frame[["head", "resolution"]].drop_duplicates("head")
    return heads.merge(wide, left_on="head", right_index=True)


def _columns(frame: pd.DataFrame) -> list[Column]:
    return [Column(f"t = {t}", f"t{t}", interval=True, digits=3) for t in sorted(frame["t"].unique())]


def _span(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


if job := globals().get("snakemake"):  # set by the rule's `script:`
    build(pd.read_csv(job.input.errors), job.params.resolutions).write(**job.output)
