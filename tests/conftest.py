"""What all tests share: one thread, so that bits do not depend on the machine's load, and the folder of reference files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# Before torch looks for one: tests compute on the CPU, whose numbers they compare. What a GPU computes: benchmarks/gpu_step.py.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that run a study first: they take longest, and `make test` gives each file to one of two processes."""
    first = {item.path for item in items if {"smoke", "mini"} & set(getattr(item, "fixturenames", ()))}
    items.sort(key=lambda item: item.path not in first)


def snakemake(folder: Path, *arguments: str, config: str | list[str] = "config/smoke.yaml") -> subprocess.CompletedProcess:
    """Snakemake in a checkout, which asks nothing of the hub of models. config: one config file, or several, of which later ones override."""
    command = [sys.executable, "-m", "snakemake", "--configfile", *([config] if isinstance(config, str) else config), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def checkout(folder: Path) -> Path:
    """The parts of the project that a study needs, in a folder where it may write."""
    for name in ("dag", "workflow", "config", "profiles"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", folder)
    (folder / "slurm").symlink_to("profiles/slurm")
    return folder


@pytest.fixture(scope="session")
def tiny_dinov2(tmp_path_factory) -> Path:
    """DINOv2's own architecture with random weights, as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    folder = tmp_path_factory.mktemp("dinov2")
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Path:
    """The smoke study; who changes a file of it puts it back. Asked for in test_workflow.py alone: of two processes that test, one runs it."""
    folder = checkout(tmp_path_factory.mktemp("smoke"))
    done = snakemake(folder, "--cores", "2")
    assert done.returncode == 0, done.stderr[-4000:]
    return folder
