"""Stage data: pictures and depths of one use (labels, prior, judge, ...) as one file."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from dag.data.domain import DOMAINS, Dataset, dataset
from dag.stages.arrays import naming
from dag.stages.artefacts import write_provenance, writing
from dag.stages.study import Study


def prepare(study: Study, *, use: str, out: Path) -> None:
    """The pictures of one use of the study's `data` section as squares: images uint8, ids, depth in metres where there is any.

    `valid` is stored beside depth where some of it is unknown. Pictures that the dataset could not read are listed in the provenance.
    Raises ValueError for depth that seems to be in another unit than metres.
    """
    started = time.time()
    if use not in study["data"]:
        raise ValueError(f"use is {use!r}, expected one of {', '.join(study['data'])}")
    source, index = pictures(study, use)
    squares = source.squares(index, study["domain"]["size"])
    if squares.depth is not None:
        check_unit(study, use, squares.depth if squares.valid is None else squares.depth[squares.valid])
    arrays = {"images": squares.images, "depth": squares.depth, "ids": squares.ids, "valid": squares.valid}
    with writing(out) as aside:
        np.savez(aside, **{name: array for name, array in arrays.items() if array is not None})
    facts = {"first": int(index[0]), "count": len(squares.ids), "split": study.uses[use].split}
    write_provenance(out, study, started, **facts, unreadable=dict(source.unreadable))


def pictures(study: Study, use: str) -> tuple[Dataset, np.ndarray]:
    """The dataset that a use of the study's `data` section takes its pictures from, and their positions in it."""
    source = dataset(study.domain_of(use), study.uses[use].split)
    return source, positions(study, use, len(source))


def positions(study: Study, use: str, available: int) -> np.ndarray:
    """Where the pictures of a use lie in their dataset of so many. Raises ValueError where it has fewer."""
    try:
        index = study.uses[use].index(available)
    except ValueError as error:
        raise ValueError(f"data.{use}: {error}") from None
    mixed = DOMAINS[study["domain"]["name"]].mixed
    return np.random.default_rng(0).permutation(available)[index] if mixed else index


def check_unit(study: Study, use: str, depth: np.ndarray) -> None:
    """Refuse depth whose median, in metres, lies outside the range that the study codes: millimetres, or a wrong domain.depth_unit."""
    middle, near, far = float(np.median(depth)), study["depth"]["near"], study["depth"]["far"]
    if not near <= middle <= far:
        unit = study.domain_of(use).get("depth_unit")
        stated = f"domain.depth_unit is {unit:g} m" if unit else "it should be in metres"
        raise ValueError(f"data.{use}: depth has a median of {middle:.4g} m, expected one within depth.near to depth.far, {near:g} to {far:g} m; {stated}")


def read(path: Path, *needed: str, only: bool = False) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, or only those that are needed. Raises ValueError naming a file that is missing, not whole, or without one of these."""
    with naming(path), np.load(path, allow_pickle=False) as file:
        names = file.files
        arrays = {name: file[name] for name in names if not only or name in needed}
    if missing := sorted(set(needed) - set(names)):
        raise ValueError(f"{path}: has no {', '.join(missing)}; it holds {', '.join(names) or 'nothing'}")
    return arrays
