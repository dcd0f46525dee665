"""Decoder features on disk: one memory-mapped float16 file, a row per (image, noise level), read in any order."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class FeatureFile:
    """Features of n rows at native resolution. shapes: {block: (c, h, w)}; image and t: (n,) index of the image and timestep of each row.

    The rows are `<name>.npy` (float16, n x total); what they are is `<name>.json`, written last: without it a file does not count.
    Raises FileNotFoundError where one of the two is missing, ValueError where one is torn or they do not fit each other.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        index = self.path.with_suffix(".json")
        if not self.path.is_file() or not index.is_file():
            raise FileNotFoundError(f"{self.path}: no feature file with its index {index.name}")
        try:
            meta = json.loads(index.read_text())
            self.shapes = {int(block): tuple(shape) for block, shape in meta["shapes"].items()}
            self.image, self.t = np.array(meta["image"], dtype=np.int64), np.array(meta["t"], dtype=np.int64)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not the index of a feature file ({type(error).__name__}: {error})") from None
        try:
            self.rows = np.load(self.path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{self.path}: not a whole feature file ({error})") from None
        expected = (len(self.t), sum(math.prod(s) for s in self.shapes.values()))
        if self.rows.shape != expected or len(self.image) != len(self.t):
            raise ValueError(f"{self.path}: holds {self.rows.shape} numbers, its index says {expected} for {len(self.image)} images")

    @property
    def channels(self) -> dict[int, int]:
        return {block: shape[0] for block, shape in self.shapes.items()}

    def read(self, rows: np.ndarray, blocks: Iterable[int]) -> dict[int, Tensor]:
        """{block: (len(rows), c, h, w)} float32 of some rows, in their order.

        Raises ValueError on a block that is not stored, and where a feature is not finite, naming its image and t.
        """
        wanted = set(blocks)
        if missing := sorted(wanted - self.shapes.keys()):
            raise ValueError(f"{self.path}: holds no features of blocks {missing}; there are {sorted(self.shapes)}")
        # The file is read in ascending order, each row once, and only the columns of wanted blocks.
        order, back = np.unique(rows, return_inverse=True)
        features, start = {}, 0
        for block, shape in self.shapes.items():
            end = start + math.prod(shape)
            if block in wanted:
                stored = torch.from_numpy(self.rows[order, start:end]).float()
                _refuse_not_finite(stored, self.path, self.image[order], self.t[order], "; `dag features` makes them anew")
                features[block] = stored[back].reshape(-1, *shape)
            start = end
        return features


def write_features(path: str | Path, shapes: dict[int, tuple], image: np.ndarray, t: np.ndarray, batches: Iterable[dict[int, Tensor]]) -> None:
    """Write a feature file from batches that yield consecutive rows.

    Raises ValueError, and leaves no file, where a feature is not finite in float16 (naming its image and t) and where the batches
    hold more or fewer rows than image and t (n,) name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, index = path.with_suffix(".part.npy"), path.with_suffix(".json")
    index.unlink(missing_ok=True)
    try:
        _write_rows(aside, path, shapes, image, t, batches)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    aside = path.with_suffix(".part.json")
    aside.write_text(json.dumps({"shapes": shapes, "image": image.tolist(), "t": t.tolist()}))
    os.replace(aside, index)


def _write_rows(aside: Path, path: Path, shapes: dict[int, tuple], image: np.ndarray, t: np.ndarray, batches: Iterable[dict[int, Tensor]]) -> None:
    total = sum(math.prod(s) for s in shapes.values())
    rows = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float16, shape=(len(t), total))
    start = 0
    for features in batches:
        block_rows = torch.cat([features[block].flatten(1) for block in shapes], 1).to(torch.float16)
        end = start + len(block_rows)
        if end > len(t):
            raise ValueError(f"{path}: at least {end} rows of features arrived, expected {len(t)}")
        _refuse_not_finite(block_rows, path, image[start:end], t[start:end], " in float16; check the U-Net's weights")
        rows[start:end] = block_rows.cpu().numpy()
        start = end
    if start < len(t):
        raise ValueError(f"{path}: {start} rows of features arrived, expected {len(t)}")
    rows.flush()


def _refuse_not_finite(rows: Tensor, path: Path, image: np.ndarray, t: np.ndarray, advice: str) -> None:
    """Raises ValueError that names the first of some float16 rows (n, c), of image and t (n,), with a feature that is not finite."""
    # Finite float16 numbers have a finite sum in float32, and a sum is several times faster than looking at each of them.
    if (bad := ~rows.float().sum(1).isfinite()).any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"{path}: the features of image {image[row]} at t = {t[row]} are not finite{advice}")
