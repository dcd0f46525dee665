"""Stage data: pictures and depths of one use (labels, prior, judge, ...) as one file."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from dag.stages.artefacts import write_provenance, writing
from dag.stages.study import Study


def prepare(study: Study, *, use: str, out: Path) -> None:
    """Draw the scenes of one use of the study's `data` section: images uint8, depth in metres, ids."""
    started = time.time()
    first, count = study["data"][use]
    images, depth = draw(study, np.arange(first, first + count))
    with writing(out) as aside:
        np.savez(aside, images=images, depth=depth, ids=np.arange(first, first + count))
    write_provenance(out, study, started, first=first, count=count)


def draw(study: Study, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, s, s, 3) uint8 and depths (n, s, s) float32 in metres of the study's domain."""
    from dag.data.rooms import render

    images, depth, _ = render(ids, study["domain"]["size"])
    return images, depth


def read(path: Path, *needed: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. Raises ValueError naming a file that is missing, not whole, or without an array that is needed."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; run the stage that makes it first") from None
    except Exception as error:  # zipfile and numpy raise many kinds for a torn file
        raise ValueError(f"{path}: not a whole .npz file ({error})") from None
    if missing := sorted(set(needed) - arrays.keys()):
        raise ValueError(f"{path}: has no {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}")
    return arrays
