"""The smoke study on a Slurm of one node on this machine, by the profile as it is: the same tables as without Slurm."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import checkout, snakemake

HERE = Path(__file__).parent
MISSING = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not found: `bash tests/slurm/cluster.sh install`"),
    pytest.mark.skipif(os.getuid() != 0, reason="starting Slurm needs root"),
]
# Jobs are short here, so look often; the profile's own numbers spare a busy controller.
HASTE = ("--slurm-init-seconds-before-status-checks", "2", "--seconds-between-status-checks", "2")


@pytest.fixture(scope="module")
def cluster():
    """A cluster that is up already stays so."""
    up = subprocess.run(["scontrol", "ping"], capture_output=True, timeout=60).returncode == 0
    if not up:
        subprocess.run(["bash", HERE / "cluster.sh", "up"], check=True)
    yield
    if not up:
        subprocess.run(["bash", HERE / "cluster.sh", "down"], check=True)


@pytest.fixture
def again(study, tmp_path) -> Path:
    """The study with what a part of it made removed: one training, four runs and all that stands on them; everything with DAG_SLURM_WHOLE=1."""
    folder = tmp_path / "study"
    shutil.copytree(study, folder, symlinks=True)
    results = folder / "results" / "smoke"
    if os.environ.get("DAG_SLURM_WHOLE") == "1":
        shutil.rmtree(folder / "results")
        return folder
    for name in ("tables", "figures", "metrics/downstream"):
        shutil.rmtree(results / name)
    for path in [*(results / "metrics").glob("*"), results / "models" / "heads" / "labels1.safetensors", *(results / "samples").glob("trajectory*")]:
        if path.is_file():
            path.unlink()
    for run in ("baseline", "both", "ddpm_both", "sweep_dc30"):
        for kind in ("samples", "judged"):
            (results / kind / f"{run}.npz").unlink()
    return folder


def test_the_study_on_slurm_makes_the_same_tables(cluster, study, again, monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_CONF"):
        monkeypatch.delenv(name, raising=False)
    done = snakemake(again, "--profile", "slurm", *HASTE)
    assert done.returncode == 0, done.stderr[-6000:]
    said = done.stderr + done.stdout
    assert len(set(re.findall(r"SLURM jobid (\d+)", said))) >= 12, said[-3000:]
    arrays = re.findall(r"Submitted array job with Snakemake IDs ([\d,]+)", said)
    assert [ids for ids in arrays if "," in ids], f"no job array: {said[-3000:]}"
    tables = sorted(path.relative_to(study) for path in (study / "results" / "smoke" / "tables").iterdir())
    assert len(tables) >= 18
    for table in tables:
        assert without_times(again / table) == without_times(study / table), table
    for run in ("baseline", "both", "ddpm_both", "sweep_dc30"):
        # Two fake GPUs; each job saw the one that Slurm gave it.
        assert json.loads((again / "results" / "smoke" / "samples" / f"{run}.json").read_text())["visible_devices"] in ("0", "1")


def test_arrays_that_the_plugin_would_not_submit_whole_are_refused(cluster, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_CONF", raising=False)
    done = snakemake(checkout(tmp_path), "--profile", "slurm", "--jobs", "4")
    assert done.returncode != 0
    assert re.findall(r"^snakemake: jobs is 4 and max-jobs-per-timespan 1000, expected at least \d+, the jobs of this plan: ", done.stderr, re.M), done.stderr
    assert "SLURM jobid" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def without_times(table: Path) -> str:
    """The text of a table less its columns of seconds, the only ones that two runs of a study may differ in."""
    text = table.read_text()
    if table.suffix == ".csv":
        rows = list(csv.reader(io.StringIO(text)))
        timed = [place for place, name in enumerate(rows[0]) if name.startswith("seconds")]
        return "\n".join(",".join(cell for place, cell in enumerate(row) if place not in timed) for row in rows)
    between, timed, lines = (" | " if table.suffix == ".md" else " & "), None, []
    for line in text.splitlines():
        cells = re.split(r" \| | & ", line)
        timed = next((place for place, cell in enumerate(cells) if re.sub(r"[|\\\\]", "", cell).strip() == "s / sample"), timed if line else None)
        lines.append(between.join(cell for place, cell in enumerate(cells) if place != timed))
    return "\n".join(lines)


def test_only_times_are_left_out(tmp_path):
    lines = {
        "csv": ["run,seconds_per_sample,n\na,{time},{n}\n"],
        "md": ["note | s\n\n| run | n | s / sample |\n| --- | --- | ---: |\n| a | {n} | {time} |\n"],
        "tex": ["run & n & s / sample \\\\\n\\midrule\na & {n} & {time} \\\\\n"],
    }
    for kind, (text,) in lines.items():
        found = []
        for time, n in (("0.1", "1"), ("0.2", "1"), ("0.1", "2")):
            (tmp_path / f"t.{kind}").write_text(text.replace("{time}", time).replace("{n}", n))
            found.append(without_times(tmp_path / f"t.{kind}"))
        assert found[0] == found[1] != found[2]
