"""Samples of a run in parts: seed ranges drawn by different jobs, batches kept while a job draws, one file of them all. Knows no torch.

Every part, a batch, a shard or a whole run, is an .npz (images, seeds, telemetry) with a .json beside it, whose `recipe` is a hash of all
that its samples depend on. Parts of one recipe can be joined, and a part that is there is never drawn again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
import zipfile
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from dag.stages.arrays import write_header
from dag.stages.artefacts import content_hash, write_provenance, writing
from dag.stages.data import read
from dag.stages.sheet import in_sweep
from dag.stages.study import Study

FACTS = ("seconds_per_sample", "unet_evaluations", "unet_gradients")


def split(first: int, count: int, size: int | None) -> list[tuple[int, int]]:
    """[start, stop) of the parts of `count` seeds from `first`; size None: one part."""
    size = size or count
    return [(start, min(start + size, first + count)) for start in range(first, first + count, size)]


def together(runs: pd.DataFrame, size: int) -> list[list[str]]:
    """The runs that one process draws, at most `size`: in the order of the sheet, those that find the best weights, that wait for these, and others apart."""
    kinds: dict[tuple, list[str]] = {}
    for name, row in runs.iterrows():
        kinds.setdefault((in_sweep(row.tables), "best" in (row.w_dc, row.w_dp)), []).append(name)
    return [names[i : i + size] for names in kinds.values() for i in range(0, len(names), size)]


class Drawn:
    """What is drawn already of the part that becomes `out`: batches in a hidden folder beside it, and an earlier, shorter `out`.

    A batch of `size` seeds is used again only as a whole, with the batch-mates of an undisturbed run: its bits are the same then.
    Batches of another recipe and torn ones are dropped.
    """

    def __init__(self, out: Path, recipe: str, size: int):
        self.out, self.recipe, self.size = Path(out), recipe, size
        self.folder = self.out.parent / f".{self.out.stem}"
        self.parts: dict[Path, range] = {}

    def has_all(self, seeds: range, inputs: list[Path]) -> bool:
        """Whether `out` holds just these seeds, of this recipe and made from these files, whole."""
        try:
            about = json.loads(self.out.with_suffix(".json").read_text())
            same = about["recipe"] == self.recipe and about["seeds"] == [seeds.start, len(seeds)]
            same = same and about["inputs"] == {str(path): content_hash(path) for path in inputs}
            return same and content_hash(self.out) == about["outputs"][str(self.out)]["sha256"]
        except (OSError, ValueError, LookupError):
            return False

    def take_in_earlier(self) -> None:
        """See which batches are there. An earlier `out` moves among them: from now on nothing of it can be lost."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = self.out.with_suffix(".json")
        if self.out.exists() and about.exists():
            os.replace(about, self.folder / "earlier.json")
            os.replace(self.out, self.folder / "earlier.npz")
        for path in sorted(self.folder.glob("*.npz")):
            try:
                if _facts(path)["recipe"] != self.recipe:
                    raise ValueError("drawn by another recipe")
                self.parts[path] = _seed_range(path)
            except (ValueError, LookupError) as error:
                warnings.warn(f"{path}: {error}; drawn again", stacklevel=2)
                path.unlink()

    def find(self, start: int, stop: int) -> tuple[Path, slice] | None:
        """The file that has the batch of the seeds [start, stop), and its rows there."""
        for path, seeds in self.parts.items():
            same_batch = (start - seeds.start) % self.size == 0 and (stop - start == self.size or stop == seeds.stop)
            if seeds.start <= start and stop <= seeds.stop and same_batch:
                return path, slice(start - seeds.start, stop - seeds.start)
        return None

    def add(self, arrays: dict[str, np.ndarray], **facts) -> None:
        """Keep a batch. The .npz comes last: with it the batch is there."""
        seeds = arrays["seeds"]
        path = self.folder / f"{seeds[0]}.npz"
        with writing(path.with_suffix(".json")) as aside:
            aside.write_text(json.dumps({"recipe": self.recipe, **facts}))
        with writing(path) as aside:
            np.savez(aside, **arrays)
        self.parts[path] = range(int(seeds[0]), int(seeds[-1]) + 1)

    def join(self, batches: list[tuple[int, int]]) -> dict:
        """Write `out` from these batches, all of which are there; returns its facts."""
        return _join([self.find(*batch) for batch in batches], self.out)

    def clear(self) -> None:
        """Drop the batches, once `out` and its provenance are written."""
        if self.folder.exists():
            shutil.rmtree(self.folder)


