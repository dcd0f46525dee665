"""Stage plan: what a study costs on GPUs, counted on its networks, which are built without their weights (on the meta device)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from dag.estimators import DepthUNet
from dag.heads import build_heads
from dag.stages.artefacts import writing
from dag.stages.study import Study, decoder_block_count
from dag.unet import feature_shapes, forward_with_taps

# Intel/dpt-large where it is not here to be asked: the ViT-L/16 with DPT's decoder (Ranftl et al. 2021, arXiv 2103.13413, section 4).
_DPT_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 384,
    "backbone_out_indices": [5, 11, 17, 23],
    "neck_hidden_sizes": [256, 512, 1024, 1024],
}
TRAINING = 3  # a step of training is a forward pass and one backward pass, which counts twice: for the inputs and for the weights


@dataclass(frozen=True)
class Cost:
    """One row of the plan. flop: of all jobs; weights, activations: bytes on the GPU at once; disk: bytes written; formula: of flop."""

    stage: str
    jobs: int
    flop: float
    formula: str
    precision: str = "fp32"
    weights: float = 0
    activations: float = 0
    disk: float = 0


class Counted:
    """FLOP of the networks of a study, for one picture: multiplications and additions counted each, those of matrices and convolutions."""

    def __init__(self, study: Study):
        from diffusers.models.unets.unet_2d import UNet2DModel

        self.study, self.size = study, study["domain"]["size"]
        config = {key: value for key, value in study.unet_architecture().items() if not key.startswith("_")}
        with torch.device("meta"):
            self.unet = UNet2DModel.from_config({"sample_size": self.size, **config}).eval().requires_grad_(False)
            self.x, self.t = torch.empty(1, self.unet.config.in_channels, self.size, self.size), torch.zeros(1, dtype=torch.long)
            self.shapes = feature_shapes(self.unet, self.size)
            channels = {block: shape[0] for block, shape in self.shapes.items()}
            names = {name: study["heads"][name] for name in ("strong", "weak")}
            self.heads = build_heads(names, channels, **{k: study["heads"][k] for k in ("width", "layers", "time_width")}).eval().requires_grad_(False)
            self.priors = {
                side: UNet2DModel(sample_size=side, in_channels=1, out_channels=1, **study["prior"]["architecture"]).eval().requires_grad_(False)
                for side in study["prior"]["resolutions"]
            }
            self.downstream = DepthUNet({"sample_size": self.size, **study["downstream"]["architecture"]})
        self.taps = sorted({*names["strong"], *names["weak"]})
        self.forward, _ = count(lambda: forward_with_taps(self.unet, self.x, self.t))
        self.to_taps, _ = count(lambda: forward_with_taps(self.unet, self.x, self.t, self.taps, stop_after_taps=True))
        features = {block: torch.empty(1, *self.shapes[block], device="meta") for block in self.taps}
        self.head, _ = count(lambda: [head(features, self.t, self.size) for head in self.heads.values()])
        self.prior = {side: count(lambda p=p, side=side: p(torch.empty(1, 1, side, side, device="meta"), self.t))[0] for side, p in self.priors.items()}
        self.guided = {(dc, side): self._guided(dc, side) for dc in (False, True) for side in (None, *self.priors)}
        self.estimator = _depth_network(study["estimator"]["model"] if "estimator" in study.config else study["judge"].get("model"))
        self.judge = self.estimator if "model" in study["judge"] else count(lambda: self._unet(study["judge"]["architecture"])(self.x))[0]
        self.down, _ = count(lambda: self.downstream(self.x))
        self.extractor = _extractor(study["evaluation"])

    def _unet(self, architecture: dict) -> DepthUNet:
        with torch.device("meta"):
            return DepthUNet({"sample_size": self.size, **architecture})

    def _guided(self, consistency: bool, side: int | None) -> tuple[int, int]:
        """(FLOP, bytes kept for the gradient) of a guided step: one forward pass, one gradient through the deepest tap, heads and prior."""
        x = self.x.clone().requires_grad_()

        def step() -> None:
            _, features = forward_with_taps(self.unet, x, self.t, self.taps, detach_output=True)
            depth = {name: head(features, self.t, self.size) for name, head in self.heads.items() if consistency or name == "strong"}
            loss = sum(d.sum() for d in depth.values())
            if side is not None:
                small = nn.functional.interpolate(depth["strong"], (side, side), mode="area")
                loss = loss + self.priors[side](small, self.t).sample.square().sum()
            loss.backward()  # to x alone: the networks are frozen

        return (self.forward, 0) if side is None and not consistency else count(step)


def count(function: Callable[[], object]) -> tuple[int, int]:
    """(FLOP, bytes of activations kept for a gradient) of a call whose tensors are on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    del result
    return counter.get_total_flops(), sum(kept.values())


