"""Sample grids: real images above those of each run, the same seed in the same place of every grid."""

import numpy as np
import style
from matplotlib.figure import Figure

from dag.stages.arrays import picked, rows_of

ROWS, COLUMNS = 2, 10


def draw(grids: dict[str, np.ndarray]) -> Figure:
    """grids: by name, images uint8 (at most ROWS * COLUMNS, s, s, 3)."""
    gaps = {ROWS * i: 0.12 for i in range(1, len(grids))}
    figure, axes = style.tiles(ROWS * len(grids), COLUMNS, gaps=gaps, margins=(0.4, 0.1, 0.1, 0.1))
    for band, (name, images) in enumerate(grids.items()):
        first = ROWS * band
        for panel in axes[first : first + ROWS].flat[len(images) :]:
            panel.set_visible(False)
        for panel, image in zip(axes[first : first + ROWS].flat, images, strict=False):
            style.show(panel, image)
        style.label_group(axes, first, first + ROWS - 1, name, 0.15)
    return figure


def load(real: str, runs: dict[str, str]) -> dict[str, np.ndarray]:
    """The first real images and, of every run, the images of the first seeds that all runs share."""
    grids = {"real": next(rows_of(real, "images", ROWS * COLUMNS))}
    seeds = {}
    for name, path in runs.items():
        with np.load(path) as data:
            seeds[name] = {seed: row for row, seed in enumerate(data["seeds"].tolist())}
    first, *others = seeds.values()
    shared = [seed for seed in first if all(seed in other for other in others)][: ROWS * COLUMNS]
    return grids | {name: picked(runs[name], "images", [own[seed] for seed in shared]) for name, own in seeds.items()}


if job := globals().get("snakemake"):  # set by the rule's `script:`
    style.save(draw(load(job.input.real, dict(zip(job.params.runs, job.input.samples, strict=True)))), **job.output)
