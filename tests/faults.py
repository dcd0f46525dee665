"""What clusters do to jobs, done to training and sampling at random moments: `python tests/faults.py --trials 50`.

Each trial starts a job, disturbs it, and starts it again until it is done, as a queue would. Its results must then be those of an undisturbed
job to the last bit, or the job must have refused to go on in one line that names the file. Prints a table; the status is 1 if any trial
ends otherwise. Jobs are forked from this process, which has loaded the libraries, so that a trial takes seconds; those on Slurm (where
`tests/slurm/cluster.sh up` has started one) are real submissions.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml

import dag.stages.models
import dag.stages.sampling  # noqa: F401 loaded here, once, for all jobs
from dag.__main__ import main as dag_command
from dag.diffusion import Diffusion
from dag.heads import build_heads
from dag.stages.artefacts import content_hash
from dag.stages.study import Study
from dag.unet import feature_shapes
from dag.weights import load_unet, save_module, save_unet

ROOT = Path(__file__).parent.parent
HEADER = ["run", "sampler", "steps", "eta", "w_dc", "w_dp", "rule", "tau", "prior", "heads", "window", "control", "n", "first_seed", "tables"]
ROWS = [
    ["baseline", "ddim", "4", "0", "0", "0", "score", "300", "8", "guide", "0-999", "none", "16", "0", "table1"],
    ["both", "ddpm", "4", "0", "30", "30", "score", "300", "8", "guide", "0-999", "none", "16", "0", "table1"],
]


class Job:
    """A stage that can be started again and again, and the files that it must end with."""

    def __init__(self, name: str, out: str, arguments: list[str], results: list[str]):
        self.name, self.arguments, self.results = name, [*arguments, "--config", "study.yaml", "--out", out], results

    def start(self, folder: Path) -> int:
        """The id of a process that runs the stage in a folder."""
        pid = os.fork()
        if pid:
            return pid
        status = 70
        with contextlib.suppress(BaseException), open(folder.parent / "stderr", "w") as log:
            os.chdir(folder)
            os.dup2(log.fileno(), 2)
            status = dag_command([self.name, *self.arguments])
        os._exit(status)

    def run(self, folder: Path) -> tuple[int, str]:
        """Exit status and last line on stderr."""
        return wait(self.start(folder)), said(folder)

    def hashes(self, folder: Path) -> dict[str, str]:
        return {name: content_hash(folder / name) for name in self.results if (folder / name).exists()}


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def said(folder: Path) -> str:
    return ((folder.parent / "stderr").read_text().splitlines() or [""])[-1]


def prepare(folder: Path) -> None:
    """A study of tiny networks with random weights: its config, run sheet, data and models."""
    config = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    config |= {"runs": "runs.tsv", "study": "faults", "downstream": {**config["downstream"], "sources": {"dag": "both"}}}
    del config["gain"]
    config["figures"] |= {"unguided": "baseline", "guided": "both", "runs": ["baseline", "both"]}
    config["sampling"]["batch_size"] = 2
    config["judge"]["training"] = {"steps": 60, "batch_size": 4, "save_every": 4}
    (folder / "study.yaml").write_text(yaml.safe_dump(config))
    (folder / "runs.tsv").write_text("\n".join("\t".join(row) for row in [HEADER, *ROWS]) + "\n")
    with contextlib.chdir(folder):
        study = Study.load("study.yaml")
        torch.manual_seed(0)
        from diffusers.models.unets.unet_2d import UNet2DModel

        save_unet(UNet2DModel(sample_size=16, **study["unet"]["architecture"]), Path("unet"), prediction_type="v_prediction", diffusion=Diffusion())
        prior = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **study["prior"]["architecture"])
        save_unet(prior, Path("prior"), prediction_type="v_prediction", diffusion=Diffusion())
        channels = {block: shape[0] for block, shape in feature_shapes(load_unet("unet")[0], 16).items()}
        blocks = {"strong": study["heads"]["strong"], "weak": study["heads"]["weak"]}
        used = {block: channels[block] for block in sorted({*blocks["strong"], *blocks["weak"]})}
        sizes = {"width": 4, "layers": 1, "time_width": 4}
        save_module(build_heads(blocks, used, **sizes), {"blocks": blocks, "channels": used, "sizes": sizes}, Path("heads.safetensors"))
        numbers = np.random.default_rng(0)
        np.savez("data.npz", images=numbers.integers(0, 255, (64, 16, 16, 3), np.uint8), depth=numbers.uniform(1, 9, (64, 16, 16)).astype(np.float32))


JOBS = {
    "training": Job("judge", "out/judge.safetensors", ["--data", "data.npz"], ["out/judge.safetensors"]),
    "sampling": Job("sample", "out/both.npz", ["--run", "both", "--unet", "unet", "--heads", "heads.safetensors", "--prior", "prior"], ["out/both.npz"]),
}


class Trial:
    """One job in a folder of its own, and a clock to disturb it by."""

    def __init__(self, job: Job, folder: Path, seconds: float, chance: random.Random):
        self.job, self.folder, self.seconds, self.chance = job, folder, seconds, chance

    def disturb(self, number: int) -> int:
        """Start the job, send it a signal at a random moment, and wait for its end."""
        pid = self.job.start(self.folder)
        time.sleep(self.chance.uniform(0.02, self.seconds))
        os.kill(pid, number)
        return wait(pid)

    def finish(self) -> tuple[int, str]:
        return self.job.run(self.folder)


def killed(trial: Trial) -> None:
    for _ in range(trial.chance.randint(1, 3)):
        trial.disturb(signal.SIGKILL)


def asked_to_stop(number: signal.Signals):
    def fault(trial: Trial) -> None:
        status = trial.disturb(number)
        # 128 + signal: it saved and left; minus signal: it had not begun; 0: it was done already.
        if status not in (0, 128 + number, -number):
            raise AssertionError(f"{number.name} ended it with status {status}: {said(trial.folder)}")

    return fault


def torn(trial: Trial) -> str:
    """Killed, and its newest state or batch cut short, as a crash of the machine leaves it."""
    trial.disturb(signal.SIGKILL)
    states = [*trial.folder.glob("out/*.state.pt"), *trial.folder.glob("out/.*/*.npz"), *trial.folder.glob("out/*.npz")]
    before = ""
    if states:
        newest = max(states, key=lambda path: path.stat().st_mtime_ns)
        whole = newest.read_bytes()
        newest.write_bytes(whole[: int(trial.chance.random() * len(whole))])
        # A training's first and last states have no whole one before them to go on from: it says which file to remove.
        if newest.suffix == ".pt" and (end := trial.finish())[0]:
            before = refused(*end, newest.name)
            newest.unlink()
    return before


@contextlib.contextmanager
def small_disk(trial: Trial, options: str):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", trial.folder / "out"], check=True)
    try:
        yield
        if leftovers := [path.name for path in (trial.folder / "out").rglob("*") if ".part." in path.name or path.suffix == ".tmp"]:
            raise AssertionError(f"half-written files stay: {leftovers}")
    finally:
        # What is there is kept for the next try, on a disk with room.
        shutil.copytree(trial.folder / "out", trial.folder / "kept")
        subprocess.run(["umount", trial.folder / "out"], check=True)
        shutil.rmtree(trial.folder / "out")
        (trial.folder / "kept").rename(trial.folder / "out")


def refused(status: int, line: str, *words: str) -> str:
    if status != 2 or not line.startswith("dag ") or not any(word in line for word in words):
        raise AssertionError(f"status {status}, expected a refusal in one line: {line}")
    return "refused, then "


def full(trial: Trial) -> str:
    """The disk has less room than the job needs."""
    with small_disk(trial, f"size={trial.chance.randrange(8, 40) * 4}k"):
        status, line = trial.finish()
    if status and "out/" not in line:
        raise AssertionError(f"the line names no file: {line}")
    return refused(status, line, "space", "written") if status else ""


def read_only(trial: Trial) -> str:
    with small_disk(trial, "size=64m"):
        trial.disturb(signal.SIGKILL)
        subprocess.run(["mount", "-o", "remount,ro", trial.folder / "out"], check=True)
        status, line = trial.finish()
        subprocess.run(["mount", "-o", "remount,rw", trial.folder / "out"], check=True)
        for path in (trial.folder / "out").rglob("*.part.*"):
            path.unlink()  # of the kill
        for path in (trial.folder / "out").rglob("*.tmp"):
            path.unlink()
    return refused(status, line, "Read-only") if status else ""  # 0: all was written before the kill


def other_config(trial: Trial) -> str:
    """Killed, and started with another config: what it saved is not taken, nor does it spoil the job that it belongs to."""
    trial.disturb(signal.SIGKILL)
    config = (trial.folder / "study.yaml").read_text()
    changed = config.replace("near: 0.5", "near: 0.6").replace("clip: true", "clip: false")
    (trial.folder / "study.yaml").write_text(changed)
    status, line = trial.finish()
    if status:
        raise AssertionError(f"status {status}: {line}")
    found = trial.job.hashes(trial.folder)
    (trial.folder / "study.yaml").write_text(config)
    if found == trial.undisturbed:
        raise AssertionError("another config gave the same results")
    return "drawn or trained again, then "


def on_slurm(interrupt):
    """Submitted to Slurm, interrupted there, and, where that ended it, submitted again."""

    def fault(trial: Trial) -> None:
        def submit() -> str:
            command = [sys.executable, "-m", "dag", trial.job.name, *trial.job.arguments]
            script = f"#!/bin/bash\nexec {' '.join(command)}\n"
            options = ["--parsable", "--requeue", "--mem=1500", "--output=/dev/null", f"--error={trial.folder.parent}/stderr", f"--chdir={trial.folder}"]
            return subprocess.run(["sbatch", *options], input=script, capture_output=True, text=True, check=True).stdout.strip()

        job = submit()
        until(lambda: state(job) == "RUNNING", 60, f"Slurm job {job} to run")
        time.sleep(trial.chance.uniform(0, trial.seconds + 4))
        interrupt(job)
        until(lambda: state(job) not in ("RUNNING", "PENDING", "COMPLETING", "CONFIGURING"), 300, f"Slurm job {job} to end")

    return fault


def state(job: str) -> str:
    return subprocess.run(["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"], capture_output=True, text=True).stdout.strip()


def until(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s for {what}")
        time.sleep(0.2)


def cancel(job: str) -> None:
    subprocess.run(["scancel", job], check=True)


def requeue(job: str) -> None:
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode == 0:  # else it was done already
        until(lambda: state(job) == "PENDING", 60, f"Slurm job {job} to be queued again")
        subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], check=True)


def faults() -> dict:
    """Faults by name; those that this machine can do."""
    found = {
        "kill -9": killed,
        "SIGTERM": asked_to_stop(signal.SIGTERM),
        "truncated state": torn,
        "SIGUSR1": asked_to_stop(signal.SIGUSR1),
        "other config": other_config,
    }
    if os.getuid() == 0 and sys.platform == "linux":
        found |= {"full disk": full, "read-only folder": read_only}
    if shutil.which("scontrol") and subprocess.run(["scontrol", "ping"], capture_output=True, timeout=30).returncode == 0:
        found |= {"scancel": on_slurm(cancel), "requeue": on_slurm(requeue)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-slurm", action="store_true", help="leave out scancel and requeue")
    options = parser.parse_args()
    kinds = {name: fault for name, fault in faults().items() if not (options.without_slurm and name in ("scancel", "requeue"))}
    table, wrong = collections.Counter(), []
    with tempfile.TemporaryDirectory() as place:
        study = Path(place, "study")
        study.mkdir()
        made = os.fork()  # torch computes in forked processes alone: its threads do not survive a fork
        if not made:
            prepare(study)
            os._exit(0)
        if wait(made):
            return 1
        whole = {}
        for name, job in JOBS.items():
            folder = shutil.copytree(study, Path(place, name, "work"))
            (folder / "out").mkdir()
            start = time.monotonic()
            status, line = job.run(folder)
            if status:
                sys.stderr.write(f"faults.py: undisturbed {name} failed: {line}\n")
                return 1
            whole[name] = (time.monotonic() - start, job.hashes(folder))
        for number in range(options.trials):
            name, work = list(kinds)[number % len(kinds)], list(JOBS)[number // len(kinds) % 2 if options.trials > len(kinds) else number % 2]
            folder = shutil.copytree(study, Path(place, f"trial{number}", "work"))
            (folder / "out").mkdir()
            trial = Trial(JOBS[work], folder, whole[work][0], random.Random(options.seed * 1000 + number))
            trial.undisturbed = whole[work][1]
            outcome = attempt(trial, kinds[name])
            table[work, name, outcome] += 1
            sys.stderr.write(f"{number + 1} of {options.trials}: {name} in {work}: {outcome}\n")
            if not outcome.endswith("same bits"):
                wrong.append(f"trial {number}, {name} in {work}: {outcome}")
            shutil.rmtree(folder.parent)
    lines = ["| job | fault | outcome | trials |", "|---|---|---|---:|"]
    lines += [f"| {work} | {name} | {outcome} | {count} |" for (work, name, outcome), count in sorted(table.items())]
    lines += ["", f"{options.trials - len(wrong)} of {options.trials} trials ended with the bits of an undisturbed job."]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stderr.writelines(f"faults.py: {line}\n" for line in wrong)
    return 1 if wrong else 0


def attempt(trial: Trial, fault) -> str:
    """Disturb a job, finish it, and say how it ended."""
    try:
        before = fault(trial) or ""
        status, line = trial.finish()
    except AssertionError as error:
        return str(error)
    if status:
        return f"status {status}: {line}"
    if trial.job.hashes(trial.folder) != trial.undisturbed:
        return "WRONG BITS"
    return f"{before}same bits"


if __name__ == "__main__":
    sys.exit(main())
