"""The study in plain words, every sentence made from the tables: what improved, what is within noise, what got worse.

A paired difference counts when its 95 % interval leaves out zero and its p, where there is one, is below 0.05. Where only the intervals of
the two numbers are known, they must not overlap, which is the stricter test. Which way is better is known for the metrics of
`page_tables`; nothing is said about others.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pandas as pd
from page_pictures import kind, weights
from page_tables import DIRECTED, LOWER, NAMES, ShownTable, text_of
from table_downstream import ALIGNMENTS
from table_format import SIGNIFICANT

BETTER, NOISE, WORSE = "better", "noise", "worse"
VERDICTS = {BETTER: "improved", NOISE: "within noise", WORSE: "got worse"}
_AGAIN = ("of", "images", "alignment")  # what tells rows of a run apart
_FEW = 5  # differences of a table that are told one by one; more are counted


@dataclass(frozen=True)
class Difference:
    """One number beside its baseline. texts: the value, the baseline's and the difference, each with its interval."""

    table: str
    run: str
    label: str
    metric: str
    diff: float
    low: float
    high: float
    p: float
    value_text: str
    baseline_text: str
    diff_text: str

    @property
    def verdict(self) -> str:
        if self.low <= 0 <= self.high or self.p >= SIGNIFICANT:  # without a p the interval decides
            return NOISE
        return BETTER if (self.high < 0) == (self.metric in LOWER) else WORSE

    @property
    def numbers(self) -> str:
        against = f" against {self.baseline_text}" if self.baseline_text else ""
        chance = "" if pd.isna(self.p) else f", p = {self.p:.3f}" if self.p >= 0.001 else ", p < 0.001"
        return f"{self.value_text}{against}, difference {self.diff_text}{chance}"


@dataclass(frozen=True)
class Finding:
    """What was compared, the numbers, the verdict, and the name of the table that they are from."""

    verdict: str
    what: str
    numbers: str
    table: str


def differences(table: ShownTable, runs: pd.DataFrame) -> list[Difference]:
    """Every paired difference of a table: columns <metric>_diff with their intervals, for the metrics whose direction is known."""
    frame, labels, found = table.frame, _labels_of(table, runs), []
    for metric in DIRECTED:
        names = [metric, *(f"{metric}_diff{part}" for part in ("", "_low", "_high"))]
        if not set(names) <= set(frame.columns):
            continue
        # A run is in a table once, or once for every set of features and every U-Net; a source of table 4 for every alignment.
        values = {(row[table.key], *map(row.get, _AGAIN)): row for row in frame.to_dict("records")}
        for said, row in zip(labels, frame.to_dict("records"), strict=True):
            if any(pd.isna(row[name]) for name in names):
                continue
            baseline = values.get((row.get("baseline"), *map(row.get, _AGAIN)))
            diff, low, high = (float(row[name]) for name in names[1:])
            texts = text_of(frame, row, metric), text_of(frame, baseline, metric) if baseline else "", text_of(frame, row, f"{metric}_diff")
            found.append(Difference(table.name, str(row[table.key]), said, metric, diff, low, high, float(row.get(f"{metric}_p", "nan")), *texts))
    return found


def _labels_of(table: ShownTable, runs: pd.DataFrame) -> list[str]:
    """What each row is called: what guides it, or the table's own words; rows that would be called alike get the name of their run."""
    rows = table.frame.to_dict("records")
    own = runs.loc[runs.index.isin(table.frame[table.key])]
    said = []
    for row in rows:
        words = next((row[column] for column in ("what", "changed") if isinstance(row.get(column), str)), None)
        if "alignment" in row:
            words = f"depth network trained on samples of {row['source']}, {ALIGNMENTS[row['alignment']]}"
        name = words or label(str(row[table.key]), own)
        said.append(name + (f", {row['of'].lower()}" if "of" in row else "") + (f", U-Net of {row['images']:,} images" if "images" in row else ""))
    return [name if said.count(name) == 1 and "what" not in row else f"{name}, run {row[table.key]}" for name, row in zip(said, rows, strict=True)]


def label(name: str, runs: pd.DataFrame) -> str:
    """A run for readers: what guides it, with its weights; other rows keep their name."""
    if name not in runs.index:
        return name
    run = runs.loc[name]
    said = [weights(run)] * bool(weights(run)) + [str(run["sampler"]).upper()] * (runs["sampler"].nunique() > 1)
    return f"{kind(run)} ({', '.join(said)})" if said else kind(run)


def headline(found: list[Difference]) -> str:
    """What guidance did to the first metric of a table of runs, in one or two sentences. found: differences of that table."""
    metric = found[0].metric
    of = {verdict: [d for d in found if d.metric == metric and d.verdict == verdict] for verdict in VERDICTS}
    total = sum(map(len, of.values()))
    name = f"{NAMES[metric]} ({'lower' if metric in LOWER else 'higher'} is better)"
    if total == 1:
        told = {BETTER: f"improved {name}", NOISE: f"changed {name} by no more than chance can", WORSE: f"made {name} worse"}
        return f"Guidance {told[next(verdict for verdict in of if of[verdict])]} in its one run."
    if len(of[BETTER]) == total:
        lead = f"Guidance improved {name} in all {total} guided runs"
    elif of[BETTER]:
        lead = f"Guidance improved {name} in {len(of[BETTER])} of {total} guided runs"
    else:
        lead = f"Guidance did not improve {name} in any of {total} guided runs"
    rest = [f"{len(of[NOISE])} within noise"] * bool(of[NOISE]) + [f"{len(of[WORSE])} worse"] * bool(of[WORSE])
    return f"{lead}{': ' + ', '.join(rest) if rest else ''}."


