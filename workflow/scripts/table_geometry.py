"""Geometry without a learned judge of rooms: how much depth maps look like box rooms, by their own normals."""

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, permutation_test
from table_format import SIGNIFICANT, Block, Column, Table

SCORES = {"axis_share": "normals along the axes (%)", "roughness": "roughness (% of depth)", "floor_ceiling_degrees": "floor to ceiling (°)"}
_SCALE = {"axis_share": 100}
_SEED, _RESAMPLES = 0, 999


def build(scores: pd.DataFrame, baselines: dict[str, str]) -> Table:
    """scores: metrics/geometry.csv, a row per run and seed. baselines: the unguided run of each guided one."""
    names = list(dict.fromkeys(scores["run"]))
    by_run = {name: scores[scores["run"] == name].set_index("seed") for name in names}
    rows = []
    for name in names:
        row = {"run": name, "n": len(by_run[name]), "baseline": baselines.get(name, "")}
        for score in SCORES:
            values = by_run[name][score] * _SCALE.get(score, 1)
            row |= _estimate(values.dropna().to_numpy(), score)
            row[f"{score}_n"] = int(values.notna().sum())
            if row["baseline"]:
                row |= _difference((values - by_run[row["baseline"]][score] * _SCALE.get(score, 1)).dropna().to_numpy(), score)
        rows.append(row)
    frame = pd.DataFrame(rows)
    columns = [Column("depth of", "run")]
    for score, title in SCORES.items():
        columns.append(Column(title, score, interval=True, digits=2))
        if f"{score}_diff" in frame:
            columns.append(Column("Δ", f"{score}_diff", interval=True, digits=2, difference_of=score, p=f"{score}_p"))
    return Table(
        frame,
        "Geometry: how much the depth of samples looks like a box room",
        "By the normals of the judged depth alone (true depth: of the held-out scenes themselves), for the nominal camera. normals along the axes: share "
        "of pixels whose normal is within 15° of an axis of the room, which is turned to fit; roughness: median distance of those pixels from the plane "
        "of all that face the same way; floor to ceiling: angle between their planes, where both are seen. What samples should come near is the row real, "
        "judged as they are, not an extreme: depth that is too smooth looks more like a box than rooms do. Means over images, [95 % bootstrap intervals]; "
        f"Δ: mean difference to the unguided run over the seeds where both have the number, * where p < {SIGNIFICANT} by permutation of signs "
        "and the interval leaves out 0, not corrected for the number of rows.",
        [Block("", frame, columns)],
    )


def _estimate(values: np.ndarray, name: str) -> dict[str, float]:
    low, high = _interval(values)
    return {name: float(values.mean()) if len(values) else np.nan, f"{name}_low": low, f"{name}_high": high}


def _difference(values: np.ndarray, name: str) -> dict[str, float]:
    found = _estimate(values, f"{name}_diff")
    p = np.nan
    if len(values) > 1 and np.ptp(values) > 0:
        test = permutation_test((values,), np.mean, permutation_type="samples", n_resamples=_RESAMPLES, rng=np.random.default_rng(_SEED))
        p = float(test.pvalue)
    return {**found, f"{name}_p": p}


def _interval(values: np.ndarray) -> tuple[float, float]:
    if len(values) < 3 or np.ptp(values) == 0:
        return np.nan, np.nan
    found = bootstrap((values,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(_SEED)).confidence_interval
    return float(found.low), float(found.high)


if job := globals().get("snakemake"):  # set by the rule's `script:`
    build(pd.read_csv(job.input.scores), job.params.baselines).write(**job.output)
