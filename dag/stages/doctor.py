"""Stage doctor: is everything there that a study needs, and what to do next."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import numpy as np

from dag.data.domain import DOMAINS, dataset
from dag.stages.artefacts import PACKAGE
from dag.stages.data import check_unit, positions
from dag.stages.study import Study, StudyError

DISTRIBUTION = "dag-depth-guidance"
GIB = 2**30
DISK, MEMORY = 2, 4  # GiB that the default study wants
SOME = 100  # pictures of a folder that are read, spread over all that the study uses

# What was found, and what to do about it or nothing; a fault stops a study, a remark does not.
Finding = tuple[str, str, str]


def doctor(*, config: Path = Path("config/rooms.yaml")) -> int:
    """Check installation, device, config, assets, weights and data, and say what to do next.

    Every line is ok, note or FAIL with what to do about it. The exit status is 1 when something fails.
    """
    study: list[Study] = []
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": _python,
        "packages": _packages,
        "machine": _machine,
        "config": lambda: _config(config, study),
        "device": lambda: _device(study),
        "assets": lambda: _assets(study),
        "weights": lambda: _weights(study),
        "data": lambda: _data(study),
    }
    failed = False
    for name, check in checks.items():
        for state, found, advice in check():
            failed |= state == "FAIL"
            sys.stdout.write(f"{state:5}{name:10}{found}{f': {advice}' if advice else ''}\n")
        if failed and name == "packages":  # without them nothing else can be asked
            break
    command = f"snakemake --cores all --configfile {config}"
    sys.stdout.write(
        "\nmend what says FAIL, then ask again\n" if failed else f"\nnext: {command} --dry-run   shows what would run; without --dry-run runs it\n"
    )
    return int(failed)


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()} at {sys.executable}"
    yield ("ok", found, "") if sys.version_info >= (3, 11) else ("FAIL", found, "3.11 or newer is needed")


def _packages() -> Iterator[Finding]:
    names = [re.match(r"[\w.-]+", line)[0] for line in requires(DISTRIBUTION) or [] if "extra ==" not in line] if _version(DISTRIBUTION) else []
    if not names:
        yield "note", f"{DISTRIBUTION} is not installed", "pip install -c constraints.txt -e . makes `dag` a command"
    missing = [name for name in names if _version(name) is None]
    if missing:
        yield "FAIL", f"missing: {', '.join(missing)}", "pip install -c constraints.txt -e ."
        return
    pinned = PACKAGE.parent / "constraints.txt"
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", pinned.read_text(), re.MULTILINE)) if pinned.is_file() else {}
    other = [f"{name} {_version(name)} (not {pins[name]})" for name in names if name in pins and _version(name).partition("+")[0] != pins[name]]
    if other:
        yield "note", f"other versions than in constraints.txt: {', '.join(other)}", "results may differ in their last digits"
    else:
        yield "ok", f"{len(names)} as in constraints.txt" if pins else f"{len(names)} there", ""
    if shutil.which("snakemake") is None and not Path(sys.executable).with_name("snakemake").exists():
        yield "FAIL", "no command snakemake", "activate the environment: source .venv/bin/activate"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device(studies: list[Study]) -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield "FAIL", f"torch does not load ({error})", "pip install -c constraints.txt -e ."
        return
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        yield "ok", ", ".join(f"{gpu.name} with {gpu.total_memory / GIB:.0f} GiB" for gpu in names), ""
    elif any(study.compute["device"] == "gpu" for study in studies):
        yield "FAIL", "compute.device is 'gpu', but torch finds no CUDA device", "run on a node with a GPU, or set compute.device to auto or cpu"
    else:
        yield "ok", f"no GPU, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPU cores", ""


def _machine() -> Iterator[Finding]:
    import psutil

    disk, memory = shutil.disk_usage(Path.cwd()).free / GIB, psutil.virtual_memory().total / GIB
    for what, found, wanted in (("free disk", disk, DISK), ("memory", memory, MEMORY)):
        yield ("ok" if found >= wanted else "note", f"{found:.0f} GiB of {what}", "" if found >= wanted else f"the default study wants {wanted} GiB")


def _config(path: Path, study: list[Study]) -> Iterator[Finding]:
    try:
        study.append(Study.load(path))
    except StudyError as error:
        yield "FAIL", str(error), "run this from the project's folder, or name another with --config" if not path.is_file() else ""
        return
    yield "ok", f"{path}: study {study[0]['study']!r}, {len(study[0].runs)} runs in {study[0]['runs']}", ""


def _assets(studies: list[Study]) -> Iterator[Finding]:
    """Files that others publish."""
    for study in studies:
        if missing := _missing(study):
            yield (
                "FAIL",
                f"not there: {', '.join(missing)}",
                f"snakemake --cores 1 fetch --configfile {study.source} gets them, or says what to put where by hand",
            )
        elif "assets" in study.config:
            yield "ok", f"{', '.join(study['assets'])} are there", ""


def _missing(study: Study) -> dict[str, Path]:
    """Assets of the config that are not there, by name."""
    places = {name: Path(entry["path"]) for name, entry in study.config.get("assets", {}).items()}
    return {name: path for name, path in places.items() if not path.exists()}


def _awaited(study: Study, path: str) -> bool:
    """Whether an asset that is not there belongs in a place: a line of its own has said so."""
    return any(place.is_relative_to(path) for place in _missing(study).values())


def _weights(studies: list[Study]) -> Iterator[Finding]:
    for study in studies:
        path = study["unet"]["path"]
        if path is None:
            yield "ok", "none needed: the study trains its own U-Net", ""
            continue
        if _awaited(study, path):
            continue
        try:
            study.check_weights()
        except StudyError as error:
            yield "FAIL", str(error), ""
            continue
        yield from _checksum(Path(path))


def _checksum(path: Path) -> Iterator[Finding]:
    """Against the one in the model card, where there is a card."""
    from dag.weights import load_unet

    try:
        _, meta = load_unet(path)
    except (ValueError, OSError) as error:
        yield "FAIL", " ".join(str(error).split()), ""
        return
    card = path / "README.md"
    wanted = re.search(r"SHA-256 `([0-9a-f]{64})`", card.read_text(encoding="utf-8")) if card.is_file() else None
    if wanted and wanted[1] != meta["sha256"]:
        yield "FAIL", f"{path}: SHA-256 {meta['sha256'][:12]}..., its model card says {wanted[1][:12]}...", f"git checkout -- {path}"
    else:
        yield "ok", f"{path}: loads, predicts {meta['prediction_type']}" + (", checksum as in its model card" if wanted else ""), ""


def _data(studies: list[Study]) -> Iterator[Finding]:
    for study in studies:
        if study.drawn:
            yield "ok", f"the domain {study['domain']['name']!r} draws its own pictures", ""
        # Uses that share a folder are asked together.
        places: dict[tuple, list[str]] = {}
        for use, wanted in study.uses.items():
            places.setdefault((str(study.domain_of(use)), wanted.split or ""), []).append(use)
        for (_, split), uses in sorted(places.items()):
            domain = study.domain_of(uses[0])
            if DOMAINS[domain["name"]].drawn or _awaited(study, domain.get("root") or "."):
                continue
            where = f"domain {domain['name']!r}{f', split {split!r}' if split else ''}"
            try:
                yield _asked(study, domain, split, uses, where)
            except (ValueError, OSError) as error:
                yield "FAIL", f"{where}: {' '.join(str(error).split())}", "config/README.md says how a domain's files lie"


def _asked(study: Study, domain: dict, split: str, uses: list[str], where: str) -> Finding:
    """What some of the pictures that a study takes from one place say. Raises ValueError or OSError where they cannot be used."""
    source = dataset(domain, split or None)
    index = np.unique(np.concatenate([positions(study, use, len(source)) for use in uses]))
    some = index[np.unique(np.linspace(0, len(index) - 1, SOME).round().astype(int))]
    squares = source.squares(some, domain["size"])
    if squares.depth is not None:
        check_unit(study, uses[0], squares.depth if squares.valid is None else squares.depth[squares.valid])
    elif "estimator" not in study.config and set(uses) - {"unet"}:
        return "FAIL", f"{where}: its {len(source)} pictures have no depth", "docs/own-data.md says how to give them some"
    return "ok", f"{where}: {len(source)} pictures with{'' if squares.depth is not None else 'out'} depth, the {len(some)} asked read", ""
