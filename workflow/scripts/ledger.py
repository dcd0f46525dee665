"""docs/ledger.md: the choices of docs/ledger.yaml beside what the sensitivity runs measured."""

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
_HEADER = "| left open | our choice | key | why | tested by |\n|---|---|---|---|---|"


def build(ledger: dict, sensitivity: pd.DataFrame) -> str:
    """ledger: docs/ledger.yaml. sensitivity: tables/sensitivity.csv. Raises ValueError on a choice whose run the table lacks."""
    rows = sensitivity.set_index("run")
    parts = [INTRODUCTION]
    for section in ledger["sections"]:
        lines = [f"## {section['section']}", "", _HEADER]
        for choice in section["choices"]:
            tested = [choice["tested"]] if "tested" in choice else []
            if "runs" in choice:
                tested.append(_measured(rows, choice["runs"]))
            lines.append(f"| {choice['open']} | {choice['choice']} | {choice['key']} | {choice['why']} | {'; '.join(tested)} |")
        parts.append("\n".join([*lines, ""]))
    return "\n".join(parts)


def _measured(rows: pd.DataFrame, runs: list[str]) -> str:
    if missing := [run for run in runs if run not in rows.index]:
        raise ValueError(f"docs/ledger.yaml: names run {missing[0]!r}; tables/sensitivity.csv has {', '.join(rows.index)}")
    default = rows[rows["changed"] == "default"].iloc[0]
    texts = [f"`{rows.loc[run, 'changed']}` {_delta(rows.loc[run])}" for run in runs]
    return f"ΔdFID {_delta(default)} by default, {', '.join(texts)}"


def _delta(row) -> str:
    value, low, high = (f"{row[key]:+.3f}".replace("-", "−") for key in ("dfid_diff", "dfid_diff_low", "dfid_diff_high"))
    return f"{value} [{low}, {high}]"


if job := globals().get("snakemake"):  # set by the rule's `script:`
    text = build(yaml.safe_load(Path(job.params.ledger).read_text(encoding="utf-8")), pd.read_csv(job.input.table))
    Path(job.params.page).write_text(text, encoding="utf-8")
