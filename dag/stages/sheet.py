"""The run sheet of a study: read, checked, and what its cells mean. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from dag.stages.validation import StudyError, validate

GUIDED = ("w_dc", "w_dp")
# The comparison of guidances: the paper has one table for each of its two domains, a study one of them.
COMPARISONS = ("table1", "table2")
# What a sheet need not have a column for.
_DEFAULTS = {"control": "none", "variant": "none"}


def read_sheet(config: Mapping, source: str) -> pd.DataFrame:
    """The rows of `config["runs"]` by run. source: the config's file. Raises StudyError at the first fault."""
    path = Path(config["runs"])
    if not path.is_file():
        raise StudyError(f"{source}: runs is {path}, which does not exist")
    try:
        sheet = pd.read_csv(path, sep="\t", comment="#", dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: not a table of tab-separated values: {' '.join(str(error).split())}") from None
    rows = []
    for line, row in enumerate(sheet.to_dict("records"), 2):
        row = _DEFAULTS | {k: v if k in ("run", "variant", "tables") else _number(v) for k, v in row.items()}
        validate(row, "runs.schema.yaml", f"{path}: row {row.get('run', line)!r}")
        rows.append(row)
    if not rows:
        raise StudyError(f"{path}: no rows, expected at least one run")
    names = [r["run"] for r in rows]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise StudyError(f"{path}: the run names {twice} appear more than once")
    if len(tables := compared_in(r["tables"] for r in rows)) > 1:
        raise StudyError(f"{path}: rows are of {' and of '.join(tables)}, expected one of them: a study compares guidances in one table")
    for row in rows:
        _check_run(config, row, f"{path}: row {row['run']!r}")
    _check_best(path, rows)
    # Of objects: a column of floats would turn the whole numbers of other rows, and their hashes, into others.
    return pd.DataFrame(rows, dtype=object).set_index("run")


def _check_run(config: Mapping, row: dict, where: str) -> None:
    resolutions, counts, variants = config["prior"]["resolutions"], list(config["heads"]["labels"]), config.get("variants", {})
    if row["prior"] not in resolutions:
        raise StudyError(f"{where}: prior is {row['prior']}, which is not trained; prior.resolutions has {resolutions}")
    if row["heads"] != "guide" and row["heads"] not in counts:
        raise StudyError(f"{where}: heads is {row['heads']}, expected 'guide' or a label count of heads.labels {counts}")
    if row["variant"] not in ("none", *variants):
        raise StudyError(f"{where}: variant is {row['variant']!r}, expected 'none' or one of variants: {', '.join(variants) or 'there are none'}")
    # Of the other label counts, features are kept for the blocks of `heads` alone.
    if row["heads"] not in ("guide", config["heads"]["guide"]) and {"heads.strong", "heads.weak"} & variants.get(row["variant"], {}).keys():
        raise StudyError(f"{where}: heads is {row['heads']}, expected 'guide' with variant {row['variant']!r}, which changes the blocks that heads read")
    if row["sampler"] == "ddpm" and row["eta"] != 0:
        raise StudyError(f"{where}: eta is {row['eta']} for ddpm, expected 0 (eta is DDIM's)")
    if row["sampler"] == "ddim" and (row["steps"] < 2 or len(range(0, 1000, -(-1000 // row["steps"]))) != row["steps"]):
        raise StudyError(f"{where}: steps is {row['steps']} for ddim, expected a number that an integer stride over 1000 timesteps takes, such as 25")
    for key in ("tau", "window"):
        low, high = span(row[key])
        if not low <= high < 1000:
            raise StudyError(f"{where}: {key} is {row[key]!r}, expected one timestep or low-high within 0 to 999")


def _check_best(path: Path, rows: list[dict]) -> None:
    """A weight `best` needs a sweep of its kind, of fixed weights and on other seeds."""
    sweep = [row for row in rows if in_sweep(row["tables"])]
    for row in (r for r in rows if "best" in (r["w_dc"], r["w_dp"])):
        where, kind = f"{path}: row {row['run']!r}", guidance_kind(row)
        if row in sweep:
            raise StudyError(f"{where}: a weight is 'best' in a row of fig8, expected numbers: the rows of fig8 find the best")
        if kind not in map(guidance_kind, sweep):
            raise StudyError(f"{where}: a weight is 'best', but no row of fig8 has guidance {kind} alone to find it")
        if shared := [r["run"] for r in sweep if max(r["first_seed"], row["first_seed"]) < min(r["first_seed"] + r["n"], row["first_seed"] + row["n"])]:
            raise StudyError(f"{where}: its weights are found by {shared[0]!r}, which has some of the same seeds; rows of fig8 need seeds of their own")


def compared_in(tables: Iterable[str]) -> list[str]:
    """Which of COMPARISONS cells of the column `tables` name."""
    found = {table for cell in tables for table in cell.split(",")}
    return [table for table in COMPARISONS if table in found]


def in_sweep(tables: str) -> bool:
    """Whether a run is one of those that find the best weights."""
    return "fig8" in tables.split(",")


def guidance_kind(run: Mapping) -> str:
    """ "dcg", "dpg" or "dcg+dpg": which weights of a run are not zero; "" for an unguided one."""
    return "+".join(name for name, key in zip(("dcg", "dpg"), GUIDED, strict=True) if run[key] != 0)


def span(text) -> tuple[int, int]:
    """(low, high) of '300' or '100-500'."""
    low, _, high = str(text).partition("-")
    return int(low), int(high or low)


def _number(text: str):
    """A finite number, whole ones as int (25.0 is 25); other text as it is."""
    try:
        number = float(text)
    except ValueError:
        return text
    return text if not math.isfinite(number) else int(number) if number.is_integer() else number
