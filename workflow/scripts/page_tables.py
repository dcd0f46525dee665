"""Tables of the page: a cell for every number of a csv file, rounded for readers, exact for programs (`raw`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import run_rows
import table_distances
import table_downstream
import table_geometry
from table_format import Column, chance, digits_of

# Measurements for readers, as the tables call them: with an arrow in the direction in which they are better, if there is one.
TITLES = {
    **{metric: f"{title} ↓" for metric, title in run_rows.TITLES.items()},
    **table_distances.TITLES,
    **table_downstream.READERS,
    **table_geometry.SCORES,
    "sq_rel": "SqRel ↓",
    "rmse_log": "RMSElog ↓",
    "si_log": "SILog ↓",
}
NAMES = {metric: title.rstrip(" ↓↑") for metric, title in TITLES.items()}
DIRECTED = [metric for metric, title in TITLES.items() if title.endswith(("↓", "↑"))]
LOWER = {metric for metric, title in TITLES.items() if title.endswith("↓")}
_OTHERS = {"n_train": "images", "seconds_per_sample": "s / sample", "first_seed": "first seed"}
_OTHERS |= {run_rows.GAP: "log(dFID / by own head)", f"{run_rows.GAP}_diff": "self-flattery", f"{run_rows.GAP}_p": "p of self-flattery"}
_EXPLAINED = {"dfid_strong": run_rows.OWN_HEAD, run_rows.SECOND: run_rows.SECOND_JUDGE}
_DIGITS = {"seconds_per_sample": 3, run_rows.STRENGTH.value: run_rows.STRENGTH.digits}
_INTERVAL = ("", "_low", "_high")


@dataclass(frozen=True)
class Cell:
    """text: as shown. raw: what the file says, one string, or three for a number with an interval."""

    text: str
    raw: tuple[str, ...]


@dataclass(frozen=True)
class ShownTable:
    """name: of its file. caption, note: what it shows and how it was measured. heads: titles. numeric: which columns sort as numbers.

    rows: cells; the first column names a row. frame: the numbers. text: the csv itself.
    """

    name: str
    caption: str
    note: str
    heads: list[str]
    numeric: list[bool]
    rows: list[list[Cell]]
    frame: pd.DataFrame
    text: str

    @property
    def key(self) -> str:
        """The csv column that names a row."""
        return "run" if "run" in self.frame else str(self.frame.columns[0])

    @property
    def short(self) -> str:
        """The part of the caption that names it ("Table 1")."""
        name = self.caption.partition(":")[0]
        return name if len(name) <= 30 else self.name.replace("_", " ").capitalize()


def load(csv: str | Path, markdown: str | Path | None = None, separator: str = ",") -> ShownTable:
    """A table from its csv; caption and footnote are those of its Markdown."""
    text = Path(csv).read_text(encoding="utf-8")
    frame, exact = (pd.read_csv(csv, sep=separator, **options) for options in ({}, {"dtype": str, "keep_default_na": False}))
    name = Path(csv).stem
    caption, note = _words(markdown) if markdown else (name, "")
    # The csv has columns that the Markdown, whose footnote it is, leaves out.
    note += "".join(words for column, words in _EXPLAINED.items() if column in frame and words.strip() not in note)
    heads, numeric, columns = [], [], []
    # What names a row comes first: it stays in sight when a table is moved sideways.
    for title, parts, texts in sorted(_columns(frame), key=lambda column: column[0] != "run"):
        heads.append(title)
        numeric.append(pd.api.types.is_numeric_dtype(frame[parts[0]]))
        columns.append([Cell(text, tuple(raw)) for text, raw in zip(texts, exact[parts].to_numpy().tolist(), strict=True)])
    return ShownTable(name, caption, note, heads, numeric, [list(row) for row in zip(*columns, strict=True)], frame, text)


def title(column: str) -> str:
    """The name of a csv column for readers."""
    if column in TITLES:
        return TITLES[column]
    for suffix, words in (("_diff", "Δ{}"), ("_p", "p of Δ{}"), ("_n", "n of {}")):
        if column.endswith(suffix) and column.removesuffix(suffix) in NAMES:
            return words.format(NAMES[column.removesuffix(suffix)])
    return _OTHERS.get(column, column)


def text_of(frame: pd.DataFrame, row: Mapping, name: str) -> str:
    """ "value [low, high]" of a row's column `name`, or the value alone where no interval is known, with the decimals of that column of the frame."""
    base = _base(frame, name)
    digits = digits_of(frame, name, base)
    return Column(name, name, f"{name}_low" in row, digits, base).texts(pd.DataFrame([row]))[0]


def _base(frame: pd.DataFrame, name: str) -> str | None:
    """The column whose differences column `name` has, if it has any."""
    base = name.removesuffix("_diff")
    return base if base != name and base in frame else None


def _columns(frame: pd.DataFrame):
    """Title, names of the csv columns and texts of each column to show: a number and its interval are one."""
    taken = set()
    for name in frame.columns:
        if name in taken:
            continue
        interval = all(f"{name}{part}" in frame for part in _INTERVAL)
        parts = [f"{name}{part}" for part in _INTERVAL] if interval else [name]
        taken |= set(parts)
        base = _base(frame, name)
        p = f"{base}_p" if base and interval and f"{base}_p" in frame else None
        column = chance(name, name) if name.endswith("_p") else Column(name, name, interval, _DIGITS.get(name), base, p)
        yield title(name), parts, column.texts(frame)


def _words(markdown: str | Path) -> tuple[str, str]:
    """Caption (first paragraph, bold) and footnote (last paragraph) of a table in Markdown."""
    paragraphs = Path(markdown).read_text(encoding="utf-8").strip().split("\n\n")
    last = paragraphs[-1]
    return paragraphs[0].strip("* "), "" if last.startswith("|") or len(paragraphs) == 1 else last
