"""What is paid for working in parts: the plan of 2,000 jobs, shards side by side, saved states.

python benchmarks/cluster.py [--parts planning shards saving] [--write docs/scaling.md]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pandas as pd
import torch
import yaml
from guided_step import Claim, machine
from steps import BLOCKS, DIFFUSION, ROOT, STUDY, domain

from dag import training
from dag.data.rooms import render
from dag.stages import models, pretraining
from dag.stages.study import Study
from dag.training import Recipe
from dag.weights import save_module, save_unet

ROOMS = ROOT / "config" / "rooms.yaml"
SHARD, ROUNDS = 64, 3
# Trainings of the default study by the config's section, steps between two states and their number: enough to time both.
TRAININGS = {"unet": (5, 4), "prior": (10, 5), "judge": (10, 5), "heads": (20, 5)}


def planning(folder: Path) -> tuple[list[str], list[Claim]]:
    """Dry runs of the default study with 2,000 sampling jobs: as shards of 50 runs, and as runs of one job each."""
    sheet = pd.read_csv(ROOT / STUDY["runs"], sep="\t", dtype=str)
    batch, lines, claims = (
        STUDY["sampling"]["batch_size"],
        ["| 2,000 sampling jobs | wall s | CPU s | peak memory, MiB | jobs in all |", "|---|---|---|---|---|"],
        [],
    )
    for name, runs, shards in (("50 runs of 40 shards", 50, 40), ("2,000 runs", 2000, 1)):
        more = pd.concat([sheet.iloc[:1].assign(run=f"more{i}", tables="", n=str(shards * batch)) for i in range(runs - len(sheet))])
        sheet_file, config = folder / f"{runs}.tsv", folder / f"{runs}.yaml"
        # Of one length, each to its own seeds: those of the sweep stay apart from the others.
        first = sheet.first_seed.where(sheet.first_seed.astype(int) == 0, str(10**6))
        pd.concat([sheet.assign(n=str(shards * batch), first_seed=first), more]).to_csv(sheet_file, sep="\t", index=False)
        config.write_text(yaml.safe_dump({**STUDY, "study": "planned", "runs": str(sheet_file), "compute": {"shard_size": batch}}))
        wall, cpu, memory, jobs = min(_plan(config) for _ in range(ROUNDS))
        if jobs.get("sample", 0) + jobs.get("sample_shard", 0) != runs * shards:
            raise ValueError(f"the plan of {name} has the jobs {jobs}")
        lines.append(f"| {name} | {wall:.1f} | {cpu:.1f} | {memory:.0f} | {jobs['total']:,} |")
        if shards > 1:
            claims += [Claim("plan of 2,000 sampling jobs: seconds", wall, 6, True, 1), Claim("plan of 2,000 sampling jobs: GiB", memory / 1024, 1, True)]
    said = f"`snakemake -n`, the quickest of {ROUNDS}. A run has a job that describes it, too: of 2,000 runs the plan is twice as large."
    return ["## The plan", "", said, "", *lines, ""], claims


# A process's `ru_maxrss` starts at what the one that forked it held: a small process starts the measured one.
_MEASURED = """import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, done.returncode, done.stdout]))
"""


def _plan(config: Path) -> tuple[float, float, float, dict[str, int]]:
    """Seconds, CPU seconds and MiB of a dry run, and its jobs by rule."""
    command = [sys.executable, "-c", _MEASURED, sys.executable, "-m", "snakemake", "-n", "--configfile", config]
    *used, status, said = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    if status:
        raise ValueError(f"snakemake -n of {config} failed: {said[-2000:]}")
    rows = said.partition("Job stats:\n")[2].partition("\n\n")[0].splitlines()[2:]
    return *used, {rule: int(count) for rule, count in map(str.split, rows)}


def shards(folder: Path) -> tuple[list[str], list[Claim]]:
    """Guided sampling of the default study by `dag sample`, start-up included: one shard by itself, and two at the same time."""
    d = domain("rooms")
    save_unet(d.unet, folder / "unet", prediction_type=d.kind, diffusion=DIFFUSION)
    save_unet(d.prior, folder / "prior", prediction_type="v_prediction", diffusion=DIFFUSION)
    sizes, channels = {key: STUDY["heads"][key] for key in ("width", "layers", "time_width")}, d.heads["strong"].channels
    save_module(d.heads, {"blocks": BLOCKS, "channels": channels, "sizes": sizes}, folder / "heads.safetensors")
    (folder / "scale.json").write_text(json.dumps({"dcg+dpg": {"w_dc": 100, "w_dp": 100}}))
    alone, both = [], []
    for number in range(ROUNDS):  # in turn, so that what else the machine does meets both alike
        alone.append(_drawn(folder, f"{number}alone", 1))
        both.append(_drawn(folder, f"{number}both", 2))
    one, two = SHARD / statistics.median(alone), 2 * SHARD / statistics.median(both)
    lines = ["## Shards", "", f"{SHARD} guided rooms to a shard, one thread each, start-up included; medians of {ROUNDS}.", ""]
    lines += ["| shards at once | images / s |", "|---|---|", f"| one | {one:.2f} |", f"| two | {two:.2f} |", ""]
    return lines, [Claim("throughput of two shards / one", two / one, 1.7, False)]


def _drawn(folder: Path, name: str, count: int) -> float:
    """Seconds until so many shards, started together, are all there."""
    command = [sys.executable, "-m", "dag", "sample", "--config", ROOMS, "--threads", "1", "--run", "both", "--scale", folder / "scale.json"]
    command += ["--unet", folder / "unet", "--heads", folder / "heads.safetensors", "--prior", folder / "prior"]
    start = time.perf_counter()
    jobs = [
        subprocess.Popen([*command, "--first", str(i * SHARD), "--stop", str((i + 1) * SHARD), "--out", folder / name / f"{i}.npz"], cwd=ROOT)
        for i in range(count)
    ]
    if max(job.wait() for job in jobs):
        raise ValueError(f"{' '.join(map(str, command))} failed")
    return time.perf_counter() - start


def saving(folder: Path) -> tuple[list[str], list[Claim]]:
    """The default study's trainings, begun: seconds of a step and of a saved state, as they add up in a whole training."""
    lines = ["## Saved states", "", "| training | step, ms | state, ms | steps | states | share of the training's time, % |", "|---|---|---|---|---|---|"]
    claims = []
    for name, (every, count) in TRAININGS.items():
        step, state = _begun(name, folder, every, count)
        recipe = Recipe(**STUDY[name]["training"])
        states = math.ceil(recipe.steps / recipe.save_every)
        share = 100 * states * state / (recipe.steps * step + states * state)
        lines.append(f"| {name} | {1e3 * step:.1f} | {1e3 * state:.1f} | {recipe.steps} | {states} | {share:.2f} |")
        claims.append(Claim(f"saving in the training of {name}, % of its time", share, 2, True))
    return [*lines, "", "One process, one thread.", ""], claims


