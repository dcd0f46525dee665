"""Assets: what is missing says where to get it, what is there is checked, and fetch goes on where it broke off."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from dag.stages.assets import asset, fetch
from dag.stages.study import Study, StudyError

ROOT = Path(__file__).parent.parent
DATA = bytes(range(256)) * 40
DIGEST = hashlib.sha256(DATA).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Serves `files` by name, from the byte that Range asks for; cuts every first answer of a name in `cut` short."""

    files: dict[str, bytes] = {}
    cut: set[str] = set()
    asked: list[tuple[str, str | None]] = []

    def do_GET(self):
        name, first = self.path[1:], self.headers.get("Range")
        self.asked.append((name, first))
        start = int(first.removeprefix("bytes=").removesuffix("-")) if first else 0
        data = self.files.get(name)
        if data is None or start >= len(data):
            self.send_error(404 if data is None else 416)
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + 1000] if name in self.cut else data[start:])
        self.cut.discard(name)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    Server.files, Server.cut, Server.asked = {"model.pt": DATA}, set(), []
    with HTTPServer(("127.0.0.1", 0), Server) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Makes the smoke study with assets; keys of an entry are given without its path and licence."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def build(**assets) -> Study:
        config = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
        config["assets"] = {name: {"path": str(tmp_path / "assets" / name), "licence": "MIT", **entry} for name, entry in assets.items()}
        return Study(config, "smoke.yaml")

    return build


def test_fetch_brings_what_is_missing_and_goes_on_where_it_broke_off(study, server, tmp_path):
    s = study(model={"url": f"{server}/model.pt", "bytes": len(DATA), "sha256": DIGEST})
    Server.cut.add("model.pt")
    ended = (
        rf"^model: .*/model\.pt: the connection ended after 1000 of {len(DATA)} bytes; call again to go on; or put {server}/model\.pt at {tmp_path}/.*model$"
    )
    with pytest.raises(FileNotFoundError, match=ended):
        fetch(s, name="model")
    assert not (tmp_path / "assets" / "model").exists()
    fetch(s, name="model")
    assert (tmp_path / "assets" / "model").read_bytes() == DATA
    assert Server.asked == [("model.pt", None), ("model.pt", "bytes=1000-")]
    fetch(s, name="model")
    assert len(Server.asked) == 2
    assert [f.name for f in (tmp_path / "assets").iterdir()] == ["model"]
    asset(s, name="model", out=tmp_path / "model.json")
    found = json.loads((tmp_path / "model.json").read_text())
    assert (found["bytes"], found["sha256"], found["licence"]) == (len(DATA), DIGEST, "MIT")


def test_fetch_refuses_another_file_than_the_config_states(study, server, tmp_path):
    for stated, words in (({"sha256": "0" * 64}, f"SHA-256 is {DIGEST}, expected 000"), ({"bytes": 5}, f"{len(DATA)} bytes, expected 5")):
        with pytest.raises(FileNotFoundError, match=words):
            fetch(study(model={"url": f"{server}/model.pt", **stated}), name="model")
        assert not (tmp_path / "assets" / "model").exists()


def test_an_archive_becomes_its_folder(study, server, tmp_path):
    for name, inside in (("nested", "nested/"), ("bare", "")):
        archive = tmp_path / f"{name}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(f"{inside}data.mdb", "data")
            file.writestr(f"{inside}lock.mdb", "lock")
        Server.files[name] = archive.read_bytes()
    s = study(nested={"url": f"{server}/nested", "unpack": True}, bare={"url": f"{server}/bare", "unpack": True})
    for name in ("nested", "bare"):
        fetch(s, name=name)
        assert sorted(f.name for f in (tmp_path / "assets" / name).iterdir()) == ["data.mdb", "lock.mdb"]
    assert sorted(f.name for f in (tmp_path / "assets").iterdir()) == ["bare", "nested"]


def test_an_archive_does_not_write_outside_its_folder(study, server, tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
        file.writestr("../../outside", "x")
    Server.files["evil"] = (tmp_path / "evil.zip").read_bytes()
    Server.files["torn"] = Server.files["evil"][:30]
    with pytest.raises(FileNotFoundError, match=r"evil: .* holds '\.\./\.\./outside', which leads out of its folder"):
        fetch(study(evil={"url": f"{server}/evil", "unpack": True}), name="evil")
    with pytest.raises(FileNotFoundError, match=r"torn: .* not a whole zip file"):
        fetch(study(torn={"url": f"{server}/torn", "unpack": True}), name="torn")
    assert not list(tmp_path.rglob("outside"))


def test_a_hub_model_is_copied_into_its_place(study, tmp_path, monkeypatch):
    import dag.weights

    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "config.json").write_text("{}")
    monkeypatch.setattr(dag.weights, "from_hub", lambda name: tmp_path / "cache" if name == "google/ddpm-church-256" else None)
    fetch(study(church={"hub": "google/ddpm-church-256"}), name="church")
    assert (tmp_path / "assets" / "church" / "config.json").read_text() == "{}"


def test_what_is_missing_says_where_it_belongs_and_how_to_get_it(study, server, tmp_path):
    s = study(a={"url": f"{server}/none", "bytes": 7}, b={"by_hand": "Fill in the form at example.org", "sha256": DIGEST}, c={"hub": "google/ddpm-church-256"})
    place = tmp_path / "assets"
    cases = {
        "a": rf"^{place}/a: missing; `snakemake --cores 1 fetch` with .*; or put {server}/none at {place}/a \(bytes 7, licence MIT\)$",
        "b": rf"^{place}/b: missing; Fill in the form at example\.org; put it at {place}/b \(sha256 {DIGEST}, licence MIT\)$",
        "c": rf"^{place}/c: missing; .* or put the hub model google/ddpm-church-256 at {place}/c \(licence MIT\)$",
    }
    for name, words in cases.items():
        with pytest.raises(FileNotFoundError, match=words):
            asset(s, name=name, out=tmp_path / "out.json")
    for name, words in (("a", r"^a: HTTP Error 404"), ("b", rf"^b: Fill in the form at example\.org; put it at {place}/b ")):
        with pytest.raises(FileNotFoundError, match=words):
            fetch(s, name=name)
    for function in (lambda: fetch(s, name="d"), lambda: asset(s, name="d", out=tmp_path / "out.json")):
        with pytest.raises(ValueError, match=r"^name is 'd', expected one of the config's assets: a, b, c$"):
            function()
    assert not (tmp_path / "out.json").exists()


def test_another_file_in_its_place_is_refused(study, tmp_path):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "model").write_bytes(DATA[:-1])
    s = study(model={"url": "https://example.org/model.pt", "sha256": DIGEST})
    with pytest.raises(ValueError, match=rf"model: SHA-256 is \w{{64}}, expected {DIGEST}; remove it and fetch it again"):
        asset(s, name="model", out=tmp_path / "out.json")
    (tmp_path / "assets" / "model").write_bytes(b"")
    with pytest.raises(ValueError, match="model: empty, expected the asset"):
        asset(s, name="model", out=tmp_path / "out.json")


def test_an_asset_needs_a_source(study):
    with pytest.raises(StudyError, match=r"assets\.model"):
        study(model={})
