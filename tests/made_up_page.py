"""A page of a made-up study: the tables and pictures of `test_report_scripts`, and what the page shows beyond them."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from PIL import Image
from test_report_scripts import ROOT, SCRIPTS, build_all, make_study

from dag.data.rooms import render

sys.path.insert(0, str(SCRIPTS))
import manifest

CONFIG = ROOT / "config/rooms.yaml"


def make(root: Path, seeds: int) -> None:
    """Everything that the page is made of, under root; `seeds` samples of every run that it shows."""
    make_study(root)
    images, depth, _ = render(range(seeds), 32)
    runs = pd.read_csv(root / "metrics/runs.csv")
    for number, run in enumerate(runs.itertuples()):
        if run.run not in ("baseline", "dpg", "dcg", "both") and not run.run.startswith("sweep"):
            continue
        grain, count = 18 - number % 13, seeds if run.first_seed == 0 else min(seeds, 8)
        noise = np.random.default_rng(number).normal(0, grain, images[:count].shape)
        at = run.first_seed + np.arange(count)
        np.savez(root / f"samples/{run.run}.npz", images=np.clip(images[:count] + noise, 0, 255).astype(np.uint8), seeds=at)
        bumps = 1 + 0.006 * grain * np.sin(np.arange(32) / 3)[None, :, None] * np.cos(np.arange(32) / 4)[None, None]
        np.savez(root / f"judged/{run.run}.npz", judged=(depth[:count] * bumps).astype(np.float32), seeds=at)
    for run in runs["run"]:
        record = {"config": "0123456789abcdef", "versions": {"python": "3.11", "torch": "2.14.1"}, "machine": "x86_64", "seconds": 1.5, "peak_memory_mib": 800}
        (root / f"samples/{run}.json").write_text(json.dumps(record))
    (root / "tables").mkdir()
    for name, table in build_all(root).items():
        table.write(**{kind: root / f"tables/{name}.{kind}" for kind in ("csv", "md", "tex")})
    (root / "timings.md").write_text("# Timings\n\n| rule | jobs |\n|---|---:|\n| sample | 3 |\n")
    (root / "figures").mkdir()
    for name in ("fig3", "fig4a", "fig4b", "fig5", "fig6", "fig8", "samples"):
        Image.fromarray(images[:6].transpose(1, 0, 2, 3).reshape(32, -1, 3)).resize((960, 160), Image.Resampling.NEAREST).save(root / f"figures/{name}.png")
        (root / f"figures/{name}.svg").write_text(f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 9 3'><text>{name}{' ' * 90_000}</text></svg>")
    drawn = [([str(path), str(path.with_suffix(".md"))], [str(root / "metrics/runs.csv")]) for path in (root / "tables").glob("*.csv")]
    drawn += [([str(path)], sorted(map(str, (root / "tables").glob("fig8*.csv")))) for path in (root / "figures").glob("*.png")]
    (root / "manifest.json").write_text(json.dumps({"records": manifest.build(drawn)}))


def add_gain(root: Path) -> None:
    """What `snakemake gain` leaves: unguided and guided runs of a U-Net that was trained on fewer images, and of the study's own."""
    numbers = {"dfid": [9.0, 7.0, 4.0, 3.5], "fid": [90.0, 80.0, 40.0, 41.0]}
    frame = pd.DataFrame({"images": [1000, 1000, 2000, 2000], "run": ["baseline", "both"] * 2, "baseline": ["", "baseline"] * 2})
    for metric, values in numbers.items():
        frame[metric], frame[f"{metric}_low"], frame[f"{metric}_high"] = values, np.array(values) - 0.25, np.array(values) + 0.25
        difference = [np.nan, values[1] - values[0], np.nan, values[3] - values[2]]
        frame[f"{metric}_diff"], frame[f"{metric}_diff_low"], frame[f"{metric}_diff_high"] = (
            difference,
            np.array(difference) - 0.125,
            np.array(difference) + 0.125,
        )
    frame.to_csv(root / "tables/gain.csv", index=False)
    (root / "tables/gain.md").write_text("**Gain of guidance against training**\n\n| run |\n| --- |\n| both |\n\nHow it was measured.\n")
    for kind in ("png", "svg"):
        (root / f"figures/gain.{kind}").write_bytes((root / f"figures/fig8.{kind}").read_bytes())


def sources(root: Path, seeds: int):
    """What `page.build` takes, of a study made by `make`."""
    import page

    runs = list(pd.read_csv(root / "metrics/runs.csv")["run"])
    config = yaml.safe_load(CONFIG.read_text())

    def pictures(names: list[str], count: int) -> page.Pictures:
        return page.Pictures(*({name: str(root / f"{folder}/{name}.npz") for name in names} for folder in ("samples", "judged")), count)

    return page.Sources(
        config=config,
        runs=str(root / "metrics/runs.csv"),
        tables=sorted(map(str, (root / "tables").glob("*.csv"))),
        figures=sorted(map(str, (root / "figures").glob("*.png"))),
        captions=sorted(map(str, (ROOT / "workflow/report").glob("*.rst"))),
        published=str(ROOT / "config/published.tsv"),
        gallery=pictures(config["figures"]["runs"], seeds),
        trajectory=str(root / "samples/trajectory.npz"),
        sweep=pictures([run for run in runs if run.startswith("sweep")], 8),
        provenance={run: str(root / f"samples/{run}.json") for run in runs},
        timings=str(root / "timings.md"),
        ledger=str(ROOT / "docs/ledger.md"),
        manifest=str(root / "manifest.json"),
        hashes={"U-Net": "feedfeedfeedfeed"},
    )
