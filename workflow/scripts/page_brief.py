"""The study in a few sentences with their numbers: what a reader who stays two minutes should know. Every one is made from a table."""

from collections.abc import Iterator, Mapping

import page_summary
import pandas as pd
from page_pictures import weights
from page_summary import BETTER, NOISE, WORSE, Difference, Finding, apart
from page_tables import LOWER, NAMES, ShownTable, text_of


def brief(tables: Mapping[str, ShownTable], runs: pd.DataFrame, config: Mapping) -> list[Finding]:
    """One finding for each question that the study has a table for."""
    compared = next((tables[name] for name in tables if name.endswith("_guidance")), None)
    asked = [
        ("fig4b_labels", lambda table: _readable(table, config["heads"]["guide"])),
        (compared and compared.name, lambda table: _guided(table, runs, config["figures"]["guided"])),
        ("fig8_scale", lambda table: _sweep(table, runs)),
        ("controls", lambda table: _controls(table, runs)),
        ("table4_downstream", lambda table: _downstream(table, runs)),
    ]
    return [finding for name, tell in asked if name in tables for finding in tell(tables[name])]


def _readable(table: ShownTable, guide: int) -> Iterator[Finding]:
    frame = table.frame[(table.frame["labels"] == guide) & (table.frame["t"] == table.frame["t"].min())].set_index("head")
    if {"strong", "constant"} <= set(frame.index):
        strong, constant = (frame.loc[head].to_dict() for head in ("strong", "constant"))
        verdict = apart(strong, constant, "abs_rel")
        words = {BETTER: "can be read from", NOISE: "cannot be told from", WORSE: "is misread from"}[verdict]
        what = f"Depth {words} the frozen model's features: AbsRel of the strong head, {guide} labels, t = {strong['t']}, against one constant map"
        yield Finding(verdict, what, f"{text_of(table.frame, strong, 'abs_rel')} against {text_of(table.frame, constant, 'abs_rel')}", table.name)


def _guided(table: ShownTable, runs: pd.DataFrame, guided: str) -> Iterator[Finding]:
    found = [d for d in page_summary.differences(table, runs) if d.run == guided]
    if found:
        first = found[0]
        label = first.label[0].lower() + first.label[1:] if first.label.startswith("Both") else first.label
        yield Finding(first.verdict, f"Guided by {label}, {NAMES[first.metric]} {_moves(first)}", first.numbers, table.name)


def _sweep(table: ShownTable, runs: pd.DataFrame) -> Iterator[Finding]:
    found = [d for d in page_summary.differences(table, runs) if d.metric == "dfid"]
    if found:
        best = page_summary.best(found)
        where = weights(runs.loc[best.run])
        what = f"Of the {len(found)} weights of the sweep, which has seeds of its own, dFID is lowest at {where}, where it {_moves(best)}"
        yield Finding(best.verdict, what, best.numbers, table.name)


def _controls(table: ShownTable, runs: pd.DataFrame) -> Iterator[Finding]:
    """Controls: all rows but the baselines and the guidance that is controlled."""
    frame = table.frame.set_index("run")
    controlled = (frame["control"] == "none") & ((frame["w_dc"] != 0) | (frame["w_dp"] != 0))
    found = [d for d in page_summary.differences(table, runs) if d.metric == "dfid" and not controlled[d.run]]
    if found:
        helped = [d for d in found if d.verdict == BETTER]
        best = page_summary.best(helped or found)
        count = f"{len(helped) or 'None'} of {len(found)} controls, which should not help, {'improve' if len(helped) > 1 else 'improves'} dFID"
        yield Finding(best.verdict, f"{count}; {'most' if helped else 'nearest to it'}: {best.label}", best.numbers, table.name)


def _downstream(table: ShownTable, runs: pd.DataFrame) -> Iterator[Finding]:
    """The first pair of sources under the first alignment."""
    for first in [d for d in page_summary.differences(table, runs) if d.metric == "abs_rel"][:1]:
        words = {BETTER: "more from guided samples than", NOISE: "from guided samples neither more nor less than", WORSE: "less from guided samples than"}
        real = table.frame[table.frame["source"] == "reference"].to_dict("records")[:1]
        numbers = first.numbers + "".join(f"; from real ones {text_of(table.frame, row, 'abs_rel')}" for row in real)
        yield Finding(first.verdict, f"A depth network learns {words[first.verdict]} from unguided ones: AbsRel on real images", numbers, table.name)


def _moves(difference: Difference) -> str:
    """What guidance does to a metric, as a verb."""
    if difference.verdict == NOISE:
        return "changes by no more than chance can"
    return "falls" if (difference.verdict == BETTER) == (difference.metric in LOWER) else "rises"
