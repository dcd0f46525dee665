"""What the page's viewers show: pictures as sprites, depth as numbers from which a browser makes colours, normals and points.

A sprite holds tiles in rows of `COLUMNS`, as a lossless WebP (a quarter smaller than PNG). Depth is 16 bits on a logarithmic scale, as
base64: what a browser reads back from a picture may have been altered by its protection against fingerprinting, this not.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from table_format import decimals

from dag.stages.arrays import picked

COLUMNS = 16
KINDS = {(False, False): "Baseline", (False, True): "DPG", (True, False): "DCG", (True, True): "Both"}


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as an address that needs no file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def sprite(tiles: np.ndarray) -> str:
    """Pictures uint8 (n, s, s, 3) side by side as one lossless data URI."""
    count, size = tiles.shape[:2]
    sheet = np.zeros((-(-count // COLUMNS), COLUMNS, size, size, 3), np.uint8)
    sheet.reshape(-1, size, size, 3)[:count] = tiles
    return data_uri(lossless(sheet.transpose(0, 2, 1, 3, 4).reshape(-1, COLUMNS * size, 3)), "image/webp")


def lossless(picture: np.ndarray) -> bytes:
    """A picture uint8 (h, w, 3) as WebP with every pixel as it is."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "WEBP", lossless=True, quality=60, method=4)
    return stream.getvalue()


def coded(depth: np.ndarray, limits: Sequence[float]) -> str:
    """Depth in metres as base64 of little-endian uint16: 0 and 65535 are the limits, even steps of the logarithm between."""
    low, high = np.log(limits)
    return base64.b64encode(np.round((np.log(depth.astype(float)) - low) / (high - low) * 65535).astype("<u2").tobytes()).decode()


def depth_range(*maps: np.ndarray) -> list[float]:
    """The least and the greatest depth, apart even where all are equal. Raises ValueError for depth that is no distance."""
    low, high = min(float(m.min()) for m in maps), max(float(m.max()) for m in maps)
    if not (low > 0 and np.isfinite(high)):
        raise ValueError(f"depth of the page's pictures goes from {low} to {high}, expected positive and finite metres")
    return [low, max(high, low * 1.001)]


def kind(run: Mapping) -> str:
    """Baseline, DPG, DCG or Both, by the run's weights."""
    return KINDS[float(run["w_dc"]) != 0, float(run["w_dp"]) != 0]


def weights(run: Mapping) -> str:
    """The weights that are not zero, as text."""
    return ", ".join(f"{key} = {float(run[key]):g}" for key in ("w_dc", "w_dp") if float(run[key]))


def gallery(runs: pd.DataFrame, samples: Mapping[str, str | Path], judged: Mapping[str, str | Path], count: int) -> dict:
    """The first `count` seeds that all runs share. runs: settings by run. samples, judged: files by run, the baseline first."""
    loaded = _load(samples, judged, count)
    limits = depth_range(*(depth for _, depth in loaded["runs"].values()))
    kinds = [kind(runs.loc[name]) for name in samples]
    shown = []
    for name, label in zip(samples, kinds, strict=True):
        images, depth = loaded["runs"][name]
        # Two runs of one kind are told apart by their names.
        facts = {"run": name, "label": label if kinds.count(label) == 1 else name, "weights": weights(runs.loc[name])}
        shown.append({**facts, "images": sprite(images), "depth": coded(depth, limits)})
    return {"seeds": loaded["seeds"], "size": loaded["size"], "range": limits, "runs": shown}


def sweep(table: pd.DataFrame, samples: Mapping[str, str | Path], judged: Mapping[str, str | Path], count: int) -> dict:
    """Slides over the weights of each kind, unguided first. table: fig8_scale.csv; its numbers go with the pictures."""
    loaded = _load(samples, judged, count)
    limits = depth_range(*(depth for _, depth in loaded["runs"].values()))
    numbers = [f"{metric}{part}" for metric in ("dfid", "fid") for part in ("", "_low", "_high", "_diff", "_diff_low", "_diff_high")]
    stops = {}
    for row in table.to_dict("records"):
        images, depth = loaded["runs"][row["run"]]
        facts = {"run": row["run"], "best": row["best"] == "best", "w_dc": float(row["w_dc"]), "w_dp": float(row["w_dp"])}
        measured = {key: None if pd.isna(row[key]) else float(row[key]) for key in numbers}
        stops[row["run"]] = {**facts, **measured, "images": sprite(images), "depth": coded(depth, limits)}
    unguided = list(table.loc[table["sweep"] == "baseline", "run"])
    names = {"w_dc": "w_dc alone", "w_dp": "w_dp alone", "both": "both"}
    ways = [{"key": key, "name": name, "runs": unguided + list(table.loc[table["sweep"] == key, "run"])} for key, name in names.items()]
    ways = [way for way in ways if len(way["runs"]) > len(unguided)]
    digits = {metric: decimals(table[metric]) for metric in ("dfid", "fid")}
    return {"seeds": loaded["seeds"], "size": loaded["size"], "range": limits, "ways": ways, "stops": stops, "digits": digits}


def trajectory(path: str | Path) -> dict:
    """Steps from noise to image, each with pictures and depths of all seeds."""
    with np.load(path) as data:
        depths = {head: data[head] for head in ("strong", "weak")}
        limits = depth_range(*depths.values())
        pictures = {name: [sprite(step) for step in data[name]] for name in ("x_t", "pred_xstart")}
        coded_depths = {head: [coded(step, limits) for step in maps] for head, maps in depths.items()}
        facts = {"seeds": data["seeds"].tolist(), "t": data["t"].tolist(), "size": int(data["x_t"].shape[2]), "range": limits}
    return {**facts, **pictures, **coded_depths}


def _load(samples: Mapping[str, str | Path], judged: Mapping[str, str | Path], count: int) -> dict:
    """Images and depth by run, of the first seeds that all runs share."""
    rows = {}
    for name in samples:
        with np.load(samples[name]) as pictures, np.load(judged[name]) as depths:
            rows[name] = [{seed: row for row, seed in enumerate(arrays["seeds"].tolist())} for arrays in (pictures, depths)]
    first = next(iter(rows.values()))[0]
    seeds = [seed for seed in first if all(seed in own and seed in at for own, at in rows.values())][:count]
    if not seeds:
        raise ValueError(f"the runs {', '.join(samples)} have no seed in common: the page shows the same seeds of each")
    chosen = {
        name: (picked(samples[name], "images", [own[seed] for seed in seeds]), picked(judged[name], "judged", [at[seed] for seed in seeds]))
        for name, (own, at) in rows.items()
    }
    return {"seeds": seeds, "size": int(next(iter(chosen.values()))[0].shape[1]), "runs": chosen}