def _depth_network(model: str | None) -> int:
    if model is None:
        return 0
    from transformers import AutoConfig, AutoModelForDepthEstimation, DPTConfig

    config = AutoConfig.from_pretrained(model) if (Path(model) / "config.json").is_file() else DPTConfig(**_DPT_LARGE)
    side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    with torch.device("meta"):
        network, pixels = AutoModelForDepthEstimation.from_config(config).eval(), torch.empty(1, 3, side, side)
    return count(lambda: network(pixel_values=pixels))[0]


def _extractor(section: dict) -> int:
    if section["extractor"] == "inception":
        from torchvision.models import inception_v3

        with torch.device("meta"):
            network, pixels = inception_v3(weights=None, init_weights=False, aux_logits=False).eval(), torch.empty(1, 3, 299, 299)
        return count(lambda: network(pixels))[0]
    from dag.metrics.extractors import load_extractor

    options = {key: section.get(key) for key in ("dims", "resolution", "weights")}
    network = load_extractor(section["extractor"], **options).network.to("meta")
    return count(lambda: network(torch.empty(1, 3, section["resolution"], section["resolution"], device="meta")))[0]


def size(module: nn.Module) -> int:
    """Bytes of its parameters in fp32."""
    return 4 * sum(p.numel() for p in module.parameters())


def costs(study: Study, c: Counted, times: int = 1) -> list[Cost]:
    """The rows of the plan. times: how many times as many samples as the run sheet says, in runs that are not of the sweep."""
    s, batch, heads = c.size, study["sampling"]["batch_size"], study["heads"]
    runs = study.runs.assign(n=[n if "fig8" in tables else n * times for n, tables in zip(study.runs.n, study.runs.tables, strict=True)])
    uses = {use: where.count or 0 for use, where in study.uses.items() if use != "unet" and (use != "judge" or study.trains_judge)}
    pictures = sum(uses.values())
    rows = [Cost("prepare", len(uses), 0, "no network", disk=3 * s * s * pictures)]
    if "estimator" in study.config:
        rows.append(Cost("label", len(uses), pictures * c.estimator, "pictures x estimator", disk=7 * s * s * pictures))
    stored = {n: n * levels for n, levels in heads["labels"].items()}
    every, few = (2 * sum(a * b * d for block, (a, b, d) in c.shapes.items() if blocks is None or block in blocks) for blocks in (None, c.taps))
    validation = uses["validation"] * len(heads["validation_t"])
    numbers = sum(rows_ * (every if n == heads["guide"] else few) for n, rows_ in stored.items()) + validation * every
    flop = sum(rows_ * (c.forward if n == heads["guide"] else c.to_taps) for n, rows_ in stored.items()) + validation * c.forward
    rows.append(Cost("features", len(stored) + 1, flop, "images x levels x U-Net (to the last tap, or whole)", weights=size(c.unet), disk=numbers))
    recipe, blocks = heads["training"], decoder_block_count(study.unet_architecture())
    # Variants, and the prior of a control, are counted as the networks that they stand for.
    varied = {(row.heads, variant) for name, row in runs.iterrows() if (variant := study.variant_of(name, "heads"))}
    pairs = len(stored) + len(varied)
    flop = TRAINING * recipe["steps"] * recipe["batch_size"] * c.head * (pairs + blocks / 2)
    rows.append(Cost("heads", pairs + 1, flop, f"{TRAINING} x steps x batch x heads, and one on each block"))
    recipe = study["prior"]["training"]
    trained = {(row.prior, study.variant_of(name, "prior"), row.control == "shuffled_prior") for name, row in runs.iterrows()}
    for side in sorted({side for side, *_ in trained}):
        jobs = sum(side == other for other, *_ in trained)
        flop = TRAINING * recipe["steps"] * recipe["batch_size"] * c.prior[side] * jobs
        kept = count(lambda side=side: _trained(c.priors[side], side))[1] * recipe["batch_size"]
        rows.append(Cost(f"prior {side}", jobs, flop, f"{TRAINING} x steps x batch x prior", recipe.get("precision", "fp32"), 4 * size(c.priors[side]), kept))
    for name, row in runs.iterrows():
        one, kept = c.guided[bool(row.w_dc), row.prior if row.w_dp else None]
        weights = size(c.unet) + size(c.heads) + (size(c.priors[row.prior]) if row.w_dp else 0)
        rows.append(Cost(f"sample {name}", 1, row.n * row.steps * one, f"{row.n:,} x {row.steps} steps", "fp32", weights, kept * batch, 3 * s * s * row.n))
    described = int(runs.n.sum()) + uses["reference"] + uses["heldout"]
    flop = described * (c.judge + c.to_taps + c.head + 2 * c.extractor)
    disk = described * (8 * s * s + 8 * study["evaluation"]["dims"])
    rows.append(Cost("describe", len(runs) + 2, flop, "pictures x (judge + U-Net to the last tap + heads + 2 x extractor)", weights=size(c.unet), disk=disk))
    section = study["downstream"]
    recipe, trainings = section["training"], (1 + len(section["sources"])) * section["seeds"]
    flop = trainings * (TRAINING * recipe["steps"] * recipe["batch_size"] + uses["test"]) * c.down
    rows.append(
        Cost("downstream", 2 + len(section["sources"]), flop, f"sources x seeds x {TRAINING} x steps x batch x network", recipe.get("precision", "fp32"))
    )
    return rows


