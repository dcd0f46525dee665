"""Fig. 3: depth read off the U-Net's features while an image is being drawn."""

import numpy as np
import style
from matplotlib.figure import Figure

_LEFT, _RIGHT, _TOP = 0.92, 0.85, 0.44  # inches
_COLUMNS = 6  # steps that fit a page in print; the study's page scrubs through all


def draw(x_t: np.ndarray, pred_xstart: np.ndarray, depth: np.ndarray, t: np.ndarray, names: np.ndarray) -> Figure:
    """names: seeds (k,). x_t, pred_xstart: uint8 (m, k, s, s, 3). depth: strong head's, metres (m, k, s, s). t: (m,) descending. Of many
    steps, some are shown, the first and the last among them."""
    shown = np.linspace(0, len(t) - 1, min(len(t), _COLUMNS)).round().astype(int)
    x_t, pred_xstart, depth, t = x_t[shown], pred_xstart[shown], depth[shown], t[shown]
    steps, seeds = depth.shape[:2]
    bands = [range(3 * seed, 3 * seed + 3) for seed in range(seeds)]
    figure, axes = style.tiles(3 * seeds, steps, gaps={band[0]: 0.12 for band in bands[1:]}, margins=(_LEFT, _RIGHT, _TOP, 0.1))
    limits = style.depth_limits(depth)
    for seed, band in enumerate(bands):
        for column in range(steps):
            style.show(axes[band[0], column], x_t[column, seed])
            style.show(axes[band[1], column], pred_xstart[column, seed])
            picture = style.show(axes[band[2], column], depth[column, seed], cmap=style.DEPTH_COLOURS, **limits)
        style.label_group(axes, band[0], band[2], f"seed {names[seed]}", 0.64)
        for row, name in zip(band, ("$x_t$", r"$\hat{x}_0$", "depth"), strict=True):
            style.label_row(axes, row, name)
    for column, step in enumerate(t):
        axes[0, column].set_title(f"$t$ = {step}", fontsize=9)
    width, height = figure.get_size_inches()
    figure.text((_LEFT + width - _RIGHT) / 2 / width, 1 - 0.1 / height, "noise  →  image", ha="center", va="center", fontsize=9, color=style.GREY)
    style.depth_bar(figure, picture, style.place(figure, width - 0.75, height - _TOP - 3 * style.TILE - 0.06, 0.12, 3 * style.TILE + 0.06))
    return figure


if job := globals().get("snakemake"):  # set by the rule's `script:`
    with np.load(job.input.trajectory) as data:
        figure = draw(data["x_t"], data["pred_xstart"], data["strong"], data["t"], data["seeds"])
    style.save(figure, **job.output)
