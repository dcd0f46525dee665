"""Devices of jobs on one machine: each takes another, death gives it back, and a GPU that must be there is asked for."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dag import devices
from dag.__main__ import ON_DEVICE, main
from dag.devices import reserved

ROOT = Path(__file__).parent.parent
HOLD = """
import os, sys, time
from pathlib import Path
from dag.devices import reserved
with reserved("auto", Path(sys.argv[1]), int(sys.argv[2])) as device:
    print(device, os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    sys.stdin.read()
"""


def hold(folder: Path, visible: str, count: int = 1) -> subprocess.Popen:
    """A job that keeps its device until it is killed or its input ends."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(folder), str(count)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_each_job_has_a_device_of_its_own_until_it_ends_or_dies(tmp_path):
    first = hold(tmp_path, "4,7")
    assert first.stdout.readline().split() == ["4", "4"]
    second = hold(tmp_path, "4,7")
    assert second.stdout.readline().split() == ["7", "7"]
    third = hold(tmp_path, "4,7")
    assert "waiting for one of the devices 4, 7" in third.stderr.readline()
    second.send_signal(signal.SIGKILL)
    second.wait()
    assert third.stdout.readline().split() == ["7", "7"]
    for job in (first, third):
        job.communicate("")
        assert job.returncode == 0


@pytest.mark.parametrize(("visible", "kind", "device"), [("5", "auto", "5"), ("5", "gpu", "5"), ("", "auto", ""), ("5,6", "cpu", ""), (None, "auto", "")])
def test_what_was_given_is_taken(tmp_path, monkeypatch, visible, kind, device):
    monkeypatch.setattr(devices, "_of_this_machine", list)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False) if visible is None else monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with reserved(kind, tmp_path) as taken:
        assert taken == device == os.environ["CUDA_VISIBLE_DEVICES"]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
    assert not list(tmp_path.iterdir())  # no choice, no lock


def test_devices_of_the_machine_are_shared_out_where_nothing_is_given(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_of_this_machine", lambda: ["0", "1"])
    with reserved("gpu", tmp_path) as one, pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES")
        with reserved("gpu", tmp_path) as other:
            assert (one, other) == ("0", "1")


def test_parts_of_a_gpu_are_shared_out_too(tmp_path, monkeypatch):
    parts = ["MIG-GPU-1b2c/1/0", "MIG-GPU-1b2c/2/0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(parts))
    with reserved("gpu", tmp_path) as one:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(parts))
        with reserved("gpu", tmp_path) as other:
            assert [one, other] == parts


def test_several_devices_are_taken_together_or_not_at_all(tmp_path, monkeypatch):
    """Whoever waits for more than are free holds none meanwhile."""
    four = "0,1,2,3"
    one = hold(tmp_path, four, 2)
    assert one.stdout.readline().split() == ["0,1", "0,1"]
    waiting = hold(tmp_path, four, 3)
    assert "waiting for 3 of the devices 0, 1, 2, 3" in waiting.stderr.readline()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", four)
    with reserved("gpu", tmp_path, 2) as two:
        assert two == os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    one.communicate("")
    assert waiting.stdout.readline().split() == ["0,1,2", "0,1,2"]
    waiting.communicate("")


@pytest.mark.parametrize(("visible", "device"), [("3,4", "3,4"), ("5", "5"), ("", "")])
def test_as_many_devices_as_are_wanted_or_fewer_are_taken_as_they_are(tmp_path, monkeypatch, visible, device):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with reserved("auto", tmp_path, 2) as taken:
        assert taken == device
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("visible", "found"), [(None, "this machine has no NVIDIA device"), ("", "CUDA_VISIBLE_DEVICES is ''")])
def test_a_gpu_that_must_be_there_is_asked_for(tmp_path, monkeypatch, visible, found):
    monkeypatch.setattr(devices, "_of_this_machine", list)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False) if visible is None else monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=rf"compute\.device is 'gpu', but {found}; run on a node with a GPU"), reserved("gpu", tmp_path):
        pass


@pytest.mark.parametrize("whose", ["link", "another's"])
def test_locks_are_not_made_in_a_folder_of_somebody_else(tmp_path, monkeypatch, whose):
    """The name of the folder can be guessed: whoever makes it first could have files of this user opened through links in it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    folder = tmp_path / "locks"
    if whose == "link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(ValueError, match=r"locks: is a link or another user's, expected a folder of your own"), reserved("gpu", folder):
        pass
    assert not list(folder.iterdir())


def test_a_stage_without_its_gpu_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = tmp_path / "smoke.yaml"
    config.write_text((ROOT / "config" / "smoke.yaml").read_text() + "\ncompute:\n  device: gpu\n")
    assert main(["judge", "--config", str(config), "--data", "none.npz", "--out", str(tmp_path / "judge.safetensors")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dag judge: compute.device is 'gpu'")
    assert error.count("\n") == 1


def test_stages_on_a_device_are_those_whose_rules_ask_for_a_gpu():
    asking = set()
    for path in (ROOT / "workflow" / "rules").glob("*.smk"):
        for rule in re.split(r"^ *(?:use )?rule ", path.read_text(), flags=re.MULTILINE)[1:]:
            if re.search(r"^ +gpu=GPU( \* .*)?,$", rule, re.MULTILINE):
                asking |= set(re.findall(r'command=dag\("(\w+)"\)', rule))
    assert asking == ON_DEVICE
