"""Rows of the run sheet with what was measured on them, side by side."""

from dataclasses import replace

import numpy as np
import pandas as pd
from table_format import SIGNIFICANT, Block, Column, chance

METRICS = ("dfid", "dfid_strong", "fid")
SECOND = "dfid_second"  # of a study with a second judge
GAP = "dfid_gap"  # logarithm of dFID over that by the own head, of the runs of the tables that show both
TITLES = {"dfid": "dFID", "dfid_strong": "dFID by own head", "fid": "FID", SECOND: "dFID by the second judge"}
PROTOCOL = ["extractor", "dims", "n"]
STRENGTH = Column("strength", "strength", digits=4)
_MEASURED = {"value": "", "low": "_low", "high": "_high", "diff": "_diff", "diff_low": "_diff_low", "diff_high": "_diff_high", "p": "_p"}


def select(runs: pd.DataFrame, table: str) -> pd.DataFrame:
    """Rows of metrics/runs.csv whose column `tables` names the table. Raises ValueError when there are none."""
    named = runs["tables"].fillna("").map(lambda cell: table in [name.strip() for name in str(cell).split(",")])
    if not named.any():
        raise ValueError(f"metrics/runs.csv: no run has {table!r} in its column tables")
    return runs[named]


def measured(runs: pd.DataFrame, distances: pd.DataFrame, names: list[str], gap: bool = False) -> pd.DataFrame:
    """One row per name: the run's settings, then the columns of `numbers` and extractor, dims, n, baseline. "real" has no settings. gap: GAP, too.

    Raises ValueError when a run has no distance.
    """
    frame = pd.DataFrame({"run": names}).merge(runs.drop(columns=["n"], errors="ignore"), on="run", how="left")
    measures = [*METRICS, *([SECOND] if (distances["metric"] == SECOND).any() else []), *[GAP] * gap]
    for metric in measures:
        rows = distances[distances["metric"] == metric].set_index("run")
        missing = [name for name in names if name not in rows.index]
        if missing:
            raise ValueError(f"metrics/distances.csv: no {metric} of run {missing[0]!r}; it has {', '.join(rows.index)}")
        rows = rows.loc[names]
        for column, suffix in _MEASURED.items():
            frame[metric + suffix] = rows[column].to_numpy()
    both = distances[distances["metric"].isin(measures)].groupby("run", sort=False)
    for column in PROTOCOL:
        frame[column] = [_one(both.get_group(name)[column]) for name in names]
    frame["baseline"] = [both.get_group(name)["baseline"].iloc[0] for name in names]
    return frame


def numbers(frame: pd.DataFrame) -> list[str]:
    """Columns of every distance: dfid, dfid_low, dfid_high, dfid_diff, ..., fid_p, and those of the second judge and of the gap where there are."""
    return [metric + suffix for metric in (*METRICS, SECOND, GAP) if metric in frame for suffix in _MEASURED.values()]


def metric_columns(frame: pd.DataFrame, metrics: tuple[str, ...] = ("dfid", "fid")) -> list[Column]:
    """Distances and differences for readers. dfid_strong and the second judge are left out but where they are asked for."""
    columns = []
    for metric in metrics:
        title = TITLES[metric]
        columns.append(Column(f"{title} ↓", metric, interval=True))
        if frame[f"{metric}_diff"].notna().any():
            delta = Column(f"Δ{title}", f"{metric}_diff", interval=True, difference_of=metric, p=f"{metric}_p")
            columns += [delta, chance("p", f"{metric}_p")]
    return columns


def own_head_columns(frame: pd.DataFrame) -> list[Column]:
    """`metric_columns` of all METRICS and the second judge, if any, and the self-flattery of guidance, which `OWN_HEAD` explains."""
    flattery = Column("self-flattery", f"{GAP}_diff", interval=True, digits=3, difference_of=GAP, p=f"{GAP}_p")
    metrics = ("dfid", *[SECOND] * (SECOND in frame), *METRICS[1:])
    return [*metric_columns(frame, metrics), flattery, chance("p", f"{GAP}_p")]


