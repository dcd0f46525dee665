"""The examples run outside the checkout, on the shipped model, and do what they say."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import dag.networks
from dag import Recipe
from dag.data.rooms import render

ROOT = Path(__file__).parent.parent


def run(monkeypatch, name: str, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


@pytest.fixture(scope="module")
def guided(tmp_path_factory) -> Path:
    """What examples/guide_your_own.py makes, in a folder of its own."""
    folder = tmp_path_factory.mktemp("outside")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(patch, "guide_your_own.py", str(ROOT / "models" / "rooms32"))
    return folder / "guided"


def test_guide_your_own(guided):
    """Image and depth of eight seeds, unguided and guided; the guided ones are other pictures of the same rooms."""
    picture = matplotlib.image.imread(guided / "guided.png")[::3, ::3, :3]
    assert picture.shape == (4 * 32, 8 * 32, 3)
    images, depths, guided_images, _ = np.split(picture, 4)
    change = np.abs(images - guided_images).mean()
    assert 0.001 < change < 0.5 * np.abs(images - np.roll(images, 32, 1)).mean()
    assert depths.std() > 0.02  # the heads have learnt something that is no constant
    assert (guided / "heads" / "config.json").is_file()


def test_floor_plane(guided, monkeypatch, capsys):
    run(monkeypatch, "floor_plane.py", str(guided))
    unguided, with_term = map(float, re.findall(r"guided: ([0-9.]+) of the mean", capsys.readouterr().out))
    assert with_term < 0.95 * unguided


def test_the_readmes_example(monkeypatch):
    """The text as it stands, given what it calls images and depth; its trainings are two steps long."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(code.splitlines()) <= 20
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(dag.networks, "Recipe", lambda **given: Recipe(**{**given, "steps": 2}))
    images, depth, _ = render(range(1_000_000, 1_000_020), 32)
    names = {"images": images, "depth": depth}
    exec(compile(code, "README.md", "exec"), names)
    assert [picture.size for picture in names["pictures"]] == [(32, 32)] * 4
