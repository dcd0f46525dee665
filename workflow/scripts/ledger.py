"""docs/ledger.md: the choices of docs/ledger.yaml beside what the sensitivity runs measured."""

from collections.abc import Collection
from pathlib import Path

import pandas as pd
import yaml

INTRODUCTION = """# The ledger: what the paper leaves open

A result of this method depends on choices that the paper does not state. Each of them is listed here with what we chose, the
key that holds it, why, and the run that tested how much it matters. Keys are those of a study's config file (`config/rooms.yaml`) or,
in *italics*, columns of its run sheet (`config/runs/rooms.tsv`); `config/README.md` explains both. Where the last column says
"not yet run", nobody has measured that choice's effect: treat it as untested.

What the paper, its figures or its project page do state is not in this list: the two losses and where their gradients stop, the blocks
{2, 4, 5, 6, 7} and {6}, the L1 loss of the heads, the layer `Linear -> SiLU -> BatchNorm` plus `Embedding -> Linear`, w = 40 for both terms,
and a prior at half the image's side being best.

`snakemake ledger` writes this page from `docs/ledger.yaml` and [the sensitivity table](../results/rooms/tables/sensitivity.md). ΔdFID: difference to
unguided samples of the same seeds, with its 95 % interval; lower is better.
"""
METRICS = {"dfid_second": "the second judge", "dfid_strong": "the own head"}
_HEADER = "| left open | our choice | key | why | tested by |\n|---|---|---|---|---|"


def build(ledger: dict, sensitivity: pd.DataFrame, sheet: Collection[str]) -> str:
    """ledger: docs/ledger.yaml. sensitivity: tables/sensitivity.csv. sheet: the runs that there are. Raises ValueError on a choice that names another.

    What the table has no number of, because a run is newer, says "not yet run".
    """
    rows = sensitivity.set_index("run")
    parts = [INTRODUCTION]
    for section in ledger["sections"]:
        lines = [f"## {section['section']}", "", _HEADER]
        for choice in section["choices"]:
            tested = [choice["tested"]] if "tested" in choice else []
            if "runs" in choice:
                if unknown := [run for run in choice["runs"] if run not in sheet]:
                    raise ValueError(f"docs/ledger.yaml: names run {unknown[0]!r}; the run sheet has {', '.join(sheet)}")
                tested.append(_measured(rows, choice["runs"], choice.get("metric", "dfid")))
            lines.append(f"| {choice['open']} | {choice['choice']} | {choice['key']} | {choice['why']} | {'; '.join(tested)} |")
        parts.append("\n".join([*lines, ""]))
    return "\n".join(parts)


def _measured(rows: pd.DataFrame, runs: list[str], metric: str) -> str:
    default = rows[rows["changed"] == "default"].iloc[0]
    changed = {run: f"`{rows.loc[run, 'changed']}`" if run in rows.index else f"`{run}`" for run in runs}
    if metric == "dfid":
        return f"ΔdFID {_delta(default)} by default, {', '.join(f'{text} {_found(rows, run, metric)}' for run, text in changed.items())}"
    pairs = (f"{text} {_found(rows, run, 'dfid')}, by {METRICS[metric]} {_found(rows, run, metric)}" for run, text in changed.items())
    return f"ΔdFID of {'; '.join(pairs)}"


def _found(rows: pd.DataFrame, run: str, metric: str) -> str:
    return _delta(rows.loc[run], metric) if run in rows.index and f"{metric}_diff" in rows else "not yet run"


def _delta(row, metric: str = "dfid") -> str:
    value, low, high = (f"{row[key]:+.3f}".replace("-", "−") for key in (f"{metric}_diff", f"{metric}_diff_low", f"{metric}_diff_high"))
    return f"{value} [{low}, {high}]"


if job := globals().get("snakemake"):  # set by the rule's `script:`
    text = build(yaml.safe_load(Path(job.params.ledger).read_text(encoding="utf-8")), pd.read_csv(job.input.table), job.params.runs)
    Path(job.params.page).write_text(text, encoding="utf-8")
