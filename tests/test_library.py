"""`from dag import ...`: what it offers and costs; heads and prior trained on arrays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

import dag
from dag.data.depth import DepthCoding
from dag.diffusion import Diffusion
from dag.guidance import UNetPredictor
from dag.networks import DepthHeads, DepthPrior, train_heads, train_prior
from dag.training import Recipe

ROOT = Path(__file__).parent.parent
CODING = DepthCoding(0.5, 10.0)
BLOCKS = {"strong": (0, 1, 2), "weak": (2,)}
ARCHITECTURE = {
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, dag; dir(dag); assert not {'torch', 'numpy', 'diffusers', 'pandas'} & sys.modules.keys(), 'heavy'; print(dag.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == dag.__version__, done.stderr


def test_every_public_name_is_there():
    for name in dag.__all__:
        assert getattr(dag, name) is not None
        assert name in dir(dag)
    with pytest.raises(AttributeError, match="no attribute 'Guidance'; it offers Consistency, "):
        dag.Guidance  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Guidance'"):
        from dag import Guidance  # noqa: F401


@pytest.fixture(scope="module")
def plain() -> UNetPredictor:
    torch.manual_seed(0)
    return UNetPredictor(UNet2DModel(sample_size=8, **ARCHITECTURE).eval().requires_grad_(False), Diffusion())


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Pictures whose brightness is their depth."""
    shade = np.random.default_rng(0).uniform(0, 1, (24, 1, 1)) * np.linspace(0.5, 1, 8)[None, None] * np.ones((24, 8, 8))
    return (shade[..., None] * [255, 255, 255]).astype(np.uint8), 1 + 8 * shade


RECIPE = Recipe(steps=150, batch_size=8, learning_rate=1e-2, warmup=5, ema=0.9)
SIZES = {"width": 8, "layers": 1, "time_width": 4}


def test_heads_learn_what_is_known(plain, pairs):
    """Unknown pixels teach nothing: with nonsense in their place the heads are the same, and they read depth better than its mean does."""
    images, depth = pairs
    holes, nonsense = depth.copy(), depth.copy()
    holes[:, :2], nonsense[:, :2] = np.nan, -7.0
    before = torch.get_rng_state()
    heads = train_heads(plain, images, holes, CODING, **BLOCKS, **SIZES, recipe=RECIPE)
    assert torch.equal(torch.get_rng_state(), before)
    again = train_heads(plain, images, nonsense, CODING, **BLOCKS, **SIZES, recipe=RECIPE)
    assert all(torch.equal(a, b) for a, b in zip(heads.state_dict().values(), again.state_dict().values(), strict=True))
    assert not heads.training
    assert not any(p.requires_grad for p in heads.parameters())
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    read = CODING.decode(plain.read_depth(heads["strong"], x, 5, torch.randn(x.shape, generator=torch.Generator().manual_seed(0))))[:, 0].numpy()
    assert np.abs(read - depth)[:, 2:].mean() < 0.8 * np.abs(depth - depth.mean())[:, 2:].mean()


def test_a_prior_learns_and_is_kept(pairs, tmp_path):
    prior = train_prior(pairs[1], CODING, 4, architecture={**ARCHITECTURE}, recipe=Recipe(steps=3, batch_size=4))
    assert prior.resolution == 4
    noise, tau = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 500])
    prior.save_pretrained(tmp_path)
    assert torch.allclose(DepthPrior.load(tmp_path)(noise, tau), prior(noise, tau), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"images": np.zeros((24, 8, 12, 3), np.uint8)}, "8 x 12 pixels, expected 8 x 8, the size of the U-Net"),
        ({"images": np.zeros((24, 8, 8), np.uint8)}, r"expected uint8 \(n, h, w, 3\)"),
        ({"images": np.zeros((24, 8, 8, 4), np.uint8)}, r"expected uint8 \(n, h, w, 3\)"),
        ({"images": torch.full((24, 3, 8, 8), 200.0)}, r"expected floats \(n, 3, s, s\) in \[-1, 1\]"),
        ({"depth": np.ones((23, 8, 8))}, "one map for each image"),
        ({"depth": np.full((24, 8, 8), 2500.0)}, "median of 2500, outside the coding's 0.5 to 10 m: is it in metres"),
        ({"depth": np.full((24, 8, 8), np.nan)}, "nowhere known"),
        ({"strong": (2, 4, 7)}, r"strong names decoder blocks \[4, 7\]; this U-Net has blocks 0 to 3: give strong=\(...\) some of them"),
    ],
)
def test_what_cannot_teach_heads_is_refused(plain, pairs, change, expected):
    arguments = {"images": pairs[0], "depth": pairs[1], "coding": CODING, **BLOCKS, "recipe": RECIPE, **change}
    with pytest.raises(ValueError, match=expected):
        train_heads(plain, **arguments)


def test_small_holes_are_filled_by_their_surroundings_and_large_ones_refused(pairs):
    depth = pairs[1].copy()
    depth[5, 0, 0] = 0
    train_prior(depth, CODING, 4, architecture=ARCHITECTURE, recipe=Recipe(steps=1, batch_size=2))
    depth[5, :2, :2] = 0
    with pytest.raises(ValueError, match="depth map 5 has holes as large as a pixel of 4 x 4"):
        train_prior(depth, CODING, 4, architecture=ARCHITECTURE, recipe=Recipe(steps=1, batch_size=2))


def test_heads_of_a_study_are_read(tmp_path):
    from dag.heads import build_heads
    from dag.weights import save_module

    heads, channels = build_heads(BLOCKS, {0: 3, 1: 4, 2: 5}, **SIZES), {0: 3, 1: 4, 2: 5}
    for name, depth in (("old", {}), ("new", {"depth": {"near": 0.5, "far": 10.0, "coding": "linear"}})):
        path = tmp_path / f"{name}.safetensors"
        save_module(heads, {"blocks": BLOCKS, "channels": channels, "sizes": SIZES, **depth}, path)
        read = DepthHeads.load(path)
        assert sorted(read.keys()) == ["strong", "weak"]
        assert "strong" in read
        assert read["strong"].blocks == (0, 1, 2)
        assert read.depth_coding == (DepthCoding(0.5, 10.0, "linear") if depth else None)
        read.save_pretrained(tmp_path / name)
        kept = DepthHeads.load(tmp_path / name)
        assert kept.depth_coding == read.depth_coding
        assert all(torch.equal(kept.state_dict()[key], value) for key, value in read.state_dict().items())


def test_a_folder_of_something_else_is_refused(plain, tmp_path):
    with pytest.raises(ValueError, match=r"holds no config.json, expected what DepthHeads.save_pretrained writes"):
        DepthHeads.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither config.json nor unet/config.json"):
        DepthPrior.load(tmp_path)
    plain.unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds UNet2DModel, expected what DepthHeads.save_pretrained writes"):
        DepthHeads.load(tmp_path)
