"""The benchmark of the guided step runs and finds the exactness and the profile that docs/performance.md reports; freed memory is kept."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_benchmark_of_the_guided_step(tmp_path):
    """Times depend on the machine, so only what does not is asserted: the same numbers as the naive step, and nothing but the parts costs."""
    report = tmp_path / "performance.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "guided_step.py"), "--quick", "--parts", "32x32", "trajectory", "--write", str(report)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == report.read_text().strip()
    claims = dict(re.findall(r"^\| (.*?) \| [\d.]+ \| at (?:most|least) [\d.]+ \| (yes|no) \|$", printed, re.MULTILINE))
    for what in ("32x32, batch 16: relative difference", "32x32, batch 1: relative difference", "trajectory: share"):
        assert [met for claim, met in claims.items() if claim.startswith(what)] == ["yes"]


PAGE_FAULTS = """
import resource
import sys
import numpy as np
from dag.__main__ import keep_freed_memory

megabytes, count, large = (int(word) for word in sys.argv[1:])

def faults():
    for _ in range(5):
        arrays = [np.ones(megabytes * 2**17) for _ in range(count)]
        del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

keep_freed_memory(large=bool(large))
faults()
before = faults()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told to keep memory")
@pytest.mark.parametrize(("megabytes", "count", "large"), [(4, 4, False), (40, 14, True)])
def test_freed_memory_is_kept(megabytes, count, large):
    """Arrays come and go without new pages, of which 1 MiB has 256: those of a small step, and such as are mapped one by one and more than are trimmed."""
    command = [sys.executable, "-c", PAGE_FAULTS, *(str(int(word)) for word in (megabytes, count, large))]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert int(found.stdout) < 100
