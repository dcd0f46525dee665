"""Stages asset and fetch: the files that others publish (checkpoints, datasets), where they belong, and whether they are the right ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from dag.stages.artefacts import writing
from dag.stages.study import Study

_CHUNK = 1 << 20


def asset(study: Study, *, name: str, out: Path) -> None:
    """Check one of the config's `assets` and write down what it is: path, bytes and, of a file, SHA-256.

    Raises FileNotFoundError that says where to get what is missing, ValueError for a file of another size or hash than the config states.
    """
    entry = _entry(study, name)
    path = Path(entry["path"])
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing; {how_to_get(study, name)}")
    facts = check(path, entry)
    with writing(out) as aside:
        aside.write_text(json.dumps({"asset": name, **facts, "licence": entry["licence"]}, indent=1) + "\n")


def fetch(study: Study, *, name: str) -> None:
    """Download one of the config's `assets` into its place, unless it is there, and check it.

    What a broken download has brought stays and is gone on from. Raises FileNotFoundError for one that has to be put there by hand or could not
    be had, ValueError for one of another size or hash than the config states.
    """
    entry = _entry(study, name)
    path = Path(entry["path"])
    if not path.exists():
        try:
            _fetch(entry, path)
        except (OSError, ValueError) as error:
            how = how_to_get(study, name) if "by_hand" in entry else f"{error}; or put {_source(entry)} at {path}"
            raise FileNotFoundError(f"{name}: {how}") from None
    check(path, entry)


def _entry(study: Study, name: str) -> dict:
    assets = study.config.get("assets", {})
    if name not in assets:
        raise ValueError(f"name is {name!r}, expected one of the config's assets: {', '.join(assets) or 'it has none'}")
    return assets[name]


def how_to_get(study: Study, name: str) -> str:
    """A sentence: the command that fetches an asset, or the place to put it by hand."""
    entry = study["assets"][name]
    facts = ", ".join(f"{key} {entry[key]}" for key in ("bytes", "sha256", "licence") if key in entry)
    if "by_hand" in entry:
        return f"{entry['by_hand']}; put it at {entry['path']} ({facts})"
    return f"`snakemake --cores 1 fetch` with this study's config fetches it; or put {_source(entry)} at {entry['path']} ({facts})"


def _source(entry: dict) -> str:
    return entry.get("url") or f"the hub model {entry['hub']}"


def check(path: Path, entry: dict) -> dict:
    """{path, bytes, sha256} of an asset that is there; of a folder without sha256. Raises ValueError where it differs from its entry."""
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    size = sum(f.stat().st_size for f in files)
    if not size:
        raise ValueError(f"{path}: empty, expected the asset")
    if entry.get("bytes", size) != size:
        raise ValueError(f"{path}: {size} bytes, expected {entry['bytes']}; remove it and fetch it again")
    facts = {"path": str(path), "bytes": size}
    if path.is_file():
        with open(path, "rb") as file:
            facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        if entry.get("sha256", facts["sha256"]) != facts["sha256"]:
            raise ValueError(f"{path}: SHA-256 is {facts['sha256']}, expected {entry['sha256']}; remove it and fetch it again")
    return facts


def _fetch(entry: dict, path: Path) -> None:
    if "hub" in entry:
        from dag.weights import from_hub

        aside = path.with_name(f".{path.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(from_hub(entry["hub"]), aside)
        os.replace(aside, path)
        return
    if "url" not in entry:
        raise ValueError("has to be put there by hand")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    _download(entry["url"], part)
    if not entry.get("unpack"):
        check(part, entry)
        os.replace(part, path)
        return
    aside = path.with_name(f".{path.name}.unpacked")
    shutil.rmtree(aside, ignore_errors=True)
    unpack(part, aside)
    # An archive holds the folder itself, or what is in it.
    os.replace(aside / path.name if (aside / path.name).is_dir() else aside, path)
    shutil.rmtree(aside, ignore_errors=True)
    part.unlink()


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip file into a new folder. Raises ValueError for what is no whole zip file, or has a name that leads out of the folder."""
    try:
        with zipfile.ZipFile(archive) as file:
            for name in file.namelist():
                if not (folder / name).resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"{archive}: holds {name!r}, which leads out of its folder")
            file.extractall(folder)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive}: not a whole zip file ({error}); remove it and fetch it again") from None


def _download(url: str, part: Path) -> None:
    """Bring `part` up to the whole of `url`, from where it ends."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing after what is there
            return
        raise
    with response:
        partial = response.status == 206
        total = int(response.headers.get("Content-Length") or 0) + have * partial
        with open(part, "ab" if partial else "wb") as file:
            for chunk in _chunks(response, have * partial, total, part.stem):
                file.write(chunk)
    if total and part.stat().st_size != total:
        raise OSError(f"{url}: the connection ended after {part.stat().st_size} of {total} bytes; call again to go on")


def _chunks(response, done: int, total: int, name: str) -> Iterator[bytes]:
    with tqdm(initial=done, total=total or None, desc=name, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), mininterval=1) as bar:
        while chunk := response.read(_CHUNK):
            yield chunk
            bar.update(len(chunk))
