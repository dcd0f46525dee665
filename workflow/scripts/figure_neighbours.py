"""Samples above the training pictures nearest to them: how far a diffusion model trained on few pictures repeats them."""

import numpy as np
import style
from matplotlib.figure import Figure
from table_memorisation import load, nearest, standardised

COLUMNS, NEIGHBOURS = 10, 3


def draw(bands: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Figure:
    """bands: by name, pictures (k, s, s, 3), their nearest training pictures (k, n, s, s, 3) and the distances (k, n)."""
    ranks = next(iter(bands.values()))[1].shape[1]
    rows = 1 + ranks
    gaps = {rows * i: 0.3 for i in range(1, len(bands))}
    figure, axes = style.tiles(rows * len(bands), COLUMNS, gaps=gaps, margins=(1.3, 0.1, 0.1, 0.1), pad=0.05)
    for band, (name, (pictures, neighbours, distances)) in enumerate(bands.items()):
        first = rows * band
        for panel in axes[first : first + rows, len(pictures) :].flat:
            panel.set_visible(False)
        for column, picture in enumerate(pictures):
            style.show(axes[first, column], picture)
            for rank in range(ranks):
                panel = axes[first + 1 + rank, column]
                style.show(panel, neighbours[column, rank])
                panel.text(0.04, 0.04, f"{distances[column, rank]:.2f}", transform=panel.transAxes, fontsize=6, color="white", backgroundcolor="#00000080")
        for row, label in enumerate(("picture", *(f"nearest {i + 1}" for i in range(ranks)))):
            style.label_row(axes, first + row, label)
        style.label_group(axes, first, first + rows - 1, name, 1.15)
    return figure


def closest(pictures: np.ndarray, features: np.ndarray, training: np.ndarray, training_features: np.ndarray):
    """The COLUMNS pictures that lie nearest to a training picture, the nearest first, with their neighbours and distances."""
    trained, own = standardised(training_features, features)
    ranked = [nearest(own, trained, rank + 1) for rank in range(min(NEIGHBOURS, len(trained)))]
    chosen = np.argsort(ranked[0][0], kind="stable")[:COLUMNS]
    return pictures[chosen], np.stack([training[number[chosen]] for _, number in ranked], 1), np.stack([far[chosen] for far, _ in ranked], 1)


def _images(path: str) -> np.ndarray:
    with np.load(path) as arrays:
        return arrays["images"]


if job := globals().get("snakemake"):  # set by the rule's `script:`
    training_features, sets = load(job.input.reference, job.input.real, dict(zip(job.params.runs, job.input.runs, strict=True)))
    pictures = [_images(path) for path in (job.input.real_images, *job.input.run_images)]
    training = _images(job.input.training_images)
    bands = {name: closest(images, sets[name], training, training_features) for name, images in zip(sets, pictures, strict=True)}
    style.save(draw(bands), **job.output)
