"""Stages describe (judge and describe pictures), moments (of the reference), measure (distances to it), scale (the sweep's optimum) and geometry."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from dag.stages.arrays import PART, growing, names, rows_of
from dag.stages.artefacts import write_csv, write_provenance, writing
from dag.stages.data import read
from dag.stages.sheet import compared_in
from dag.stages.study import Study


def load_judge(path: Path, coding=None):
    """The depth judge, frozen: images in [-1, 1] to coded depth. coding: the study's, for a pretrained one.

    Raises ValueError naming a file that holds something else, or a pretrained network whose weights are no longer those that the stage `judge` saw.
    """
    from dag.accelerator import here
    from dag.estimators import depth_network, load_pretrained
    from dag.weights import check_state, load_module_file

    state, config = load_module_file(path)
    if set(config) == {"pretrained"}:
        found = config["pretrained"]
        network, facts = load_pretrained(found["model"], coding, found.get("output", "inverse"), found.get("bounds"))
        if facts["sha256"] != found["sha256"]:
            raise ValueError(f"{found['model']}: has other weights than when {path} was made; run the stage `judge` again")
        return network.to(here())
    if set(config) != {"architecture"}:
        raise ValueError(f"{path}: no depth judge; the stage `judge` writes it")
    network = depth_network(config["architecture"], config["architecture"]["sample_size"])
    check_state(network, state, path)
    network.load_state_dict(state)
    return network.to(here()).eval().requires_grad_(False)


def describe(study: Study, *, pictures: Path, unet: Path, heads: Path, judge: Path, out: Path, second_judge: Path | None = None) -> None:
    """Everything later stages ask of a set of pictures: depth by the judge, depth by the strong head, features of both.

    pictures: samples of a run or drawn scenes. Depths are metres, features those of the config's extractor. second_judge: another judge of
    dFID, whose depth is kept as features alone.
    """
    import torch

    from dag.accelerator import here
    from dag.data.images import to_tensor
    from dag.estimators import estimate
    from dag.heads import load_heads
    from dag.metrics.extractors import depth_features, load_extractor
    from dag.stages.models import coding
    from dag.stages.sampling import predictor, read_depth

    started, code, section, size = time.time(), coding(study), study["evaluation"], study["sampling"]["batch_size"]
    key = "seeds" if "seeds" in names(pictures) else "ids"
    seeds = read(pictures, key, only=True)[key]
    judges = {kind: load_judge(path, code) for kind, path in (("depth_features", judge), (SECOND, second_judge)) if path is not None}
    plain, *_ = predictor(study, unet)
    strong = load_heads(heads)["strong"].to(here())
    options = {name: section.get(name) for name in ("dims", "resolution", "weights", "sha256")}
    extractor = load_extractor(section["extractor"], **options, device=here())
    limits, step = (study["depth"]["near"], study["depth"]["far"]), part_size(size)
    with growing(out, len(seeds), seeds=seeds, extractor=extractor.label) as add:
        for start, images in enumerate(rows_of(pictures, "images", step)):
            of = seeds[start * step : (start + 1) * step]
            batches = [slice(i, i + size) for i in range(0, len(images), size)]
            coded = torch.cat([read_depth(to_tensor(images[b]).to(here()), of[b].tolist(), plain, strong, study["sampling"]["read_t"]) for b in batches])
            depths = {kind: estimate(network, images, code) for kind, network in judges.items()}
            depths["strong_features"] = code.decode(coded)[:, 0].cpu().numpy()
            features = {kind: depth_features(extractor, depths[kind], *limits) for kind in FEATURES.values() if kind in depths}
            add(judged=depths["depth_features"], strong=depths["strong_features"], image_features=extractor(images), **features)
    write_provenance(out, study, started, extractor=extractor.label, pictures=str(pictures))


def part_size(batch_size: int) -> int:
    """How many pictures `describe` has in memory at a time: whole batches of every network that looks at them, so that parts change no bit."""
    whole = math.lcm(batch_size, 128)  # of judge and extractor 64, 8 or 128
    return -(-PART // whole) * whole


# What a distance compares: the judge's depth, the depth that the guidance's own strong head reads, the image, and the depth of the second judge, if any.
SECOND = "second_features"
FEATURES = {"dfid": "depth_features", "dfid_strong": "strong_features", "fid": "image_features", "dfid_second": SECOND}
# The logarithm of dFID over that by the strong head, for the tables that show both: what guidance changes in it is how far it flatters the head that guides.
GAP, _GAP_OF = "dfid_gap", ("depth_features", "strong_features")
# Other distances, for the runs that these tables compare: features and metric. Less resampling, for what they cost.
OTHERS = {
    f"{prefix}{metric}": (key, metric)
    for prefix, key in (("d", "depth_features"), ("", "image_features"))
    for metric in ("fd_infinity", "kid", "precision", "recall")
}
_MOST_RESAMPLED = 200


def moments(study: Study, *, reference: Path, out: Path) -> None:
    """Mean and covariance of the reference pictures' features: what FID and dFID of every run are distances to.

    The file holds, for each kind of features, <kind>_mu (d,) and <kind>_sigma (d, d), float64; n, how many pictures they are of; and
    the label of their extractor.
    """
    from dag.metrics import distances

    started = time.time()
    truth = described(reference, study, study.uses["reference"].count if study.drawn else None)
    keys = compared(study).values()
    arrays = {f"{key}_{name}": array for key in keys for name, array in zip(("mu", "sigma"), distances.moments(truth[key]), strict=True)}
    with writing(out) as aside:
        np.savez(aside, n=len(truth["seeds"]), extractor=extractor_label(study), **arrays)
    write_provenance(out, study, started)


def measure(
    study: Study,
    *,
    runs: list[str],
    judged: list[Path],
    reference: Path,
    moments: Path,
    out: Path,
    real: Path | None = None,
    earlier: Path | None = None,
    threads: int = 1,
) -> None:
    """FID and dFID of runs with intervals, each run beside the unguided one of its kind, and more distances for those of table 1 or 2.

    judged: one file per run, in the order of runs. moments: of the reference, for Fréchet distances. real: held-out real pictures, the floor.
    earlier: distances already measured, which the table is to hold too. So many numbers as there are threads are computed at a time.
    """
    started, paths = time.time(), _files_of(runs, judged) | ({"real": real} if real is not None else {})
    files = {name: described(path, study, study.run(name)["n"] if name != "real" else None) for name, path in paths.items()}
    if real is not None:  # as many as table 1 has samples: a distance falls with n
        files["real"] = _first(files["real"], study.run(study["figures"]["unguided"])["n"])
    for name, baseline in {name: study.baseline_of(name) for name in runs}.items():
        if baseline and baseline not in files:
            raise ValueError(f"runs: {name!r} has the baseline {baseline!r}, which is not among {', '.join(runs)}; name it and its judged file, too")
        if baseline and not np.array_equal(files[name]["seeds"], files[baseline]["seeds"]):
            raise ValueError(f"{paths[name]}: its seeds are not those of {paths[baseline]}, its baseline, in the same order: nothing pairs them")
    truth = described(reference, study, study.uses["reference"].count if study.drawn else None)
    moments_of = _moments_of(moments, study, len(truth["seeds"]))
    tasks = list(_distances(study, list(files)))
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(tasks), desc="distances", unit="number", disable=None) as bar:

        def row(task: tuple[str, str, str, str, dict]) -> dict:
            name, metric, key, kind, options = task
            against = moments_of if kind.startswith("fd") else truth
            found = _row(study, files, name, metric, key, against, metric=kind, **options)
            bar.update()
            return found

        table = pd.DataFrame(pool.map(row, tasks))
    if earlier is not None:
        table = pd.concat([table, pd.read_csv(earlier, keep_default_na=False, na_values=[""])], ignore_index=True)
    write_csv(table, out)
    write_provenance(out, study, started, resamples=study["evaluation"]["resamples"])


def _files_of(runs: list[str], judged: list[Path]) -> dict[str, Path]:
    if len(runs) != len(judged):
        raise ValueError(f"judged: {len(judged)} files for {len(runs)} runs, expected one for each, in the order of runs")
    return dict(zip(runs, judged, strict=True))


def _distances(study: Study, names: list[str]) -> Iterator[tuple[str, str, str, str, dict]]:
    """(run, number, features, kind of distance, options of `paired_bootstrap`) of every row of a table of distances."""
    resamples = study["evaluation"]["resamples"]
    for metric, key in compared(study).items():
        yield from ((name, metric, key, "fd", {"resamples": resamples}) for name in names)
    seldom = {"resamples": min(resamples, _MOST_RESAMPLED)}
    shown = [name for name in names if name == "real" or compared_in([study.runs.tables[name]])]
    controls = [name for name in names if name != "real" and "controls" in study.runs.tables[name].split(",")]
    yield from ((name, GAP, _GAP_OF[0], "fd", seldom | {"beyond": _GAP_OF[1]}) for name in dict.fromkeys([*shown, *controls]))
    for metric, (key, kind) in OTHERS.items():
        # Extrapolating costs fifteen distances for one.
        options = {"resamples": min(resamples, 100)} if kind == "fd_infinity" else seldom
        yield from ((name, metric, key, kind, options) for name in shown)


def _row(study: Study, files: dict[str, dict], name: str, column: str, key: str, against: dict, /, beyond: str | None = None, **options) -> dict:
    """One row of a table of distances. against: of each kind of features what paired_bootstrap takes for the real pictures; options: its own.

    beyond: the features whose distance is taken off."""
    from dag.metrics.distances import paired_bootstrap

    baseline = study.baseline_of(name) if name != "real" else None

    def compared_with(key: str) -> tuple:
        return against[key], files[name][key], files[baseline][key] if baseline else None

    values = paired_bootstrap(*compared_with(key), beyond=compared_with(beyond) if beyond else None, **options)
    facts = {"run": name, "metric": column, "extractor": extractor_label(study), "dims": study["evaluation"]["dims"], "n": values.n, "baseline": baseline or ""}
    return {**facts, **{k: getattr(values, k) for k in ("value", "low", "high", "diff", "diff_low", "diff_high", "p")}}


def compared(study: Study) -> dict[str, str]:
    """The Frechet distances of the study, and the features each compares."""
    return {metric: key for metric, key in FEATURES.items() if key != SECOND or "second_judge" in study.config}


def extractor_label(study: Study) -> str:
    """As `dag.metrics.extractors.Extractor.label` says it of the config's."""
    return "{extractor}-{dims}@{resolution}".format(**study["evaluation"])


