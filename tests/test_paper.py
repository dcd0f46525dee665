"""The paper's own study: planned with nothing of it here. tests/test_paper_mini.py runs it whole."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import checkout, snakemake
from standins import write_all

ROOT = Path(__file__).parent.parent
MINI = "config/paper-mini.yaml"


def counts(output: str) -> dict[str, int]:
    """{rule: jobs} of a dry run."""
    table = re.search(r"Job stats:\n(.*?)\ntotal", output, re.S)
    return {line.split()[0]: int(line.split()[1]) for line in table.group(1).splitlines()[2:]}


def test_50000_samples_are_the_same_runs_and_the_sweep_stays_as_published():
    for study in ("paper", "paper-church"):
        few, many = (pd.read_csv(ROOT / "config" / "runs" / f"{study}{more}.tsv", sep="\t") for more in ("", "50k"))
        assert few.drop(columns="n").equals(many.drop(columns="n"))
        assert set(few.n) == {5000}
        assert [50000 if tables != "fig8" else 5000 for tables in many.tables] == many.n.to_list()


def planned(study: str, section: int) -> dict[str, int]:
    """{stage: jobs} of the committed plan. section: 1 for the first size of the study, 2 for the other."""
    text = (ROOT / "docs" / f"{study}-scale.md").read_text().split(" samples a run\n")[section]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| ")]
    return {stage.strip(): int(jobs) for stage, jobs in rows[1:]}


@pytest.mark.parametrize(
    ("study", "more", "options"),
    [("paper", "", []), ("paper", "50k", []), ("paper", "50k", ["--profile", "slurm"]), ("paper-church", "", []), ("paper-church", "50k", [])],
)
def test_the_study_is_planned_with_no_asset_present(tmp_path, study, more, options):
    configs = [f"config/{study}.yaml", *([f"config/runs/{study}{more}.yaml"] if more else [])]
    plan = snakemake(checkout(tmp_path), "-n", *options, config=configs)
    assert plan.returncode == 0, plan.stderr[-2000:]
    found, runs = counts(plan.stdout + plan.stderr), pd.read_csv(ROOT / "config" / "runs" / f"{study}{more}.tsv", sep="\t")
    config = yaml.safe_load((ROOT / "config" / f"{study}.yaml").read_text())
    parts = [math.ceil(n / config["compute"]["shard_size"]) for n in runs["n"]]
    assert found["asset"] == len(config["assets"])
    assert (found.get("sample", 0), found["sample_shard"], found["join"]) == (parts.count(1), sum(n for n in parts if n > 1), sum(n > 1 for n in parts))
    assert (found["describe"], found["convert_unet"], found["prior"]) == (len(runs) + 2, 1, 5)
    assert not {"fetch", "fetch_asset", "train_unet"} & found.keys()
    assert set(runs.query("tables.str.contains('table[12]')")["n"]) == {50000 if more else 5000}
    # The plan that is committed counts the same jobs.
    jobs = planned(study, 2 if more else 1)
    assert jobs.pop("**all**") == sum(jobs.values())
    rules = dict.fromkeys(("prepare", "label", "heads", "judge", "join", "trajectory", "describe", "moments", "measure", "downstream"))
    assert {rule: jobs[rule] for rule in rules} == {rule: found[rule] for rule in rules}
    several = {"features": ("features", "validation_features"), "prior": ("prior",), "sample": ("sample", "sample_shard")}
    for stage, names in several.items():
        assert sum(n for name, n in jobs.items() if name.split()[0] == stage) == sum(found.get(name, 0) for name in names)
    assert [jobs[stage] for stage in ("convert unet", "known answers", "measure, sweep")] == [1, 1, 1]


def test_the_study_in_miniature_has_every_rule_of_the_whole(tmp_path):
    checkout(tmp_path)
    write_all(tmp_path / "assets" / "mini")
    whole, mini = (snakemake(tmp_path, "-n", config=config) for config in ("config/paper.yaml", MINI))
    assert counts(whole.stdout).keys() == counts(mini.stdout).keys()


def test_both_readings_of_40_and_every_resolution_of_the_prior_are_runs():
    runs = pd.read_csv(ROOT / "config" / "runs" / "paper.tsv", sep="\t").set_index("run")
    assert {"mean", "mean_variance"} <= set(runs[(runs.w_dc == 40) & (runs.w_dp == 40)].rule)
    table3 = runs[runs.tables.str.contains("table3") & (runs.w_dp > 0)]
    assert set(table3.prior) == {32, 64, 128, 256}


def test_fetch_looks_at_every_asset_anew_and_says_what_to_put_where(tmp_path):
    folder = checkout(tmp_path)
    write_all(folder / "assets" / "mini")

    def fetch() -> tuple[int, set[str], str]:
        done = snakemake(folder, "--cores", "2", "--keep-going", "fetch", config=MINI)
        return done.returncode, set(re.findall(r"wildcards: name=(\w+)", done.stderr)), done.stderr

    every = {"unet", "lsun", "dpt", "nyu", "inception"}
    assert fetch()[:2] == (0, every)
    shutil.move(folder / "assets" / "mini" / "dpt", folder / "dpt")
    status, _, said = fetch()
    assert status != 0
    assert "dag fetch: dpt: python tests/standins.py writes it; put it at assets/mini/dpt (licence MIT)\n" in said
    (folder / "assets" / "mini" / "lsun_bedroom.pt").unlink()  # which the last call has found
    shutil.move(folder / "dpt", folder / "assets" / "mini" / "dpt")
    status, looked, said = fetch()
    assert status != 0
    assert looked >= {"dpt", "unet"}
    assert "dag fetch: unet: " in said
    assert not (folder / "results" / "paper-mini" / "samples").exists()
