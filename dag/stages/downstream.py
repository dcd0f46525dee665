"""Stage downstream: a depth network trained on reference or generated pairs, tested on held-out scenes (Table 4)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dag.data.images import to_tensor
from dag.data.squares import scaled, scaled_depth
from dag.estimators import estimate, estimate_whole
from dag.metrics.depth_errors import ALIGNMENTS as ALL_ALIGNMENTS
from dag.metrics.depth_errors import DepthProtocol
from dag.stages.artefacts import write_csv, write_provenance
from dag.stages.data import pictures as pictures_of
from dag.stages.data import read
from dag.stages.models import coding, finished, train_depth
from dag.stages.study import Study
from dag.training import Recipe

ALIGNMENTS = ("none", "median", "scale_shift")
_CHUNK = 16  # whole test pictures in memory together


def downstream(study: Study, *, source: str, out: Path, test: Path | None = None, pictures: Path | None = None, judged: Path | None = None) -> None:
    """Train the network on one source's pairs with several seeds and write its errors on every test image.

    Of a run's pictures it takes no more than `data.downstream` has. source "constant" trains nothing: mean depth maps are the prediction;
    "reference_whole" takes whole pictures from the dataset. judged: where the labels of generated pictures come from; others carry their own.
    With downstream.whole what is measured, and the pictures of "constant", are read from the dataset at their own size instead of from test and pictures.
    """
    started = time.time()
    section, code = study["downstream"], coding(study)
    if source not in (known := study.sources):
        raise ValueError(f"source is {source!r}, expected one of {', '.join(known)}")
    whole = section.get("whole", False)
    if test is None and not whole:
        raise ValueError("test is not given, expected the pictures that are measured on")
    most, kind = study.uses["downstream"].count, study.labels_of(source)
    if source == "reference_whole":
        images, labels = _whole_pairs(study)
    elif pictures is not None:
        images = read(pictures, "images", only=True)["images"][:most].copy()
        labels = (read(judged, kind, only=True)[kind] if judged else read(pictures, "depth", only=True)["depth"])[:most].copy()
    elif not (whole and source == "constant"):
        raise ValueError(f"pictures is not given, expected the pictures of {source}")
    if source == "constant":
        rows = _constant_whole(study) if whole else _constant(study, labels, test)
    else:
        pairs = to_tensor(images), code.encode(torch.from_numpy(labels))[:, None]
        networks = [_train(study, source, *pairs, seed, out) for seed in range(section["seeds"])]
        if whole:
            size = images.shape[1:3] if source == "reference_whole" else images.shape[1]
            errors = _whole(study, [partial(estimate_whole, network, coding=code, size=size) for network in networks], ALL_ALIGNMENTS)
        else:
            errors = [_squares(study, partial(estimate, network, coding=code), test) for network in networks]
        rows = [{"source": source, "seed": seed, "n_train": len(images), **record} for seed, records in enumerate(errors) for record in records]
    columns = ["source", "seed", "image", "alignment", "n_train"]
    frame = pd.DataFrame(rows)
    write_csv(frame[columns + [c for c in frame if c not in columns]], out)
    labelled = kind if judged else "the pictures' own"
    write_provenance(out, study, started, source=source, labels=labelled, protocol=study.downstream_protocol())
    for seed in range(section["seeds"]):
        finished(_of_seed(out, seed))


def _protocol(study: Study, alignment: str) -> DepthProtocol:
    return DepthProtocol(alignment=alignment, max_depth=study["depth"]["far"], crop=study["downstream"].get("crop"))


def _squares(study: Study, predict: Callable[[np.ndarray], np.ndarray], test: Path) -> Iterator[dict]:
    """Errors on the squares of a test file."""
    truth = read(test, "images", "depth", "ids")
    estimates = predict(truth["images"])
    for alignment in ALIGNMENTS:
        records = _protocol(study, alignment).evaluate(estimates, truth["depth"], truth.get("valid"))
        yield from ({**record, "image": int(image)} for image, record in zip(truth["ids"], records, strict=True))


def _same(prediction: np.ndarray, images: np.ndarray) -> np.ndarray:
    """A prediction (h, w) that looks at no picture, for each of some images."""
    return np.broadcast_to(prediction, (len(images), *prediction.shape))


def _constant(study: Study, labels: np.ndarray, test: Path) -> list[dict]:
    errors = _squares(study, partial(_same, coding(study).mean(labels)), test)
    return [{"source": "constant", "seed": 0, "n_train": len(labels), **record} for record in errors]


def _whole(study: Study, predictors: Sequence[Callable[[np.ndarray], np.ndarray]], alignments: tuple[str, ...]) -> list[list[dict]]:
    """Each predictor's errors on the dataset's test pictures at their own size; it maps images (n, h, w, 3), without what `part` leaves out, to metres."""
    (source, index), errors = pictures_of(study, "test"), [[] for _ in predictors]
    for chunk in (index[i : i + _CHUNK].tolist() for i in range(0, len(index), _CHUNK)):
        images, truth = np.stack([source.image(i)[source.part] for i in chunk]), np.stack([source.depth(i) for i in chunk])
        maps, valid = np.ones_like(truth), np.zeros(truth.shape, bool)  # outside its part a dataset's pictures show nothing
        valid[:, *source.part] = truth[:, *source.part] > 0
        for predict, records in zip(predictors, errors, strict=True):
            maps[:, *source.part] = predict(images)
            for alignment in alignments:
                found = _protocol(study, alignment).evaluate(maps, truth, valid)
                records += [{**record, "image": source.id(i)} for i, record in zip(chunk, found, strict=True)]
    return errors


def _constant_whole(study: Study) -> list[dict]:
    """Three predictions that look at no picture: the mean training depth map, as coded, the mean disparity map, and one flat depth."""
    source, index = pictures_of(study, "downstream")
    code, coded, disparity = coding(study), 0.0, 0.0
    for i in index.tolist():
        depth = source.depth(i)[source.part].astype(np.float64)
        coded, disparity = coded + code.encode(torch.from_numpy(depth)) / len(index), disparity + 1 / depth / len(index)
    rows = []
    for name, prediction, alignments, n in (
        ("constant", code.decode(coded).numpy(), ALIGNMENTS, len(index)),
        ("constant_disparity", 1 / disparity, ("scale_shift_disparity",), len(index)),
        ("flat", np.ones_like(disparity), ("median",), 0),  # aligned by its median, it is the image's own median everywhere
    ):
        (errors,) = _whole(study, [partial(_same, prediction)], alignments)
        rows += [{"source": name, "seed": 0, "n_train": n, **record} for record in errors]
    return rows


def _whole_pairs(study: Study) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, h, w, 3) uint8 and depths (n, h, w) in metres of the dataset's pictures, whole, at `downstream.reference_whole.shape`."""
    source, index = pictures_of(study, "downstream")
    size, images, depths = tuple(study["downstream"]["reference_whole"]["shape"]), [], []
    for i in index.tolist():
        image, depth = source.image(i)[source.part], source.depth(i)[source.part]
        box = (0, 0, image.shape[1], image.shape[0])
        images.append(scaled(image, size, box))
        depths.append(scaled_depth(depth, size, box)[0])
    return np.stack(images), np.stack(depths)


def _of_seed(out: Path, seed: int) -> Path:
    return out.with_stem(f"{out.stem}-{seed}")


def _train(study: Study, source: str, images: torch.Tensor, depth: torch.Tensor, seed: int, out: Path) -> torch.nn.Module:
    section = study["downstream"]
    made = section[source] if source == "reference_whole" else section
    recipe, turn = Recipe(**{**made["training"], "seed": seed}), (seed, section["seeds"])
    return train_depth(images, depth, made["architecture"], recipe, _of_seed(out, seed), augment=section.get("augment", False), turn=turn)
