"""The guided step beside the unguided and the naive one, in one run: time, memory, exactness, and where a whole trajectory spends its time.

python benchmarks/guided_step.py [--parts 32x32 256x256 trajectory] [--quick] [--write docs/performance.md]
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from steps import BLOCKS, DIFFUSION, HEADS, ROOT, STEPS, STUDY, Step, domain, guided
from torch import Tensor
from trajectory import Profile, profile_trajectory

from dag.__main__ import keep_freed_memory
from dag.diffusion import Prediction
from dag.guidance import UNetPredictor
from dag.sampling import SampleRNG

FP32 = [name for name in STEPS if "bf16" not in name]
SAMPLERS = [name for name in STEPS if "limit" not in name]  # steps that one could sample with


def inputs(size: int, batch: int) -> tuple[Tensor, Tensor, SampleRNG]:
    rng = SampleRNG(range(batch))
    return rng.randn("init", (3, size, size)), torch.full((batch,), 400), rng


@dataclass
class Times:
    """Medians over rounds in which every step ran once, seconds of one thread, and what each step last returned."""

    cpu: dict[str, float]
    wall: dict[str, float]
    predictions: dict[str, Prediction | None]


def timed(steps: dict[str, Step], size: int, batch: int, rounds: int) -> Times:
    """Steps take turns, so that what else the machine does meets all of them alike."""
    cpu, wall, predictions = {name: [] for name in steps}, {name: [] for name in steps}, {}
    for number in range(1 + rounds):
        for name, step in steps.items():
            x, t, rng = inputs(size, batch)
            clocks = time.process_time(), time.perf_counter()
            predictions[name] = step(x, t, rng)
            if number:  # the first round warms up
                cpu[name].append(time.process_time() - clocks[0])
                wall[name].append(time.perf_counter() - clocks[1])
    return Times({n: statistics.median(v) for n, v in cpu.items()}, {n: statistics.median(v) for n, v in wall.items()}, predictions)


def peak_memory() -> float:
    """The most memory that this process has held, in MiB. (`ru_maxrss` starts at what the parent process held.)"""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


@dataclass
class Memory:
    """peak: what a process of its own has held, MiB. extra: how much of it the step needs on top of the loaded networks and an unguided
    step; of a head, on top of its features."""

    peak: float
    extra: float


def print_memory(name: str, step: str, batch: int) -> None:
    """Peak memory before and after one step."""
    d = domain(name)
    x, t, rng = inputs(d.size, batch)
    run = {**STEPS, **HEADS}[step](d)
    if step in HEADS:
        run(x[:, :, :16, :16], t, rng)  # loads code, holds next to nothing
    else:
        UNetPredictor(d.unet, DIFFUSION, d.kind)(x, t)
    before = peak_memory()
    run(x, t, rng)
    print(before, peak_memory())


def memory_of(name: str, step: str, batch: int = 1) -> Memory:
    command = [sys.executable, __file__, "--memory", name, step, str(batch)]
    before, after = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:])
    return Memory(after, after - before)


@dataclass
class Claim:
    """One number that has to hold."""

    what: str
    found: float
    bound: float
    at_most: bool
    digits: int = 2

    def row(self) -> str:
        holds = self.found <= self.bound if self.at_most else self.found >= self.bound
        found, bound = f"{self.found:.{self.digits}f}", f"{self.bound:.{self.digits}f}"
        return f"| {self.what} | {found} | {'at most' if self.at_most else 'at least'} {bound} | {'yes' if holds else 'no'} |"


def table(times: Times, memory: dict[str, Memory], unit: str) -> list[str]:
    """One row for each step; multiples are of the first one's CPU time."""
    scale = {"ms": 1e3, "s": 1}[unit]
    first = next(iter(times.cpu))
    lines = [f"| step | CPU {unit} | wall {unit} | multiple of '{first}' | peak memory, MiB | of it extra |", "|---|---|---|---|---|---|"]
    for name, cpu in times.cpu.items():
        held = f"{memory[name].peak:.0f} | {memory[name].extra:.0f}" if name in memory else " | "
        lines.append(f"| {name} | {cpu * scale:.1f} | {times.wall[name] * scale:.1f} | {cpu / times.cpu[first]:.2f} | {held} |")
    return [*lines, ""]


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _difference(found: Prediction, expected: Prediction) -> float:
    """Norm of the difference over that of the expected: the worst of eps, gradient and losses."""
    losses = [_relative(found.losses[name], expected.losses[name]) for name in expected.losses]
    return max(_relative(found.eps, expected.eps), _relative(found.grad, expected.grad), *losses)


