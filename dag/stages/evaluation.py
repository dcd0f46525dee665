"""Stages describe (judge and describe pictures), measure (distances between sets of them) and scale (the sweep's optimum)."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd

from dag.stages.artefacts import write_csv, write_provenance, writing
from dag.stages.data import read
from dag.stages.study import Study


def load_judge(path: Path):
    """The depth judge, frozen. Raises ValueError naming a file that holds something else."""
    from dag.estimators import DepthUNet
    from dag.weights import check_state, load_module_file

    state, config = load_module_file(path)
    if set(config) != {"architecture"}:
        raise ValueError(f"{path}: no depth judge; the stage `judge` writes it")
    network = DepthUNet(config["architecture"])
    check_state(network, state, path)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def describe(study: Study, *, pictures: Path, unet: Path, heads: Path, judge: Path, out: Path) -> None:
    """Everything later stages ask of a set of pictures: depth by the judge, depth by the strong head, features of both.

    pictures: samples of a run or drawn scenes. Depths are metres, features those of the config's extractor.
    """
    import torch

    from dag.data.images import to_tensor
    from dag.estimators import estimate
    from dag.metrics.extractors import depth_pictures, load_extractor
    from dag.stages.models import coding
    from dag.stages.sampling import load_heads, predictor, read_depth

    started = time.time()
    arrays = read(pictures, "images")
    images, seeds = arrays["images"], arrays["seeds" if "seeds" in arrays else "ids"]
    judged = estimate(load_judge(judge), images, coding(study))
    plain, diffusion, _ = predictor(unet)
    strong, size = load_heads(heads)["strong"], study["sampling"]["batch_size"]
    parts = [slice(i, i + size) for i in range(0, len(images), size)]
    coded = torch.cat([read_depth(to_tensor(images[p]), seeds[p].tolist(), plain, diffusion, strong, study["sampling"]["read_t"]) for p in parts])
    section = study["evaluation"]
    extractor = load_extractor(section["extractor"], dims=section["dims"], resolution=section["resolution"])
    pictured = depth_pictures(judged, study["depth"]["near"], study["depth"]["far"])
    with writing(out) as aside:
        np.savez(
            aside,
            seeds=seeds,
            judged=judged,
            strong=coding(study).decode(coded)[:, 0].numpy(),
            image_features=extractor(images),
            depth_features=extractor(pictured),
        )
    write_provenance(out, study, started, extractor=extractor.label, pictures=str(pictures))


def measure(study: Study, *, runs: list[str], judged: list[Path], reference: Path, out: Path, real: Path | None = None, earlier: Path | None = None) -> None:
    """FID and dFID of runs with intervals, each run beside the unguided one of its kind.

    judged: one file per run, in the order of runs. real: held-out real pictures, the floor. earlier: distances already
    measured, which the table is to hold too.
    """
    from dag.metrics.distances import moments, paired_bootstrap

    started = time.time()
    files = dict(zip(runs, map(read, judged), strict=True))
    if real is not None:
        files["real"] = read(real)
    truth, section, rows = read(reference), study["evaluation"], []
    for metric, key in (("dfid", "depth_features"), ("fid", "image_features")):
        reference_moments = moments(truth[key])
        for name, arrays in files.items():
            baseline = study.baseline_of(name) if name != "real" else None
            other = files[baseline][key] if baseline else None
            values = paired_bootstrap(reference_moments, arrays[key], other, resamples=section["resamples"])
            label = f"{section['extractor']}-{section['dims']}@{section['resolution']}"
            facts = {"run": name, "metric": metric, "extractor": label, "dims": section["dims"], "n": len(arrays[key]), "baseline": baseline or ""}
            rows.append({**facts, **{k: getattr(values, k) for k in ("value", "low", "high", "diff", "diff_low", "diff_high", "p")}})
    table = pd.DataFrame(rows)
    if earlier is not None:
        table = pd.concat([table, pd.read_csv(earlier, keep_default_na=False, na_values=[""])], ignore_index=True)
    write_csv(table, out)
    write_provenance(out, study, started, resamples=section["resamples"])


def scale(study: Study, *, distances: Path, out: Path) -> None:
    """The best weights of the sweep, by dFID: for consistency alone, the prior alone, and both together."""
    table = pd.read_csv(distances)
    dfid = table[table.metric == "dfid"].set_index("run")["value"]
    sweep = study.runs.loc[[r for r in dfid.index if r in study.runs.index]]
    best = {}
    for kind, rows in (
        ("dcg", sweep[(sweep.w_dc != 0) & (sweep.w_dp == 0)]),
        ("dpg", sweep[(sweep.w_dc == 0) & (sweep.w_dp != 0)]),
        ("dcg+dpg", sweep[(sweep.w_dc != 0) & (sweep.w_dp != 0)]),
    ):
        if len(rows):
            name = dfid[rows.index].idxmin()
            best[kind] = {"w_dc": float(rows.w_dc[name]), "w_dp": float(rows.w_dp[name]), "run": name}
    with writing(out) as aside:
        aside.write_text(json.dumps(best, indent=1) + "\n")


def runs(study: Study, *, provenance: list[Path], out: Path) -> None:
    """The run sheet as it was run: weights resolved, seconds and U-Net evaluations per sample added."""
    records = [json.loads(Path(p).read_text()) for p in provenance]
    facts = ("seconds_per_sample", "unet_evaluations", "unet_gradients")
    write_csv(pd.DataFrame([{**r["run"], **{k: r[k] for k in facts}} for r in records]), out)
