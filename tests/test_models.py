"""The shipped models: each is what its card says, and small enough for a repository."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from diffusers import DDIMPipeline
from safetensors.torch import load_file

from dag.unet import decoder_blocks
from dag.weights import load_unet, sha256

MODELS = Path(__file__).parent.parent / "models"
LIMITS = {"rooms32": (9, 6e6), "streets32": (9, 6e6), "rooms64": (12, 7e6), "nyu64": (10, 8e6)}  # fewest decoder blocks, most bytes


@pytest.mark.parametrize("name", sorted(folder.name for folder in MODELS.iterdir()))
def test_a_model_is_what_its_card_says(name):
    folder, weights = MODELS / name, MODELS / name / "unet" / "diffusion_pytorch_model.safetensors"
    card, (unet, facts) = (folder / "README.md").read_text(encoding="utf-8"), load_unet(folder)
    assert re.search(r"SHA-256 `(\w{64})`", card).group(1) == facts["sha256"] == sha256(weights)
    assert f"| prediction type | {facts['prediction_type']}; T = {facts['num_timesteps']}," in card
    curve = pd.read_csv(folder / "training.csv")
    steps, batch = (int(number.replace(",", "")) for number in re.search(r"([\d,]+) steps of (\d+)", card).groups())
    assert curve.step.max() == steps
    assert re.search(r"\| data \| ([\d,]+) ", card).group(1) == f"{steps * batch:,}"
    assert f"{curve.loss.iloc[-10:].mean():.4f} in the last ten lines" in card
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}
    blocks, size = LIMITS[name]
    assert len(decoder_blocks(unet)) >= blocks
    assert weights.stat().st_size <= size
    assert DDIMPipeline.from_pretrained(folder).unet.config.sample_size == unet.config.sample_size