def findings(tables: Mapping[str, ShownTable], runs: pd.DataFrame, guide_labels: int) -> list[Finding]:
    """All that can be said, by verdict. guide_labels: label count of the heads that guide."""
    said, found = set(), []
    for table in tables.values():
        # A run that two tables show is told of once.
        new = [d for d in differences(table, runs) if (d.run, d.metric, d.diff_text) not in said]
        said |= {(d.run, d.metric, d.diff_text) for d in new}
        found += _told(table, new)
    of_depth = {"fig4a_blocks": (_blocks,), "fig4b_labels": (_labels, guide_labels)}
    for name, (tell, *more) in of_depth.items():
        if name in tables:
            found += tell(tables[name], *more)
    return found


def _told(table: ShownTable, found: list[Difference]) -> Iterator[Finding]:
    """A finding for each difference, or for each verdict where they are many."""
    if table.name == "controls":  # what improves without guidance must not read as if guidance did it
        found = [d if d.label.startswith("guided") else replace(d, label=f"control: {d.label}") for d in found]
    for metric in dict.fromkeys(d.metric for d in found):
        rows = [d for d in found if d.metric == metric]
        if len(rows) <= _FEW or "alignment" in table.frame:  # errors under different alignments have no best and no worst
            yield from (Finding(d.verdict, f"{NAMES[metric]}: {d.label}", d.numbers, table.name) for d in rows)
            continue
        for verdict in VERDICTS:
            those = [d for d in rows if d.verdict == verdict]
            if those:
                word, chosen = ("worst", worst(those)) if verdict == WORSE else ("best", best(those))
                which = chosen.label if len(those) == 1 else f"the {word} of them {chosen.label}"
                yield Finding(verdict, f"{NAMES[metric]}: {len(those)} of {len(rows)} runs{';' if len(those) > 1 else ','} {which}", chosen.numbers, table.name)


def best(found: list[Difference]) -> Difference:
    """The difference, of one metric, that gained most."""
    return (min if found[0].metric in LOWER else max)(found, key=lambda d: d.diff)


def worst(found: list[Difference]) -> Difference:
    return (max if found[0].metric in LOWER else min)(found, key=lambda d: d.diff)


def apart(first: Mapping, second: Mapping, metric: str) -> str:
    """Verdict on the first of two rows by their intervals; noise where one has none."""
    if first[f"{metric}_high"] < second[f"{metric}_low"]:
        return BETTER if metric in LOWER else WORSE
    if first[f"{metric}_low"] > second[f"{metric}_high"]:
        return BETTER if metric not in LOWER else WORSE
    return NOISE


def _compared(table: ShownTable, what: str, first: Mapping, second: Mapping, metric: str = "abs_rel") -> Finding:
    """Two rows of a table beside each other."""
    one, other = (text_of(table.frame, row, metric) for row in (first, second))
    return Finding(apart(first, second, metric), f"{NAMES[metric]}: {what}", f"{one} against {other}", table.name)


def _blocks(table: ShownTable) -> Iterator[Finding]:
    """The block that reads depth best at the lowest noise level, beside the constant map."""
    level = table.frame["t"].min()
    rows = table.frame[table.frame["t"] == level]
    heads = rows[rows["head"] != "constant"].to_dict("records")
    constant = rows[rows["head"] == "constant"].to_dict("records")
    if heads and constant:
        best = min(heads, key=lambda row: row["abs_rel"])
        readable = sum(apart(row, constant[0], "abs_rel") == BETTER for row in heads)
        which = f"depth read from block {int(best['block'])}, the best of {len(heads)}, at t = {level}, against one constant map, which {readable} blocks beat"
        yield _compared(table, which, best, constant[0])


def _labels(table: ShownTable, guide: int) -> Iterator[Finding]:
    """Strong against weak head at each noise level; what more labels bring."""
    at = {(row["head"], row["labels"], row["t"]): row for row in table.frame.to_dict("records")}
    levels, most = sorted(table.frame["t"].unique()), table.frame["labels"].max()
    for level in levels:
        if {("strong", guide, level), ("weak", guide, level)} <= at.keys():
            which = f"depth by the strong head, {guide} labels, t = {level}, against the weak one"
            yield _compared(table, which, at["strong", guide, level], at["weak", guide, level])
    if most > guide and {("strong", most, levels[0]), ("strong", guide, levels[0])} <= at.keys():
        which = f"strong head with {most} labels, t = {levels[0]}, against {guide} labels"
        yield _compared(table, which, at["strong", most, levels[0]], at["strong", guide, levels[0]])