def described(path: Path, study: Study, n: int | None) -> dict[str, np.ndarray]:
    """What `describe` wrote, without the depth maps: of all runs of a large study they would fill the memory.

    Raises ValueError naming a file of another extractor, without features of the second judge, or of another number of pictures than n where that is known.
    """
    return _of_this_study(path, read(path, "seeds", "extractor", *compared(study).values(), only=True), extractor_label(study), n, "describe")


def _first(arrays: dict[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    return {name: array[:n] if array.ndim else array for name, array in arrays.items()}


def _of_this_study(path, arrays, label: str, n: int | None, stage: str) -> dict[str, np.ndarray]:
    found = len(arrays["seeds"]) if "seeds" in arrays else int(arrays["n"])
    if str(arrays["extractor"]) != label:
        raise ValueError(f"{path}: is of the extractor {arrays['extractor']}, expected {label}, the config's; run the stage `{stage}` again")
    if n is not None and found != n:
        raise ValueError(f"{path}: is of {found} pictures, expected {n}; run the stage `{stage}` again")
    return arrays


def _moments_of(path: Path, study: Study, n: int) -> dict:
    """The reference of each kind of features, of the n pictures that the reference has."""
    from dag.metrics.distances import Reference

    keys = compared(study).values()
    arrays = read(path, "n", "extractor", *(f"{key}_{name}" for key in keys for name in ("mu", "sigma")))
    _of_this_study(path, arrays, extractor_label(study), n, "moments")
    return {key: Reference(arrays[f"{key}_mu"], arrays[f"{key}_sigma"]) for key in keys}


def scale(study: Study, *, distances: Path, out: Path) -> None:
    """The best weights of the sweep, by dFID: for consistency alone, the prior alone, and both together."""
    started = time.time()
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
    write_provenance(out, study, started, beside=".provenance.json")


def runs(study: Study, *, provenance: list[Path], out: Path) -> None:
    """The run sheet as it was run: weights resolved, seconds and U-Net evaluations per sample added."""
    started = time.time()
    records = [json.loads(Path(p).read_text()) for p in provenance]
    facts = ("seconds_per_sample", "unet_evaluations", "unet_gradients", "strength")
    write_csv(pd.DataFrame([{**r["run"], **{k: r[k] for k in facts}} for r in records]), out)
    write_provenance(out, study, started)


def geometry(study: Study, *, runs: list[str], judged: list[Path], heldout: Path, out: Path) -> None:
    """How much the judged depth of runs, and the true depth of held-out scenes, looks like a box room: see `dag.metrics.box_room`.

    judged: one file per run, in the order of runs. The camera is the nominal one, `figures.fov_degrees`: that of a generated picture is unknown.
    """
    from dag.data.geometry import camera
    from dag.metrics.box_room import box_room_scores

    started = time.time()
    maps = {"true depth": (heldout, "ids", "depth"), **{name: (path, "seeds", "judged") for name, path in _files_of(runs, judged).items()}}
    intrinsics = camera(np.tan(np.radians([study["figures"]["fov_degrees"] / 2])), study["domain"]["size"])[0]
    scores = []
    for name, (path, key, array) in maps.items():
        seeds = read(path, key, only=True)[key]
        depths = (depth for part in rows_of(path, array, PART) for depth in part)
        for seed, depth in zip(seeds, tqdm(depths, desc=name, unit="map", total=len(seeds), disable=None), strict=True):
            scores.append({"run": name, "seed": int(seed), **box_room_scores(depth, intrinsics)})
    write_csv(pd.DataFrame(scores), out)
    write_provenance(out, study, started, fov_degrees=study["figures"]["fov_degrees"])
