"""Whether guidance mends a weak model only: distances against how many images the U-Net was trained on."""

import numpy as np
import pandas as pd
import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter


def draw(table: pd.DataFrame) -> Figure:
    """table: tables/gain.csv. The rows of panels are dFID and FID: on the left their values, on the right guided minus unguided."""
    unguided, guided = table[table["baseline"].isna()], table[table["baseline"].notna()]
    figure, axes = style.chart(2, 3.4, 2.3, rows=2, sharex=True)
    for row, (metric, name) in enumerate((("dfid", "dFID"), ("fid", "FID"))):
        values, differences = axes[row]
        for i, (label, rows) in enumerate((("unguided", unguided), ("guided", guided))):
            _line(values, rows, metric, style.COLOURS[i], style.MARKERS[i], label, dodge=1.05 ** (2 * i - 1))
        values.set_ylabel(f"{name}  (lower is better)")
        values.set_yscale("log")
        values.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        values.yaxis.set_major_formatter("{x:g}")
        values.yaxis.set_minor_formatter(NullFormatter())
        differences.axhline(0, color=style.GREY, linestyle="--", linewidth=1.2, zorder=1)
        _line(differences, guided, f"{metric}_diff", style.BLACK, style.MARKERS[2], "guided − unguided, paired by seed")
        differences.set_ylabel(f"Δ{name}")
    counts = sorted(table["images"].unique())
    for panel in axes[1]:
        panel.set_xscale("log")
        panel.set_xticks(counts, [f"{count:,}" for count in counts], fontsize=8)
        panel.minorticks_off()
        panel.set_xlabel("images that the U-Net was trained on")
    for panel in axes[0]:
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def _line(panel: Axes, rows: pd.DataFrame, number: str, colour: str, marker: str, label: str, dodge: float = 1.0) -> None:
    error = np.abs(rows[[f"{number}_low", f"{number}_high"]].to_numpy().T - rows[number].to_numpy())
    panel.errorbar(rows["images"] * dodge, rows[number], error, color=colour, marker=marker, label=label, zorder=3)


if job := globals().get("snakemake"):  # set by the rule's `script:`
    style.save(draw(pd.read_csv(job.input.table)), **job.output)
