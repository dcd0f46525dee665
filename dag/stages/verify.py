"""Stage verify: whether the files of a study are still those that its records speak of. Knows no torch."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

from dag.stages.artefacts import content_hash, size


def verify(folder: Path) -> None:
    """Hash the artefacts of results/<study> again and compare them with their provenance.

    A file is missing, truncated (shorter than it was) or altered; or stale: whole, but made from an input that has changed since. Inputs that
    are not there are counted, not blamed: of a published study only tables and figures are kept. Raises ValueError where anything is wrong.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected results/<study>")
    troubles, whole, absent = _compare(folder, list(_records(folder)))
    text = f"{folder}: {whole} artefacts are whole" + (f"; {absent} inputs are not here and were not compared" if absent else "")
    if not whole and not troubles:
        raise ValueError(f"{folder}: no provenance (*.json) that names outputs; a study writes it")
    sys.stdout.write("\n".join([*troubles, text]) + "\n")
    if troubles:
        raise ValueError(f"{folder}: {len(troubles)} artefacts are not what their records say")


def _records(folder: Path):
    """(file, record) of every provenance, those of tables and figures among them."""
    for path in sorted(folder.rglob("*.json")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue  # batches of a run that is not done
        try:
            content = json.loads(path.read_text())
        except ValueError:
            yield path, None
            continue
        if isinstance(content, dict):
            yield from ((path, record) for record in content.get("records", [content]) if isinstance(record, dict) and "outputs" in record)


def _compare(folder: Path, records: list[tuple[Path, dict | None]]) -> tuple[list[str], int, int]:
    """What is wrong, a line each; how many outputs are whole; how many inputs are not there."""
    root, hashed = folder.resolve().parent.parent, cache(content_hash)
    troubles, whole, absent = [], 0, set()
    for path, record in records:
        if record is None:
            troubles.append(f"truncated: {path}: not readable as JSON")
            continue
        for name, told in record["outputs"].items():
            trouble = _output(root / name, told, hashed)
            changed = [i for i, was in record["inputs"].items() if (root / i).exists() and hashed(root / i) != was]
            absent |= {i for i in record["inputs"] if not (root / i).exists()}
            if trouble:
                troubles.append(f"{trouble.partition(':')[0]}: {name}:{trouble.partition(':')[2]}")
            elif changed:
                troubles.append(f"stale: {name}: {', '.join(changed)} changed since it was made")
            else:
                whole += 1
    return troubles, whole, len(absent)


def _output(path: Path, told: dict, hashed) -> str:
    if not path.exists():
        return f"missing: {told['bytes']} bytes are recorded"
    if (found := size(path)) < told["bytes"]:
        return f"truncated: {found} bytes, {told['bytes']} are recorded"
    if (found := hashed(path)) != told["sha256"]:
        return f"altered: its SHA-256 is {found[:16]}..., {told['sha256'][:16]}... is recorded"
    return ""
