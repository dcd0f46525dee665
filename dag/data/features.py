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
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        index = self.path.with_suffix(".json")
        if not self.path.is_file() or not index.is_file():
            raise FileNotFoundError(f"{self.path}: no feature file with its index {index.name}")
        meta = json.loads(index.read_text())
        self.shapes = {int(block): tuple(shape) for block, shape in meta["shapes"].items()}
        self.image, self.t = np.array(meta["image"]), np.array(meta["t"])
        try:
            self.rows = np.load(self.path, mmap_mode="r")
        except ValueError as error:
            raise ValueError(f"{self.path}: not a whole feature file ({error})") from None
        expected = (len(self.t), sum(math.prod(s) for s in self.shapes.values()))
        if self.rows.shape != expected:
            raise ValueError(f"{self.path}: holds {self.rows.shape} numbers, its index says {expected}")

    @property
    def channels(self) -> dict[int, int]:
        return {block: shape[0] for block, shape in self.shapes.items()}

    def read(self, rows: np.ndarray, blocks: Iterable[int]) -> dict[int, Tensor]:
        """{block: (len(rows), c, h, w)} float32 of some rows."""
        order, back = np.unique(rows, return_inverse=True)
        values = self.rows[order]
        wanted, features, start = set(blocks), {}, 0
        for block, shape in self.shapes.items():
            end = start + math.prod(shape)
            if block in wanted:
                features[block] = torch.from_numpy(values[:, start:end][back].astype(np.float32)).reshape(-1, *shape)
            start = end
        return features


def write_features(path: str | Path, shapes: dict[int, tuple], image: np.ndarray, t: np.ndarray, batches: Iterable[dict[int, Tensor]]) -> None:
    """Write a feature file from batches that yield consecutive rows. Raises ValueError naming the row where a feature is not finite in float16."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, index = path.with_suffix(".part.npy"), path.with_suffix(".json")
    index.unlink(missing_ok=True)
    total = sum(math.prod(s) for s in shapes.values())
    rows = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float16, shape=(len(t), total))
    start = 0
    for features in batches:
        block_rows = torch.cat([features[block].flatten(1) for block in shapes], 1).to(torch.float16)
        bad = ~block_rows.isfinite().all(1)
        if bad.any():
            row = start + int(bad.nonzero()[0])
            raise ValueError(f"{path}: the features of image {image[row]} at t = {t[row]} are not finite in float16; check the U-Net's weights")
        rows[start : start + len(block_rows)] = block_rows.numpy()
        start += len(block_rows)
    rows.flush()
    del rows
    os.replace(aside, path)
    index.write_text(json.dumps({"shapes": shapes, "image": image.tolist(), "t": t.tolist()}))
