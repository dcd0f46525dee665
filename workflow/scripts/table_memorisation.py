"""How far the diffusion model repeats its training pictures: distances to the nearest of them, of samples and of pictures it never saw."""

import intervals
import numpy as np
import pandas as pd
from scipy.spatial import cKDTree
from table_format import Block, Column, Table


def nearest(features: np.ndarray, training: np.ndarray, neighbours: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Distance (n,) and number (n,) of the nearest row of training (m, d) to each row of features (n, d); the second nearest with neighbours=2."""
    distances, numbers = cKDTree(training).query(features, k=[neighbours])
    return distances[:, -1], numbers[:, -1]


def standardised(training: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """All with each feature shifted and scaled by the training pictures' mean and standard deviation."""
    mean, deviation = training.mean(0), np.maximum(training.std(0), 1e-6)
    return [(features - mean) / deviation for features in (training, *others)]


def distances(training: np.ndarray, sets: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Distances to the nearest training picture: of the training pictures to each other, then of every set."""
    training, *features = standardised(training, *sets.values())
    return {"training, to another": nearest(training, training, 2)[0]} | {name: nearest(rows, training)[0] for name, rows in zip(sets, features, strict=True)}


def build(training: np.ndarray, sets: dict[str, np.ndarray]) -> Table:
    """training and each of sets: features (n, d); the set "held out" holds pictures that the model has not seen."""
    measured = distances(training, sets)
    close = float(np.quantile(measured["held out"], 0.05))
    rows = []
    for name, values in measured.items():
        mean, share = intervals.over_images(values), intervals.over_images(values < close)
        rows.append([name, len(values), *mean, float(np.median(values)), float(values.min()), *share])
    columns = ["pictures", "n", "mean", "mean_low", "mean_high", "median", "least", "close", "close_low", "close_high"]
    frame = pd.DataFrame(rows, columns=columns)
    shown = [Column("pictures", "pictures"), Column("n", "n"), Column("mean distance", "mean", interval=True, digits=3), Column("median", "median", digits=3)]
    shown += [Column("least", "least", digits=3), Column("share closer than 5 % of the held-out ones", "close", interval=True, digits=3)]
    return Table(
        frame,
        "Distance to the nearest training picture",
        "Euclidean distance of pooled image features, each scaled by its spread over the training pictures [95 % bootstrap intervals over pictures]. "
        "A model that repeats its training pictures has samples nearer to them than held-out pictures are; 0.05 is the share of a model as new as those.",
        [Block("", frame, shown)],
    )


def load(reference: str, held_out: str, runs: dict[str, str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Image features of the training pictures, and of the held-out pictures and every run by name."""
    features = {}
    for name, path in {"reference": reference, "held out": held_out, **runs}.items():
        with np.load(path) as arrays:
            features[name] = arrays["image_features"].astype(np.float64)
    return features.pop("reference"), features


if job := globals().get("snakemake"):  # set by the rule's `script:`
    build(*load(job.input.reference, job.input.real, dict(zip(job.params.runs, job.input.runs, strict=True)))).write(**job.output)
