"""Fig. 7: samples of the same seeds, unguided above guided."""

import numpy as np
import style
from matplotlib.figure import Figure

from dag.stages.arrays import picked

SEEDS = 12  # two bands of six
_BAND = 6


def draw(unguided: np.ndarray, guided: np.ndarray) -> Figure:
    """Images uint8 (k, s, s, 3) of the same k seeds, in bands of six pairs."""
    bands = -(-len(unguided) // _BAND)
    figure, axes = style.tiles(2 * bands, min(_BAND, len(unguided)), gaps={2 * band: 0.16 for band in range(1, bands)}, margins=(0.9, 0.1, 0.1, 0.1))
    for panel in axes.flat:
        panel.set_visible(False)
    for at, pair in enumerate(zip(unguided, guided, strict=True)):
        for row, image in enumerate(pair, 2 * (at // _BAND)):
            axes[row, at % _BAND].set_visible(True)
            style.show(axes[row, at % _BAND], image)
    for band in range(bands):
        for row, label in enumerate(("unguided", "guided"), 2 * band):
            style.label_row(axes, row, label)
    return figure


def load(unguided: str, guided: str) -> tuple[np.ndarray, np.ndarray]:
    """Images of the first seeds that both runs share."""
    with np.load(unguided) as one, np.load(guided) as other:
        seeds = [run["seeds"].tolist() for run in (one, other)]
    others = set(seeds[1])
    shared = [seed for seed in seeds[0] if seed in others][:SEEDS]
    return tuple(picked(path, "images", [own.index(seed) for seed in shared]) for path, own in zip((unguided, guided), seeds, strict=True))


if job := globals().get("snakemake"):  # set by the rule's `script:`
    style.save(draw(*load(job.input.unguided, job.input.guided)), **job.output)
