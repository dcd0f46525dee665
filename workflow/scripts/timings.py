"""What the study cost, rule by rule, from Snakemake's benchmark files."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

# Snakemake reads a job's CPU clock every half second for its first 15.5 s, then every 30 s, and not at its end.
_SHORT, _SHORT_UNTIL, _LONG = 0.5, 15.5, 30.0


# What rules' jobs import, where it is less than all.
PLAIN = {"prepare", "measure", "moments", "scale", "runs", "geometry", "join"}
TORCH = {"heads", "known_answers", "downstream"}


def build(benchmarks: dict[str, pd.DataFrame], startup: dict[str, float], snakemake_seconds: float) -> str:
    """Markdown. benchmarks: per rule, the rows of its benchmark files. startup: CPU seconds of a job's imports, "plain", "torch", "diffusers"."""
    rows = {rule: _summary(frame) for rule, frame in benchmarks.items()}
    jobs, wall, cpu, peak = (list(column) for column in zip(*rows.values(), strict=True))
    of_kind = dict.fromkeys(startup, 0)
    for rule, n in zip(rows, jobs, strict=True):
        of_kind["plain" if rule in PLAIN else "torch" if rule in TORCH else "diffusers"] += n
    imports = sum(n * startup[kind] for kind, n in of_kind.items())
    total = sum(cpu) + snakemake_seconds
    lines = ["# Timings", "", "| rule | jobs | wall (s) | CPU (s) | share of CPU | peak memory (MB) |", "|---|---:|---:|---:|---:|---:|"]
    for rule, (n, seconds, used, memory) in sorted(rows.items(), key=lambda item: -item[1][2]):
        lines.append(f"| {rule} | {n} | {seconds:,.1f} | {used:,.1f} | {used / total:.1%} | {_number(memory)} |")
    lines += [
        f"| Snakemake itself | – | – | {snakemake_seconds:,.1f} | {snakemake_seconds / total:.1%} | – |",
        f"| **all** | {sum(jobs)} | {sum(wall):,.1f} | {total:,.1f} | 100.0% | {_number(float(np.nanmax([0, *peak])))} |",
        "",
        f"**Start-up: {(imports + snakemake_seconds) / total:.1%} of all CPU time**: "
        + ", ".join(f"{of_kind[kind]} jobs × {startup[kind]:.2f} s of imports ({kind})" for kind in ("diffusers", "torch", "plain"))
        + f", and {snakemake_seconds:.1f} s of Snakemake itself in the call that wrote this file.",
        "",
        "Wall: summed over jobs, several of which run at once. CPU: as Snakemake reads it, every 0.5 s for 15.5 s, then every 30 s, continued at the "
        "same rate to the job's end; a job too short to be read counts as busy throughout. Peak memory: of the rule's largest job, read likewise. "
        "Tables and figures, about a second each, are not counted.",
        "",
    ]
    return "\n".join(lines)


def _summary(frame: pd.DataFrame) -> tuple[int, float, float, float]:
    """Jobs, wall seconds, CPU seconds, peak MB."""
    wall = frame["s"].astype(float)
    cpu = pd.to_numeric(frame["cpu_time"], errors="coerce")  # "NA": the job was over before the first reading
    whole = [used * seconds / _last_reading(seconds) if used > 0 else seconds for seconds, used in zip(wall, cpu, strict=True)]
    return len(frame), float(wall.sum()), float(sum(whole)), float(pd.to_numeric(frame["max_rss"], errors="coerce").max())


def _last_reading(seconds: float) -> float:
    """When a job of this length had its clock read last."""
    if seconds < _SHORT_UNTIL:
        return max(_SHORT, seconds // _SHORT * _SHORT)
    return _SHORT_UNTIL + (seconds - _SHORT_UNTIL) // _LONG * _LONG


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.0f}"


def snakemake_cpu() -> float:
    """CPU seconds so far of the Snakemake process this script runs under (not of its jobs); 0 where there is none."""
    for process in psutil.Process().parents():
        if any("snakemake" in part for part in process.cmdline()[:3]):
            times = process.cpu_times()
            return times.user + times.system
    return 0.0


def read_benchmarks(paths: list[str]) -> dict[str, pd.DataFrame]:
    """Benchmark files .../benchmarks/<rule>/....tsv by rule."""
    found: dict[str, list[pd.DataFrame]] = {}
    for path in map(Path, paths):
        after = len(path.parts) - path.parts[::-1].index("benchmarks")
        found.setdefault(Path(path.parts[after]).stem, []).append(pd.read_csv(path, sep="\t"))
    return {rule: pd.concat(frames, ignore_index=True) for rule, frames in found.items()}


if job := globals().get("snakemake"):  # set by the rule's `script:`
    startup = json.loads(Path(job.input.startup).read_text(encoding="utf-8"))
    text = build(read_benchmarks(job.input.benchmarks), startup, snakemake_cpu())
    Path(job.output.md).write_text(text, encoding="utf-8")