def join(study: Study, *, run: str, parts: list[Path], out: Path) -> None:
    """Put the shards of a run together, in the order of their seeds."""
    started = time.time()
    row = study.run(run)
    ranges = sorted(((_seed_range(path), path) for path in parts), key=lambda item: item[0].start)
    for (seeds, path), (others, other) in pairwise(ranges):
        if others.start < seeds.stop:
            raise ValueError(f"{other}: its seeds {_text(others)} overlap those of {path}, {_text(seeds)}; shards must not share seeds")
    found = [seed for seeds, _ in ranges for seed in seeds]
    if found != list(wanted := range(row["first_seed"], row["first_seed"] + row["n"])):
        raise ValueError(f"{out}: its shards have the seeds {', '.join(_text(seeds) for seeds, _ in ranges)}, expected {_text(wanted)} of run {run!r}")
    about = {path: _facts(path) for _, path in ranges}
    for path in about:
        if about[path]["recipe"] != about[ranges[0][1]]["recipe"]:
            raise ValueError(f"{path}: drawn by another recipe than {ranges[0][1]}; remove it to have it drawn again")
    facts = _join([(path, slice(0, len(seeds))) for seeds, path in ranges], out)
    write_provenance(out, study, started, run={**about[path]["run"], **_span(wanted)}, recipe=about[path]["recipe"], **facts)


def _span(seeds: range) -> dict:
    return {"n": len(seeds), "first_seed": seeds.start}


def _text(seeds: range) -> str:
    return f"{seeds.start} to {seeds.stop - 1}"


def _facts(path: Path) -> dict:
    about = path.with_suffix(".json")
    try:
        facts = json.loads(about.read_text())
    except (OSError, ValueError):
        raise ValueError(f"{about}: missing or not whole; it says what {path.name} was drawn with") from None
    if not {"recipe", *FACTS} <= facts.keys():
        raise ValueError(f"{about}: has no {', '.join(sorted({'recipe', *FACTS} - facts.keys()))}")
    return facts


def _seed_range(path: Path) -> range:
    """Seeds of a part. Reads the whole file, so that a torn or altered one shows now."""
    seeds = read(path, "images", "seeds", "t")["seeds"]
    if not len(seeds) or (np.diff(seeds) != 1).any():
        raise ValueError(f"{path}: its seeds do not count up by one")
    return range(int(seeds[0]), int(seeds[-1]) + 1)


def _join(rows: list[tuple[Path, slice]], out: Path) -> dict:
    """Write rows of parts one after the other, holding the images of one part at a time; returns the facts of the whole."""
    pieces = [(path, [r for _, r in group]) for path, group in groupby(rows, key=lambda item: item[0])]
    pieces = [(path, slice(group[0].start, group[-1].stop)) for path, group in pieces]
    counts = [piece.stop - piece.start for _, piece in pieces]
    facts = [_facts(path) for path, _ in pieces]
    with np.load(pieces[0][0]) as first:
        names = {name: first[name].ndim for name in first.files}

    def column(name: str) -> Iterator[np.ndarray]:
        for path, piece in pieces:
            with np.load(path) as file:
                # Of telemetry, (steps, n), the samples are the columns.
                yield file[name][:, piece] if names[name] == 2 else file[name][piece]

    strength = 0.0
    with writing(out) as aside, zipfile.ZipFile(aside, "w", allowZip64=True) as archive:
        for name, dimensions in names.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                if name == "images":
                    _write_rows(stream, column(name), sum(counts))
                elif name == "t":
                    with np.load(pieces[0][0]) as first:
                        np.lib.format.write_array(stream, first[name])
                else:
                    whole = np.concatenate(list(column(name)), axis=dimensions - 1)
                    np.lib.format.write_array(stream, whole)
                    strength = float(whole.mean()) if name == "shift_over_eps" else strength
    seconds = sum(f["seconds_per_sample"] * count for f, count in zip(facts, counts, strict=True)) / sum(counts)
    return {**{key: facts[0][key] for key in FACTS}, "seconds_per_sample": seconds, "strength": strength}


def _write_rows(stream, parts: Iterator[np.ndarray], count: int) -> None:
    """An array of `count` rows in NumPy's format, part after part."""
    for index, part in enumerate(parts):
        if index == 0:
            write_header(stream, part, count)
        stream.write(np.ascontiguousarray(part).data)
