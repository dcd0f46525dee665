"""Fig. 4b: how many labelled images the depth heads need."""

import numpy as np
import pandas as pd
import style
from matplotlib.figure import Figure

_HEADS = {"strong": (style.BLUE, "o"), "weak": (style.ORANGE, "s")}


def draw(table: pd.DataFrame) -> Figure:
    """table: tables/fig4b_labels.csv."""
    levels, counts = sorted(table["t"].unique()), sorted(table["labels"].unique())
    figure, axes = style.chart(len(levels), 2.15, 2.9, sharey=True)
    for panel, t in zip(axes[0], levels, strict=True):
        for i, (head, (colour, marker)) in enumerate(_HEADS.items()):
            rows = table[(table["head"] == head) & (table["t"] == t)].sort_values("labels")
            error = np.abs(rows[["abs_rel_low", "abs_rel_high"]].to_numpy().T - rows["abs_rel"].to_numpy())
            blocks = str(rows["blocks"].iloc[0]).split("+")
            panel.errorbar(
                rows["labels"] * 1.06 ** (2 * i - 1),
                rows["abs_rel"],
                error,
                color=colour,
                marker=marker,
                label=f"{head} (block{'s' * (len(blocks) > 1)} {', '.join(blocks)})",
            )
        floor = table[(table["head"] == "constant") & (table["t"] == t)].sort_values("labels")
        panel.plot(floor["labels"], floor["abs_rel"], color=style.GREY, linestyle="--", linewidth=1.2, label=style.FLOOR, zorder=1)
        panel.set_xscale("log")
        panel.set_xticks(counts, [f"{count:,}" for count in counts])
        panel.minorticks_off()
        panel.set_title(f"$t$ = {t}", fontsize=9)
    axes[0, 0].set_ylabel("AbsRel  (lower is better)")
    figure.supxlabel("labelled images", fontsize=9)
    figure.legend(**style.floor_last(axes[0, 0]), loc="outside upper center", ncols=3)
    return figure


if job := globals().get("snakemake"):  # set by the rule's `script:`
    style.save(draw(pd.read_csv(job.input.table)), **job.output)
