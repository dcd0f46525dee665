"""Fig. 8: how strong the guidance should be."""

import numpy as np
import pandas as pd
import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

_WEIGHTS = {"w_dc": ("w_dp", "$w_{dc}$", "$w_{dp}$", "depth consistency"), "w_dp": ("w_dc", "$w_{dp}$", "$w_{dc}$", "depth prior")}
_UNGUIDED = "unguided, 95 % interval"


def draw(table: pd.DataFrame) -> Figure:
    """table: tables/fig8_scale.csv. One column per weight, a line for each value of the other one; the rows are dFID and FID."""
    table = table.astype({"w_dc": float, "w_dp": float})
    figure, axes = style.chart(2, 3.4, 2.5, rows=2, sharey="row", sharex="col")
    for row, (metric, name) in enumerate((("dfid", "dFID"), ("fid", "FID"))):
        for column, weight in enumerate(_WEIGHTS):
            _panel(axes[row, column], table, metric, weight)
        axes[row, 0].set_ylabel(f"{name}  (lower is better)")
    for column, (_, symbol, _, name) in enumerate(_WEIGHTS.values()):
        axes[1, column].set_xlabel(f"weight of {name}, {symbol}")
        panel = axes[0, column]
        lines = [item for item in panel.containers if item.get_label()]
        panel.legend(handles=lines, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(lines), columnspacing=1.2, handletextpad=0.5)
    best = Line2D([], [], linestyle="none", marker="o", markersize=9, markerfacecolor="none", markeredgecolor=style.BLACK, label="best of its kind")
    unguided = [line for line in axes[0, 0].lines if line.get_label() == _UNGUIDED][:1]
    figure.legend(handles=[*unguided, best], loc="outside upper center", ncols=2)
    return figure


def _panel(panel: Axes, table: pd.DataFrame, metric: str, weight: str) -> None:
    other = _WEIGHTS[weight][0]
    for base in table[table["sweep"] == "baseline"].itertuples():
        panel.axhspan(getattr(base, f"{metric}_low"), getattr(base, f"{metric}_high"), color="#e2e2e2", linewidth=0, zorder=0)
        panel.axhline(getattr(base, metric), color=style.GREY, linestyle="--", linewidth=1.2, label=_UNGUIDED, zorder=1)
    swept = table[table[weight] != 0].sort_values(weight, kind="stable")
    lines = _lines(swept, weight, other)
    for i, (label, rows) in enumerate(lines):
        error = np.abs(rows[[f"{metric}_low", f"{metric}_high"]].to_numpy().T - rows[metric].to_numpy())
        dodge = 1.035 ** (i - (len(lines) - 1) / 2)
        colour, marker = style.COLOURS[i % len(style.COLOURS)], style.MARKERS[i % len(style.MARKERS)]
        panel.errorbar(rows[weight] * dodge, rows[metric], error, color=colour, marker=marker, label=label, zorder=3)
        best = rows[rows["best"] == "best"]
        panel.plot(best[weight] * dodge, best[metric], "o", markersize=12, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.4, zorder=4)
    panel.set_xscale("log")
    ticks = sorted(swept[weight].unique())
    panel.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    panel.minorticks_off()


def _lines(swept: pd.DataFrame, weight: str, other: str) -> list[tuple[str, pd.DataFrame]]:
    """Label and rows of each line: one for each value of the other weight, or, where both weights only ever grow together, one for that."""
    _, symbol, other_symbol, _ = _WEIGHTS[weight]
    joint = swept[swept[other] != 0]
    if (joint[weight] == joint[other]).all():
        return [(f"{other_symbol} = 0", swept[swept[other] == 0]), *([(f"{other_symbol} = {symbol}", joint)] if len(joint) else [])]
    return [(f"{other_symbol} = {value:g}", rows) for value, rows in swept.groupby(other)]


if job := globals().get("snakemake"):  # set by the rule's `script:`
    style.save(draw(pd.read_csv(job.input.table)), **job.output)
