"""Fig. 4a: which decoder blocks know about depth."""

import numpy as np
import pandas as pd
import style
from matplotlib.figure import Figure


def draw(table: pd.DataFrame) -> Figure:
    """table: tables/fig4a_blocks.csv."""
    blocks = table.dropna(subset=["block"])
    numbers, levels = sorted(blocks["block"].unique()), sorted(blocks["t"].unique())
    figure, axes = style.chart(1, 0.62 * len(numbers) + 1.6, 3.4)
    panel = axes[0, 0]
    for i, t in enumerate(levels):
        rows = blocks[blocks["t"] == t].sort_values("block")
        shift = 0.12 * (i - (len(levels) - 1) / 2)
        error = np.abs(rows[["abs_rel_low", "abs_rel_high"]].to_numpy().T - rows["abs_rel"].to_numpy())
        panel.errorbar(rows["block"] + shift, rows["abs_rel"], error, color=style.COLOURS[i], marker=style.MARKERS[i], label=f"$t$ = {t}", linewidth=1)
    floor = table.loc[table["head"] == "constant", "abs_rel"]
    if len(floor):
        panel.axhline(floor.mean(), color=style.GREY, linestyle="--", linewidth=1.2, label=style.FLOOR, zorder=1)
    sides = blocks.drop_duplicates("block").set_index("block")["resolution"]
    panel.set_xticks(numbers, [f"{int(block)}\n{int(sides[block])} px" for block in numbers])
    panel.set(xlabel="decoder block, and the resolution of its output", ylabel="AbsRel  (lower is better)")
    panel.legend(**style.floor_last(panel), ncols=len(levels) + 1, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.2, handletextpad=0.5)
    return figure


if job := globals().get("snakemake"):  # set by the rule's `script:`
    style.save(draw(pd.read_csv(job.input.table)), **job.output)