def exactness(name: str, size: int, batch: int, predictions: dict[str, Prediction | None]) -> tuple[str, Claim]:
    """Ours in the memory layout of the naive step against that step, and what our usual layout does to ours."""
    ours = guided(domain(name), channels_last=False)(*inputs(size, batch))
    moved = f"Channels last instead of PyTorch's own memory layout moves our step by {1e5 * _difference(predictions['guided, ours'], ours):.2f}e-5."
    what = f"{size}x{size}, batch {batch}: relative difference from the naive step, in 1e-5"
    return moved, Claim(what, 1e5 * _difference(ours, predictions["guided, naive"]), 1.0, True)


def small(rounds: int) -> tuple[list[str], list[Claim]]:
    """32x32. All steps with freed memory kept, the naive one too."""
    keep_freed_memory(large=True)
    lines, claims = [], []
    for batch in (16, 1):
        steps = {name: STEPS[name](domain("rooms")) for name in FP32}
        times = timed(steps, STUDY["domain"]["size"], batch, rounds if batch > 1 else 2 * rounds)
        memory = {name: memory_of("rooms", name, batch) for name in FP32 if name in SAMPLERS}
        moved, exact = exactness("rooms", STUDY["domain"]["size"], batch, times.predictions)
        lines += [f"## 32x32, batch {batch}", "", *table(times, memory, "ms"), moved, ""]
        claims.append(exact)
        if batch > 1:
            ours, cpu = times.cpu["guided, ours"], times.cpu
            claims.append(Claim("32x32, batch 16: guided / unguided (or one of the next two)", ours / cpu["unguided"], 2.1, True))
            claims.append(Claim("32x32, batch 16: guided / bare limit", ours / cpu["bare limit"], 1.1, True))
            claims.append(Claim("32x32, batch 16: guided / bare limit of diffusers' forward", ours / cpu["bare limit, diffusers' forward"], 1.1, True))
            claims.append(Claim("32x32, batch 16: naive / guided", cpu["guided, naive"] / ours, 2.5, False))
    return lines, claims


def large(rounds: int) -> tuple[list[str], list[Claim]]:
    """256x256, the size of the DDPM church model. The naive step as it comes first: once a process keeps what it frees, it does so to its end."""
    steps = {name: build(domain("church")) for name, build in STEPS.items()}
    naive = timed({"guided, naive": steps["guided, naive"]}, 256, 1, rounds)
    keep_freed_memory(large=True)
    times = timed(steps, 256, 1, rounds)
    for kept, plain in ((times.cpu, naive.cpu), (times.wall, naive.wall)):
        kept["guided, naive, freed memory kept"] = kept["guided, naive"]
        kept.update(plain)
    memory = {name: memory_of("church", name) for name in SAMPLERS}
    cpu, naive_cpu, half = times.cpu, times.cpu["guided, naive"], times.predictions["guided, ours, bf16"].grad
    cosine = torch.cosine_similarity(half.flatten(), times.predictions["guided, ours"].grad.flatten(), dim=0)
    moved, exact = exactness("church", 256, 1, times.predictions)
    lines = ["## 256x256, batch 1", "", *table(times, memory, "s"), moved, ""]
    claims = [
        exact,
        Claim("256x256: guided / unguided", cpu["guided, ours"] / cpu["unguided"], 1.6, True),
        Claim("256x256: naive / guided", naive_cpu / cpu["guided, ours"], 3.3, False),
        Claim("256x256: extra memory of guided / naive", memory["guided, ours"].extra / memory["guided, naive"].extra, 0.3, True),
        Claim("256x256: naive in fp32 / guided in bf16", naive_cpu / cpu["guided, ours, bf16"], 7.0, False),
        Claim("256x256: cosine of the gradients in bf16 and fp32", float(cosine), 0.998, False, digits=4),
    ]
    times = timed({name: build(domain("church")) for name, build in HEADS.items()}, 256, 1, 3)
    memory = {name: memory_of("church", name) for name in HEADS}
    ours, concatenating = HEADS
    lines += ["## One head alone at 256x256, forward and backward", "", *table(times, memory, "ms")]
    claims.append(Claim("head alone: concatenating / factorised, time", times.cpu[concatenating] / times.cpu[ours], 8.0, False, 1))
    claims.append(Claim("head alone: concatenating / factorised, memory", memory[concatenating].extra / memory[ours].extra, 8.0, False, 1))
    return lines, claims


