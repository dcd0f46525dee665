"""What all tests share: one thread, so that bits do not depend on the machine's load, and the folder of reference files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Folder with what other implementations compute (`adm_tiny_io.npz` and the network behind it), named by DAG_FIXTURES."""
    folder = os.environ.get("DAG_FIXTURES")
    if not folder:
        pytest.skip("DAG_FIXTURES is not set: the folder of reference outputs is needed")
    if not Path(folder).is_dir():
        pytest.fail(f"DAG_FIXTURES is {folder!r}, which is no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def nyu_root() -> Path:
    """Folder with the labelled set of NYU-Depth v2, named by DAG_NYU_ROOT."""
    folder = os.environ.get("DAG_NYU_ROOT")
    if not folder:
        pytest.skip("DAG_NYU_ROOT is not set: the folder of NYU-Depth v2 is needed")
    if not Path(folder).exists():
        pytest.fail(f"DAG_NYU_ROOT is {folder!r}, which does not exist")
    return Path(folder)
