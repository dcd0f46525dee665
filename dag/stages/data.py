"""Stage data: pictures and depths of one use (labels, prior, judge, ...) as one file."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from dag.data.domain import DOMAINS, Dataset, dataset
from dag.stages.artefacts import write_provenance, writing
from dag.stages.study import Study


def prepare(study: Study, *, use: str, out: Path) -> None:
    """The pictures of one use of the study's `data` section as squares: images uint8, ids, depth in metres where there is any.

    `valid` is stored beside depth where some of it is unknown. Pictures that the dataset could not read are listed in the provenance.
    """
    started = time.time()
    if use not in study["data"]:
        raise ValueError(f"use is {use!r}, expected one of {', '.join(study['data'])}")
    source, index = pictures(study, use)
    squares = source.squares(index, study["domain"]["size"])
    arrays = {"images": squares.images, "depth": squares.depth, "ids": squares.ids, "valid": squares.valid}
    with writing(out) as aside:
        np.savez(aside, **{name: array for name, array in arrays.items() if array is not None})
    facts = {"first": int(index[0]), "count": len(squares.ids), "split": study.uses[use].split}
    write_provenance(out, study, started, **facts, unreadable=dict(source.unreadable))


def pictures(study: Study, use: str) -> tuple[Dataset, np.ndarray]:
    """The dataset that a use of the study's `data` section takes its pictures from, and their positions in it."""
    wanted = study.uses[use]
    source = dataset(study.domain_of(use), wanted.split)
    try:
        index = wanted.index(len(source))
    except ValueError as error:
        raise ValueError(f"data.{use}: {error}") from None
    mixed = DOMAINS[study["domain"]["name"]].mixed
    return source, np.random.default_rng(0).permutation(len(source))[index] if mixed else index


def read(path: Path, *needed: str, only: bool = False) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, or only those that are needed. Raises ValueError naming a file that is missing, not whole, or without one of these."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            arrays = {name: file[name] for name in names if not only or name in needed}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; run the stage that makes it first") from None
    except Exception as error:  # zipfile and numpy raise many kinds for a torn file
        raise ValueError(f"{path}: not a whole .npz file ({error})") from None
    if missing := sorted(set(needed) - set(names)):
        raise ValueError(f"{path}: has no {', '.join(missing)}; it holds {', '.join(names) or 'nothing'}")
    return arrays
