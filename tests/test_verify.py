"""What `dag verify` says of results that were tampered with. The records are those that the stages and the workflow write."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from dag.__main__ import main
from dag.stages.artefacts import content_hash, write_provenance
from dag.stages.study import Study

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "workflow" / "scripts"))
import manifest  # noqa: E402

HEADS, SAMPLES, TABLE, PRIOR = (f"results/smoke/{name}" for name in ("models/heads.safetensors", "samples/both.npz", "tables/table1.csv", "models/prior16"))


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """heads -> samples -> table, and a prior, which is a folder."""
    monkeypatch.chdir(ROOT)
    study = Study.load("config/smoke.yaml")
    monkeypatch.chdir(tmp_path)
    for name, inputs in ((HEADS, []), (f"{PRIOR}/unet/weights.bin", []), (SAMPLES, [HEADS, PRIOR]), (TABLE, [SAMPLES])):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(name.encode() * 10)
        study.inputs = [Path(path) for path in inputs]
        if name in (HEADS, SAMPLES):
            write_provenance(name, study, time.time())
        elif name.startswith(PRIOR):
            write_provenance(PRIOR, study, time.time())
    Path("results/smoke/manifest.json").write_text(json.dumps({"records": manifest.build([([TABLE], [SAMPLES]), (["results/smoke/none.csv"], [])])}))
    return Path("results/smoke")


def verify(capsys, folder="results/smoke") -> tuple[int, list[str], str]:
    status = main(["verify", str(folder)])
    said = capsys.readouterr()
    return status, said.out.splitlines(), said.err


def test_whole_results_are_whole(results, capsys):
    assert verify(capsys) == (0, ["results/smoke: 4 artefacts are whole"], "")


def test_a_copy_elsewhere_is_verified_where_it_lies(results, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    assert verify(capsys, results if results.is_absolute() else tmp_path / results)[0] == 0


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda: Path(TABLE).unlink(), [f"missing: {TABLE}: 310 bytes are recorded"]),
        (lambda: Path(TABLE).write_bytes(b"short"), [f"truncated: {TABLE}: 5 bytes, 310 are recorded"]),
        (lambda: flip(Path(TABLE)), [f"altered: {TABLE}: its SHA-256 is "]),
        (lambda: flip(Path(SAMPLES)), [f"altered: {SAMPLES}: its SHA", f"stale: {TABLE}: {SAMPLES} changed since it was made"]),
        (lambda: flip(Path(PRIOR, "unet/weights.bin")), [f"altered: {PRIOR}: its SHA", f"stale: {SAMPLES}: {PRIOR} changed since"]),
        (lambda: Path("results/smoke/samples/both.json").write_text("{"), ["truncated: results/smoke/samples/both.json: not readable as JSON"]),
    ],
)
def test_what_is_wrong_is_named(results, capsys, damage, expected):
    damage()
    status, lines, error = verify(capsys)
    assert status == 2
    assert len(lines) == len(expected) + 1
    for line in expected:
        assert any(found.startswith(line) for found in lines), lines
    assert error == f"dag verify: results/smoke: {len(expected)} artefacts are not what their records say\n"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


def test_published_results_without_intermediates_are_whole(results, capsys):
    for path in (HEADS, SAMPLES):
        Path(path).unlink()
        Path(path).with_suffix(".json").unlink()
    status, lines, _ = verify(capsys)
    assert (status, lines) == (0, ["results/smoke: 2 artefacts are whole; 1 inputs are not here and were not compared"])


def test_a_folder_without_records_is_not_taken_for_whole(tmp_path, capsys):
    status, _, error = verify(capsys, tmp_path)
    assert (status, error) == (2, f"dag verify: {tmp_path}: no provenance (*.json) that names outputs; a study writes it\n")
    assert "no such folder" in verify(capsys, tmp_path / "none")[2]


def test_a_folder_is_known_by_names_and_contents(tmp_path):
    hashes = []
    for name, text in (("a", "x"), ("a", "y"), ("b", "x"), ("a", "x")):
        folder = tmp_path / str(len(hashes))
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / name).write_text(text)
        hashes.append(content_hash(folder))
    (tmp_path / "3" / ".snakemake_timestamp").touch()  # which Snakemake writes once the stage is done
    hashes[3] = content_hash(tmp_path / "3")
    assert hashes[0] == hashes[3]
    assert len(set(hashes)) == 3
