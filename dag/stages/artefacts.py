"""Artefacts of a study: what they depend on, how they are written whole or not at all, and what made them. Knows no torch."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pandas as pd

PACKAGE = Path(__file__).resolve().parents[1]


def digest(text: str) -> str:
    """A short content hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def code_hash(*modules: str) -> str:
    """Content hash of the named modules of dag ("stages.sampling") and of everything they import from dag."""
    seen: dict[str, str] = {}
    queue = [f"dag.{m}" for m in modules]
    while queue:
        module = queue.pop()
        path = _module_file(module)
        if path is None or str(path) in seen:
            continue
        seen[str(path)], imported = _read_module(path)
        queue += imported
    # The study's own modules plan and check; what it hands to stages, sections and rows, has hashes of its own. The package's names compute nothing.
    for planning in ("stages/study.py", "stages/sheet.py", "stages/architectures.py", "stages/locks.py", "stages/validation.py", "__init__.py"):
        seen.pop(str(PACKAGE / planning), None)
    return digest(json.dumps(sorted(seen.values())))


@cache
def _read_module(path: Path) -> tuple[str, list[str]]:
    """Hash of a module's text, and the modules of dag that it may import (among names that are none)."""
    text, names = path.read_text(), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dag"):
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.startswith("dag.")]
    return digest(text), names


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file; of a folder, of the names and hashes of all its files."""
    path = Path(path)
    if path.is_dir():
        parts = [f"{file.relative_to(path)} {content_hash(file)}" for file in _files(path)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size(path: str | Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    path = Path(path)
    return sum(file.stat().st_size for file in _files(path)) if path.is_dir() else path.stat().st_size


def _files(folder: Path) -> list[Path]:
    """All that a stage wrote into a folder: Snakemake dates a folder by an empty file of its own."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ".snakemake_timestamp")


def _module_file(module: str) -> Path | None:
    path = PACKAGE.parent / Path(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yields a path beside the wanted one and renames it there at the end: nothing half-written is ever taken for whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name for every try: what a killed job left is overwritten by the next.
    aside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_csv(frame: pd.DataFrame, path: str | Path) -> None:
    """A table of results; floats with enough digits to be equal bit for bit after float32."""
    with writing(path) as aside:
        frame.to_csv(aside, index=False, float_format="%.9g")


def write_provenance(out: str | Path, study, started: float, *, beside: str = ".json", **facts) -> None:
    """What made an artefact, beside it as <name>.json: config, versions, hashes of inputs and outputs, seconds, peak memory, and the stage's own facts.

    beside: another ending, where the artefact's own index has that name.
    """
    from importlib.metadata import version

    record = {
        "made": Path(out).name,
        "study": study["study"],
        "config": study.section_hash(*study.config),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "diffusers", "numpy")}},
        "machine": platform.machine(),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "seconds": round(time.time() - started, 2),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        **facts,
        "inputs": {str(path): content_hash(path) for path in study.inputs},
        "outputs": {str(path): {"bytes": size(path), "sha256": content_hash(path)} for path in [Path(out), *study.other_outputs]},
    }
    with writing(Path(out).with_suffix(beside)) as aside:
        aside.write_text(json.dumps(record, indent=1, default=str) + "\n")