def by_protocol(frame: pd.DataFrame, columns: list[Column], title: str = "") -> list[Block]:
    """One block per extractor, dims and n: numbers measured differently never share a column, and a distance's column says how it was measured.

    title: what all of these rows are of."""
    groups = list(frame.groupby(PROTOCOL, sort=False))
    blocks = []
    for (extractor, dims, n), rows in groups:
        # Distances have intervals, their differences signs beside.
        told = [replace(c, title=f"{c.title} {extractor}, n = {n}") if c.interval and not c.difference_of else c for c in columns]
        how = "" if len(groups) == 1 else f"{extractor}, {dims} dimensions, n = {n}"
        blocks.append(Block(": ".join(filter(None, (title, how))), marked(rows), told))
    return blocks


def marked(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with a dagger at each run of fewer than three samples for each dimension; `too_few` says what it means."""
    return frame.assign(run=frame["run"] + np.where(_few(frame), " †", ""))


def _few(frame: pd.DataFrame) -> pd.Series:
    return frame["n"] < 3 * frame["dims"]


CHANCE = (
    f"p: two-sided, by the standard error of the difference; * where p < {SIGNIFICANT} and the interval leaves out 0, not corrected for the number of rows."
)


def protocol_note(frame: pd.DataFrame) -> str:
    """How the distances were measured."""
    how = "; ".join(f"{extractor}, {dims} dimensions, n = {n}" for extractor, dims, n in frame[PROTOCOL].drop_duplicates().itertuples(index=False))
    other = "" if frame["extractor"].str.startswith("inception-").all() else "; not comparable with FID of Inception features"
    return (
        f"FID: Fréchet distance of image features to the reference images ({how}{other}); dFID: the same on "
        "depth that a network outside the guidance judges. Lower is better. [95 % intervals by subsampling samples (of differences: pairs), for this n and "
        "these reference images]; "
        f"Δ: difference to the baseline of the same sampler and seeds, paired by seed; {CHANCE} "
        f"Seeds {seed_ranges(frame)}.{too_few(frame)}"
    )


OWN_HEAD = (
    " dFID by own head: the same on depth that the strong head, which guides, reads from the finished image: guidance may please its own head without "
    "drawing better depth. self-flattery: the logarithm of the factor by which dFID changes over that of dFID by own head, above 0 where the head that guides "
    "sees more gain, or less loss, than the judge. It need not be 0 where nothing guides: `controls` has it of unguided samples of more steps."
)


SECOND_JUDGE = " dFID by the second judge: the same on depth that another network judges, of other shape and weights than the first."


def own_head_note(frame: pd.DataFrame) -> str:
    """What the columns of `own_head_columns` are."""
    return OWN_HEAD + SECOND_JUDGE * (SECOND in frame)


def too_few(frame: pd.DataFrame) -> str:
    """A warning where a covariance rests on fewer than three samples for each of its dimensions."""
    if not _few(frame).any():
        return ""
    return (
        " † Too few samples: n is below three times the dimensions, and the Fréchet distance of so few is mostly the noise of their own covariance "
        "(two draws of the standard Gaussian in 512 dimensions are 66 apart at n = 2,000 and 13 at n = 10,000)."
    )


def seed_ranges(frame: pd.DataFrame) -> str:
    """First and last seeds of the rows, as text."""
    known = frame.dropna(subset=["first_seed"])
    ranges = sorted({(int(row.first_seed), int(row.first_seed) + int(row.n) - 1) for row in known.itertuples()})
    return ", ".join(f"{first}–{last}" for first, last in ranges)


def _one(values: pd.Series):
    """The value that both metrics share, or both as text."""
    unique = list(dict.fromkeys(values))
    return unique[0] if len(unique) == 1 else " / ".join(map(str, unique))
