"""Stage downstream: a depth network trained on reference or generated pairs, tested on held-out scenes (Table 4)."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dag.data.images import to_tensor
from dag.estimators import DepthUNet, depth_loss, estimate
from dag.metrics.depth_errors import DepthProtocol
from dag.stages.artefacts import write_csv, write_provenance
from dag.stages.data import read
from dag.stages.models import coding, contents, finished, pick, train
from dag.stages.study import Study
from dag.training import Recipe

ALIGNMENTS = ("none", "median", "scale_shift")


def downstream(study: Study, *, source: str, pictures: Path, test: Path, out: Path, judged: Path | None = None) -> None:
    """Train the network on one source's pairs with several seeds and write its errors on every test image.

    source "constant" trains nothing: the mean depth map of the pictures is the prediction. judged: where the labels of
    generated pictures come from; drawn scenes carry their own.
    """
    started = time.time()
    section, code = study["downstream"], coding(study)
    if source not in (known := ["reference", "constant", *section["sources"]]):
        raise ValueError(f"source is {source!r}, expected one of {', '.join(known)}")
    images = read(pictures, "images")["images"]
    labels = read(judged, section["labels"])[section["labels"]] if judged else read(pictures, "depth")["depth"]
    truth = read(test, "images", "depth", "ids")
    rows = []
    for seed in range(section["seeds"] if source != "constant" else 1):
        if source == "constant":
            estimates = np.broadcast_to(labels.mean(0), truth["depth"].shape)
        else:
            network = _train(study, to_tensor(images), code.encode(torch.from_numpy(labels))[:, None], seed, out)
            estimates = estimate(network, truth["images"], code)
        for alignment in ALIGNMENTS:
            protocol = DepthProtocol(alignment=alignment, max_depth=study["depth"]["far"])
            for image, errors in zip(truth["ids"], protocol.evaluate(estimates, truth["depth"], truth.get("valid")), strict=True):
                rows.append({"source": source, "seed": seed, "image": int(image), "alignment": alignment, "n_train": len(images), **errors})
    write_csv(pd.DataFrame(rows), out)
    write_provenance(out, study, started, source=source, labels=section["labels"] if judged else "exact")
    for seed in range(section["seeds"]):
        finished(_of_seed(out, seed))


def _of_seed(out: Path, seed: int) -> Path:
    return out.with_stem(f"{out.stem}-{seed}")


def _train(study: Study, images: torch.Tensor, depth: torch.Tensor, seed: int, out: Path) -> torch.nn.Module:
    recipe = Recipe(**{**study["downstream"]["training"], "seed": seed})
    torch.manual_seed(seed)
    network = DepthUNet({"sample_size": images.shape[-1], **study["downstream"]["architecture"]})

    def batch(step: int) -> tuple:
        rows = pick(step * study["downstream"]["seeds"] + seed, len(images), recipe.batch_size)
        return images[rows], depth[rows]

    return train(network, depth_loss, batch, recipe, _of_seed(out, seed), contents(images, depth))