def _begun(name: str, folder: Path, every: int, count: int) -> tuple[float, float]:
    """Seconds of a step and of a state in a training that saves `count` times, every so many steps."""
    study, saves, save = Study(yaml.safe_load(ROOMS.read_text()), str(ROOMS)), [], training._save
    study[name]["training"] |= {"steps": every * count, "save_every": every, "processes": 1}

    def timed(*arguments) -> None:
        start = time.perf_counter()
        save(*arguments)
        saves.append((start, time.perf_counter()))

    stage = _stage(name, study, folder)
    training._save = timed
    try:
        stage(folder / f"{name}-trained")
    finally:
        training._save = save
    # The first steps warm up; the first state has none before it to keep, the last one keeps none.
    between = [later[0] - earlier[1] for earlier, later in zip(saves, saves[1:], strict=False)]
    return statistics.median(between) / every, statistics.median(end - start for start, end in saves[1:-1])


def _stage(name: str, study: Study, folder: Path) -> Callable[[Path], None]:
    """The stage of a training, with the files that it reads made before."""
    images, depth, _ = render(np.arange(128), study["domain"]["size"])
    data = folder / "data.npz"
    np.savez(data, images=images, depth=depth, ids=np.arange(len(images)))
    if name == "unet":
        return lambda out: pretraining.pretrain(study, out=out)
    if name == "prior":
        return lambda out: models.prior(study, resolution=max(study["prior"]["resolutions"]), data=data, out=out)
    if name == "judge":
        return lambda out: models.judge(study, data=data, out=out.with_suffix(".safetensors"))
    files = {"features": folder / "features.npy", "validation_features": folder / "validation.npy"}
    for (key, file), levels in zip(files.items(), ("8", "validation"), strict=True):
        models.features(study, unet=Path(study["unet"]["path"]), data=data, levels=levels, blocks="heads", out=file, count=128 if key == "features" else 8)
    return lambda out: models.heads(
        study, kind="pair", data=data, validation=data, out=out.with_suffix(".safetensors"), metrics=out.with_suffix(".csv"), **files
    )


PARTS = {"planning": planning, "shards": shards, "saving": saving}


def cpu_seconds() -> tuple[float, float]:
    """What all processes of the machine have used, and what this one and those that it waited for have."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return (user + nice + system) / os.sysconf("SC_CLK_TCK"), sum(used.ru_utime + used.ru_stime for used in own)


def report(lines: list[str], claims: list[Claim], beside: float) -> str:
    head = f"""# Working in parts: what it costs

Written by `python benchmarks/cluster.py --write docs/scaling.md`, all in one run, on this machine: {machine()}. Other processes
used {100 * beside:.0f} % of a CPU meanwhile. All of the default study, `config/rooms.yaml`; how it is split and resumed is in [cluster.md](cluster.md).

| | measured | required | met |
|---|---|---|---|
"""
    return head + "\n".join([*(claim.row() for claim in claims), "", *lines]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="measure these alone")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the report to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = str(ROOT)  # of the jobs
    os.chdir(ROOT)  # the config names files from here
    lines, claims, start, (busy, own) = [], [], time.perf_counter(), cpu_seconds()
    for name in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[name](Path(folder))
        lines += found[0]
        claims += found[1]
    busy, own = (after - before for after, before in zip(cpu_seconds(), (busy, own), strict=True))
    text = report(lines, claims, max(0.0, busy - own) / (time.perf_counter() - start))
    print(text)
    if arguments.write:
        arguments.write.write_text(text)


if __name__ == "__main__":
    main()