def _trained(network: nn.Module, side: int) -> None:
    network.requires_grad_(True)(torch.empty(1, 1, side, side, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")).sample.sum()
    network.requires_grad_(False)


def plan(study: Study, *, gpus: Path, out: Path, share: float = 0.3) -> None:
    """Write what the study costs: FLOP, GPU-hours, memory and disk of each stage, with the formulae.

    gpus: a table of GPUs with their peak throughput. share: of that peak which a job is taken to reach.
    """
    c, table = Counted(study), pd.read_csv(gpus, sep="\t")
    plans = {times: costs(study, c, times) for times in (1, 10)}
    with writing(out) as aside:
        aside.write_text(report(study, c, plans, table, share))


def hours(cost: Cost, gpu, share: float) -> float:
    """Of one GPU."""
    return cost.flop / (share * 1e12 * (gpu.bf16_tflops if cost.precision == "bf16" else gpu.tf32_tflops)) / 3600


def report(study: Study, c: Counted, plans: dict[int, list[Cost]], gpus: pd.DataFrame, share: float) -> str:
    """The plan as markdown."""
    names, gib = [g.gpu for g in gpus.itertuples()], 2**30
    lines = [
        f"# What the study `{study['study']}` costs",
        "",
        f"Written by `snakemake plan` from {json.dumps(study['runs'])} and the study's config; nothing here is measured. FLOP are counted on the real",
        "architectures, built without weights, by PyTorch's own counter (matrix products and convolutions; a multiplication and an addition are two).",
        f"GPU-hours = FLOP / ({share:g} x peak x 3600 s), the peak of bf16 where a stage says so and of TF32 elsewhere (`config/gpus.tsv`); that a job reaches",
        f"the share {share:g} of it is an assumption. Memory = weights (of a training four times: gradient and optimiser) + batch x activations",
        "that are kept for the gradient.",
        "",
        "## One picture",
        "",
        "| network | GFLOP |",
        "|---|---|",
    ]
    one = {"U-Net": c.forward, "U-Net to the last tap": c.to_taps, "heads, strong and weak": c.head}
    one |= {f"prior at {side}": flop for side, flop in c.prior.items()}
    one |= {"guided step, DCG": c.guided[True, None][0]}
    one |= {f"guided step, DCG and DPG at {side}": c.guided[True, side][0] for side in c.priors}
    one |= {"depth estimator": c.estimator, "judge": c.judge, "feature extractor": c.extractor, "downstream network": c.down}
    lines += [f"| {name} | {flop / 1e9:,.1f} |" for name, flop in one.items() if flop]
    for times, rows in plans.items():
        sizes = sorted({n * times for n, tables in zip(study.runs.n, study.runs.tables, strict=True) if "fig8" not in tables})
        lines += ["", f"## {', '.join(f'{n:,}' for n in sizes)} samples a run", ""]
        lines += [
            "| stage | jobs | PFLOP | memory, GiB | disk, GB | " + " | ".join(f"{name}, h" for name in names) + " | formula |",
            "|---" * (6 + len(names)) + "|",
        ]
        for r in rows:
            memory = (r.weights + r.activations) / gib
            times_ = " | ".join(f"{hours(r, g, share):,.2f}" for g in gpus.itertuples())
            lines.append(
                f"| {r.stage} | {r.jobs} | {r.flop / 1e15:,.2f} | {f'{memory:.1f}' if memory else ''} | {r.disk / 1e9:,.1f} | {times_} | {r.formula} |"
            )
        total = " | ".join(f"{sum(hours(r, g, share) for r in rows):,.1f}" for g in gpus.itertuples())
        disk, jobs, flop = (sum(getattr(r, key) for r in rows) for key in ("disk", "jobs", "flop"))
        lines.append(f"| **all** | {jobs} | {flop / 1e15:,.1f} | | {disk / 1e9:,.1f} | {total} | |")
    need = max(r.weights + r.activations for r in plans[1]) / gib
    fits = [f"{g.gpu} ({g.memory_gib:g} GiB)" for g in gpus.itertuples() if g.memory_gib > need]
    batch = study["sampling"]["batch_size"]
    lines += [
        "",
        f"The largest job keeps {need:.1f} GiB (sampling in batches of {batch}); it fits on: {', '.join(fits) or 'none of these: lower sampling.batch_size'}.",
    ]
    return "\n".join(lines) + "\n"
