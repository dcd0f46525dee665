"""Stage label: depth for pictures that have none, by a pretrained depth network (the config's `estimator`)."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dag.accelerator import here
from dag.estimators import estimate, load_pretrained
from dag.stages.artefacts import write_provenance, writing
from dag.stages.data import read
from dag.stages.models import coding
from dag.stages.study import Study

_PART = 1024  # pictures whose depth a killed job may have to estimate again


def label(study: Study, *, pictures: Path, out: Path) -> None:
    """A data file of pictures with depth in metres beside them; pictures that have depth keep theirs.

    Each part of the work is stored under the hash of what it follows from, beside `out`, until the whole is written: a job that was
    killed goes on with the next part.
    """
    started, parts = time.time(), out.with_suffix(".parts")
    arrays = read(pictures, "images", "ids")
    origin = json.loads(pictures.with_suffix(".json").read_text())
    if "depth" in arrays:
        with writing(out) as aside:
            np.savez(aside, **arrays)
        write_provenance(out, study, started, estimator=None, pictures=origin)
        return
    section, code, depths = study["estimator"], coding(study), []
    model, facts = load_pretrained(section["model"], code, section.get("output", "inverse"), section.get("bounds"))
    model.to(here())
    shared = json.dumps([section, study["depth"], facts["sha256"]], sort_keys=True).encode()
    for start in tqdm(range(0, len(arrays["images"]), _PART), desc=out.stem, unit="part", disable=not sys.stderr.isatty()):
        part = arrays["images"][start : start + _PART]
        file = parts / f"{hashlib.sha256(shared + part.tobytes()).hexdigest()[:32]}.npy"
        if not file.exists():
            with writing(file) as aside:
                np.save(aside, estimate(model, part, code, section.get("batch_size", 8)))
        depths.append(np.load(file))
    with writing(out) as aside:
        np.savez(aside, **arrays, depth=np.concatenate(depths))
    write_provenance(out, study, started, estimator=facts, pictures=origin)
    shutil.rmtree(parts, ignore_errors=True)
