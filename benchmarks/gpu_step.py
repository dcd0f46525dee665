"""The guided step on a GPU beside the unguided and the naive one, in one run: time, memory, and whether it is the step of the CPU.

python benchmarks/gpu_step.py [--batches 1 8 32] [--write docs/performance-gpu.md]
"""

from __future__ import annotations

import argparse
import platform
import statistics
from functools import partial
from pathlib import Path

import torch
from guided_step import inputs
from steps import BLOCKS, DIFFUSION, STEPS, Domain, Step, domain, guided, unguided
from torch import Tensor

from dag.accelerator import multiply_in_tf32
from dag.diffusion import Prediction, respace
from dag.sampling import SampleRNG, sample_ddim

MEASURED = {name: STEPS[name] for name in ("unguided", "guided, ours", "guided, naive", "unguided, bf16", "guided, ours, bf16")}
for name, build in (("unguided", unguided), ("guided, ours", guided)):
    for precision in ("fp32", "bf16"):
        MEASURED[f"{name}, {precision}, PyTorch's own memory layout"] = partial(build, precision=precision, channels_last=False)
GPU = torch.device("cuda")


def on_gpu(d: Domain) -> Domain:
    for network in (d.unet, d.heads, d.prior):
        network.to(GPU)
    return d


def inputs_there(size: int, batch: int) -> tuple[Tensor, Tensor, SampleRNG]:
    x, t, rng = inputs(size, batch)
    return x.to(GPU), t.to(GPU), SampleRNG(rng.seeds, GPU)


def seconds(step: Step, size: int, batch: int, rounds: int) -> tuple[float, float]:
    """Median time of a step, on the GPU's own clock, and the most memory it holds beyond its networks and inputs, MiB."""
    times = []
    for number in range(2 + rounds):
        x, t, rng = inputs_there(size, batch)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        before.record()
        step(x, t, rng)
        after.record()
        torch.cuda.synchronize()
        if number >= 2:  # the first rounds choose algorithms and warm up
            times.append(before.elapsed_time(after) / 1e3)
    return statistics.median(times), (torch.cuda.max_memory_allocated() - held) / 2**20


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu() - expected.cpu()).norm() / expected.cpu().norm())


def agreement(name: str, batch: int) -> tuple[float, float]:
    """Relative difference of the guided step's eps and gradient from the CPU's, in float32 without TF32."""
    here: Prediction = STEPS["guided, ours"](domain(name))(*inputs(size := domain(name).size, batch))
    there: Prediction = STEPS["guided, ours"](on_gpu(domain(name)))(*inputs_there(size, batch))
    return relative(there.eps, here.eps), relative(there.grad, here.grad)


def pictures(samples: int, steps: int) -> tuple[float, float]:
    """Largest and root-mean-square difference of guided pictures, in grey levels of 255, between CPU and GPU: a whole trajectory of each seed."""
    found = {}
    for device in ("cpu", "cuda"):
        d = domain("rooms") if device == "cpu" else on_gpu(domain("rooms"))
        rng = SampleRNG(range(samples), device)
        found[device] = sample_ddim(STEPS["guided, ours"](d), rng.randn("init", (3, d.size, d.size)), respace(1000, steps, "ddim"), DIFFUSION, rng=rng).cpu()
    difference = (found["cuda"].clamp(-1, 1) - found["cpu"].clamp(-1, 1)).abs() * 127.5
    return float(difference.max()), float(difference.square().mean().sqrt())


def set_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def report(batches: list[int], rounds: int) -> str:
    set_tf32(False)
    lines = ["## The same numbers as on the CPU", "", "| guided step, float32 | eps | gradient |", "|---|---|---|"]
    for name, batch in (("rooms", 8), ("church", 1)):
        eps, grad = agreement(name, batch)
        lines.append(f"| {name}, batch {batch}: relative difference | {eps:.1e} | {grad:.1e} |")
    most, rms = pictures(8, 25)
    lines += ["", f"After 25 guided DDIM steps 8 rooms differ by at most {most:.2f} grey levels of 255, {rms:.4f} in the root mean square.", ""]
    set_tf32(True)
    multiply_in_tf32()
    for batch in batches:
        lines += [f"## 256x256, batch {batch}", "", "| step | ms | multiple of 'unguided' | images/s | memory, MiB |", "|---|---|---|---|---|"]
        first = 0.0
        for name, build in MEASURED.items():
            torch.cuda.empty_cache()
            time, memory = seconds(build(on_gpu(domain("church"))), 256, batch, rounds)
            first = first or time
            lines.append(f"| {name} | {time * 1e3:.1f} | {time / first:.2f} | {batch / time:.1f} | {memory:.0f} |")
        lines.append("")
    properties = torch.cuda.get_device_properties(GPU)
    head = f"""# The guided step on a GPU

Written by `python benchmarks/gpu_step.py --write docs/performance-gpu.md`, all in one run, on one {properties.name}
({properties.total_memory / 2**30:.0f} GiB); Python {platform.python_version()}, torch {torch.__version__}.

Medians of {rounds} steps on the GPU's own clock; memory is what a step holds at most beyond networks and inputs. Steps are those of
[performance.md](performance.md): both terms, DCG and DPG, heads of blocks {BLOCKS["strong"]} and {BLOCKS["weak"]} and a prior at half the image's side;
256x256 is a random U-Net of the size of `google/ddpm-church-256`. fp32 means TF32 products, as the stages compute on a GPU; bf16 is autocast
of U-Net and prior. Images/s are of one step; divide by a run's steps.

"""
    return head + "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="at 256x256")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps, after two that are not")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the report to this file too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; on CPUs: benchmarks/guided_step.py")
    text = report(arguments.batches, arguments.rounds)
    print(text)
    if arguments.write:
        arguments.write.write_text(text)


if __name__ == "__main__":
    main()
