"""A release: one version, the same checks everywhere, every package in the wheel, and a wheel that works by itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import dag

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "dag.__version__"}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == dag.__version__
    released = re.findall(r"^## (\d[\w.]*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert not released or released[0] == dag.__version__


def test_every_package_is_released():
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "dag").rglob("*.py")}
    assert found | {"dag.schemas"} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_hosted_checks_are_the_local_ones():
    """The hosted workflow sets up Python and runs .ci/run: it has no check of its own and leaves none out."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert workflow["permissions"] == {"contents": "read"}
    python = next(step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert tuple(map(int, python.split("."))) >= (3, 11)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_catalog_can_read_its_entry():
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert set(usage) == {"mandatory-flags", "software-stack-deployment", "report"}
    assert usage["report"] is True


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Wheel and source distribution, built from a copy of what git would hand out."""
    folder = tmp_path_factory.mktemp("release")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        source = ROOT / name
        if source.is_file() and not source.is_symlink() and not name.startswith("results/"):
            (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "src" / name).write_bytes(source.read_bytes())
    build = "from setuptools import build_meta as b; b.build_wheel('../dist'); b.build_sdist('../dist')"
    done = subprocess.run([sys.executable, "-c", f"import os; os.makedirs('../dist'); {build}"], cwd=folder / "src", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "dist"


@pytest.mark.slow
def test_wheel_and_source_hold_what_they_should(built):
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert dag.__version__ in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {"dag/pipeline.py", "dag/stages/study.py", "dag/schemas/config.schema.yaml"} <= set(names)
    assert not [name for name in names if not name.startswith(("dag/", f"dag_depth_guidance-{dag.__version__}.dist-info/"))]
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Snakefile", "config/rooms.yaml", "workflow/rules/report.smk", "examples/guide_your_own.py", "tests/test_release.py"} <= held


@pytest.mark.slow
def test_the_installed_wheel_guides(built, tmp_path):
    """In an environment of its own, outside the checkout: the command, a config, the first example. Its libraries are this environment's."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True)
    # Appended, so that the wheel comes first; path files in there, such as an editable install's, are not followed.
    (site / "libraries.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")) + "\n")
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert Path(run(str(python), "-c", "import dag; print(dag.__file__)").strip()).is_relative_to(site)
    assert run(str(tmp_path / "env" / "bin" / "dag"), "--version") == f"dag {dag.__version__}\n"
    (tmp_path / "config").symlink_to(ROOT / "config")
    data = ["prepare", "--config", "config/smoke.yaml", "--use", "labels", "--out", "labels.npz"]
    run(str(tmp_path / "env" / "bin" / "dag"), *data)
    run(str(python), str(ROOT / "examples" / "guide_your_own.py"), str(ROOT / "models" / "rooms32"))
    assert (tmp_path / "guided" / "guided.png").stat().st_size > 0
