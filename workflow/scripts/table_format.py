"""One way to write a table: csv for programs, Markdown and LaTeX for readers, all from the same frame."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

MISSING = "–"
CSV = "%.6g"  # a number of a csv
SIGNIFICANT = 0.05
_TEX = str.maketrans(
    {
        **{c: "\\" + c for c in "_%&#$"},
        "–": "--",
        "†": "\\textdagger{}",
        "−": "$-$",
        "↓": "$\\downarrow$",
        "↑": "$\\uparrow$",
        "Δ": "$\\Delta$",
        "δ": "$\\delta$",
        "²": "\\textsuperscript{2}",
        "³": "\\textsuperscript{3}",
        "×": "$\\times$",
        "≥": "$\\geq$",
        "<": "$<$",
        ">": "$>$",
        "~": "\\textasciitilde{}",
    }
)


@dataclass(frozen=True)
class Column:
    """A column for readers: "value", or "value [low, high]" where `interval` is set, from `value`, `value`_low, `value`_high of the frame.

    difference_of: the column whose differences this one has: they are written with a sign.
    digits: decimals; None: as many as `digits_of` says; text is kept as it is.
    least: what is smaller is written as "<least".
    p: the column of p-values; a number whose p is below 0.05 and whose interval leaves out zero gets a star.
    """

    title: str
    value: str
    interval: bool = False
    digits: int | None = None
    difference_of: str | None = None
    p: str | None = None
    least: float | None = None

    def texts(self, frame: pd.DataFrame) -> list[str]:
        digits = digits_of(frame, self.value, self.difference_of) if self.digits is None else self.digits
        parts = [self.value, f"{self.value}_low", f"{self.value}_high"] if self.interval else [self.value]
        frame = as_written(frame[list(dict.fromkeys([*parts, self.p or self.value]))])
        stars = ["*" if self.p and row[self.p] < SIGNIFICANT and row[parts[1]] * row[parts[2]] > 0 else "" for _, row in frame.iterrows()]
        return [self._text([row[part] for part in parts], digits) + star for (_, row), star in zip(frame.iterrows(), stars, strict=True)]

    def rule(self, frame: pd.DataFrame) -> str:
        """Alignment: "l" for text, "r" for numbers."""
        return "r" if pd.api.types.is_numeric_dtype(frame[self.value]) else "l"

    def _text(self, numbers: list, digits: int) -> str:
        if isinstance(numbers[0], str):
            return numbers[0]
        if pd.isna(numbers[0]):
            return MISSING
        if self.least and numbers[0] < self.least:
            return f"<{self.least:g}"
        value, *interval = (f"{number:{'+' if self.difference_of else ''},.{digits}f}".replace("-", "−") for number in numbers)
        return value if not interval or pd.isna(numbers[1]) else f"{value} [{interval[0]}, {interval[1]}]"


def chance(title: str, value: str) -> Column:
    """A column of p-values."""
    return Column(title, value, digits=3, least=0.001)


@dataclass(frozen=True)
class Block:
    """A part of a table with columns of its own: a title (may be empty) above the rows of a frame."""

    title: str
    frame: pd.DataFrame
    columns: list[Column]


@dataclass(frozen=True)
class Table:
    """frame: every number, for the csv. blocks: what readers see of it. footnote: how the numbers were measured."""

    frame: pd.DataFrame
    caption: str
    footnote: str
    blocks: list[Block] = field(default_factory=list)

    def write(self, csv: str, md: str, tex: str) -> None:
        self.frame.to_csv(csv, index=False, float_format=CSV)
        Path(md).write_text(self.markdown(), encoding="utf-8")
        Path(tex).write_text(self.latex(), encoding="utf-8")

    def markdown(self) -> str:
        lines = [f"**{self.caption}**", ""]
        for block in self.blocks:
            lines += [block.title, ""] if block.title else []
            lines += [_line(column.title for column in block.columns), _line({"l": "---", "r": "---:"}[column.rule(block.frame)] for column in block.columns)]
            lines += [_line(row) for row in _rows(block)]
            lines.append("")
        return "\n".join([*lines, self.footnote, ""])

    def latex(self) -> str:
        lines = ["% needs booktabs", "\\begin{table}", "\\centering\\small", f"\\caption{{{_tex(self.caption)}}}"]
        for block in self.blocks:
            lines += [f"\\par\\medskip {_tex(block.title)}\\par\\smallskip"] if block.title else []
            lines += [f"\\begin{{tabular}}{{{''.join(column.rule(block.frame) for column in block.columns)}}}", "\\toprule"]
            lines += [_tex_line(column.title for column in block.columns), "\\midrule"]
            lines += [_tex_line(row) for row in _rows(block)]
            lines += ["\\bottomrule", "\\end{tabular}"]
        return "\n".join([*lines, f"\\par\\medskip\\footnotesize {_tex(self.footnote)}", "\\end{table}", ""])


def as_written(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame with its numbers as a csv has them: what is rounded from either then reads the same, in Markdown and on the page."""
    return frame.apply(lambda column: column.map(lambda number: float(CSV % number)) if pd.api.types.is_float_dtype(column) else column)


def decimals(values: pd.Series, significant: int = 4, most: int = 3) -> int:
    """Decimals, at most so many, that show a column's typical number with so many significant digits; 0 for text and whole numbers."""
    numbers = pd.to_numeric(values, errors="coerce").dropna().abs()
    if numbers.empty or (numbers % 1 == 0).all():
        return 0
    typical = max(float(numbers.median()), 1e-3)
    return int(np.clip(significant - 1 - np.floor(np.log10(typical)), 0, most))


def digits_of(frame: pd.DataFrame, name: str, difference_of: str | None = None) -> int:
    """Decimals with which a column is shown: a difference with those of its metric, and with more where it has hardly two digits then."""
    if difference_of is None:
        return decimals(frame[name])
    return max(decimals(frame[difference_of]), decimals(frame[name], significant=2, most=4))


def published_block(published: pd.DataFrame, table: str, title: str) -> list[Block]:
    """The authors' own numbers, on their own data: a block of context beneath ours (none where nothing was published)."""
    rows = published[published["table"] == table]
    columns = [Column(name, name) for name in ("dataset", "row", "metric", "value", "n", "source")]
    return [Block(title, rows, columns)] if len(rows) else []


def _rows(block: Block) -> list[tuple[str, ...]]:
    return list(zip(*(column.texts(block.frame) for column in block.columns), strict=True))


def _line(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def _tex(text: str) -> str:
    return text.translate(_TEX)


def _tex_line(cells) -> str:
    return " & ".join(_tex(cell) for cell in cells) + " \\\\"
