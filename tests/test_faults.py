"""The short form of tests/faults.py: one trial of each of six faults."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_six_faults_change_no_bit():
    done = subprocess.run([sys.executable, HERE / "faults.py", "--trials", "6", "--without-slurm"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 trials ended with the bits of an undisturbed job." in done.stdout
    assert len(re.findall(r"^\| (?:training|sampling) \|.*same bits \| 1 \|$", done.stdout, re.MULTILINE)) == 6