def trajectory(samples: int) -> tuple[list[str], list[Claim]]:
    """A whole run of guided steps, part by part."""
    keep_freed_memory(large=True)
    d, batch, steps = domain("rooms"), STUDY["sampling"]["batch_size"], 25
    profile: Profile = profile_trajectory(guided(d), DIFFUSION, d.size, samples, batch, steps)
    lines = [f"## A whole trajectory: {samples} rooms, {steps} guided DDIM steps, batches of {batch}", ""]
    lines += ["| part | CPU s | share, % |", "|---|---|---|"]
    lines += [f"| {part} | {seconds:.2f} | {100 * seconds / profile.total:.1f} |" for part, seconds in profile.parts.items()]
    lines += [f"| everything else | {profile.rest:.2f} | {100 * profile.rest / profile.total:.1f} |", f"| all | {profile.total:.2f} | 100.0 |", ""]
    return lines, [Claim("trajectory: share of U-Net, heads and prior, %", 100 * (1 - profile.rest / profile.total), 90.0, False, 1)]


def machine() -> str:
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{name[1] if name else platform.machine()}, {os.cpu_count()} CPUs; Python {platform.python_version()}, torch {torch.__version__}"


def report(lines: list[str], claims: list[Claim]) -> str:
    shipped = "the shipped U-Net `models/rooms32`" if (ROOT / "models" / "rooms32").exists() else "the shipped U-Net's architecture with random weights"
    head = f"""# The guided step: time, memory, exactness

Written by `python benchmarks/guided_step.py --write docs/performance.md`, all in one run, on this machine: {machine()}.

One thread. Times are medians of rounds in which all steps take turns. The machine may have had other work, so ratios are of **CPU time**
of the process, which waiting does not lengthen; wall time stands beside it. Peak memory is that of a process of its own that takes one
step; extra is what it gained on its peak after loading the networks and one unguided step. Guided steps have both terms, DCG and DPG, with heads of
blocks {BLOCKS["strong"]} and {BLOCKS["weak"]} and a prior at half the image's side; heads and prior have random weights. 32x32 is {shipped};
256x256 is a random U-Net of the size of `google/ddpm-church-256`. fp32 unless a row says bf16 (autocast of U-Net and prior).

- **naive**: separate forward passes for eps, strong and weak head, upsampled and concatenated features, one gradient for each term,
  networks not frozen (`tests/naive.py`, the tests' oracle). At 256x256 it leaves memory to the C library as PyTorch does; all other steps
  keep what they free (`keep_freed_memory` in `dag/__main__.py`), as `dag sample` does, and a row says what the naive step would gain by that.
- **bare limit**: one forward pass of the U-Net, one gradient of a sum over the deepest tap to x, one forward and gradient of the prior;
  with our forward pass and memory layout (channels last), and with diffusers' own forward pass on the network as loaded. What a
  guided step needs above it is the heads: nearly all of that is the arithmetic of two MLPs at every pixel.
- **relative difference**: norm of the difference over norm of the naive result, the worst of eps, gradient and both losses, with networks
  in one memory layout. In float64 it is below 1e-10 (`tests/test_guidance.py`); what is left here is rounding, of the naive step as of ours.
  What the layout alone does to our step stands below the tables.

## What is required

| ratio | measured | required | met |
|---|---|---|---|
"""
    return head + "\n".join([*(claim.row() for claim in claims), "", *lines]).rstrip() + "\n"


# In the order in which they are measured, 256x256 before memory is kept; with their rounds or samples: all, and few.
PARTS = {"256x256": (large, 3, 1), "32x32": (small, 15, 3), "trajectory": (trajectory, 256, 16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="measure these alone")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and samples")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the report to this file too")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        name, step, batch = arguments.memory
        return print_memory(name, step, int(batch))
    measured = [part(few if arguments.quick else many) for name, (part, many, few) in PARTS.items() if name in arguments.parts]
    text = report([line for lines, _ in measured for line in lines], [claim for _, claims in measured for claim in claims])
    print(text)
    if arguments.write:
        arguments.write.write_text(text)


if __name__ == "__main__":
    main()
