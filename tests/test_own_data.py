"""docs/own-data.md is true: its commands, run as they stand in a folder of their own, end with tables, figures and a picture."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.full_study
def test_the_commands_of_own_data(tmp_path):
    for name in ("dag", "workflow", "config", "profiles", "models", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", tmp_path)
    commands = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "own-data.md").read_text(), re.S)
    assert len(commands) == 4
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(tmp_path), "OMP_WAIT_POLICY": "PASSIVE"}
    for command in commands:
        done = subprocess.run(["bash", "-euc", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    results = tmp_path / "results" / "own"
    assert list(pd.read_csv(results / "tables" / "table1_guidance.csv").run)[:2] == ["unguided", "both"]
    assert (results / "figures" / "fig5.png").stat().st_size > 0
    assert matplotlib.image.imread(results / "more.png").shape[:2] == (4 * 96, 8 * 96)
