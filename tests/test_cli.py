"""The command: its help, what it refuses in one line, pictures without a study, and the doctor."""

from __future__ import annotations

import importlib
import inspect
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import matplotlib.image
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel, UNet2DModel

from dag.__main__ import STAGES, _stage_parser, main, stage
from dag.diffusion import Diffusion
from dag.heads import build_heads
from dag.usage import WITHOUT_STUDY, example
from dag.weights import save_module, save_unet

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def said(capsys, *words: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of the command."""
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def test_help_names_every_stage_and_imports_none():
    code = "import sys; from dag.__main__ import main\ntry: main(['--help'])\nfinally: assert not {'torch', 'numpy', 'pandas'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name in STAGES:
        line = next(line for line in lines if line.split()[:1] == [name])
        assert len(line.split()) > 4, f"dag --help says nothing of {name}"
    assert "without a study" in done.stdout


@pytest.mark.parametrize("name", STAGES)
def test_a_stages_help_is_whole(name):
    """Every option is explained, and the example is a command that this stage takes."""
    parser = _stage_parser(name, stage(name))
    for action in parser._actions:
        assert action.help, f"dag {name} --help says nothing of {action.option_strings}: add a word to dag/usage.py"
    words = example(name)
    assert words, f"dag {name} has no example: add one to dag/usage.py"
    options = vars(parser.parse_args(words[2:]))
    # The examples of stages with a study name files of the smoke study, so they are as long as its rules are right.
    used = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    assert used <= options.keys()
    assert ("study" in inspect.signature(stage(name)).parameters) == (name not in WITHOUT_STUDY) == ("config" in used and name != "doctor")
    assert "example" in parser.format_help()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sampel"], ["dag: argument STAGE", "'sampel'", "'sample'"]),
        (["sample"], ["dag sample: ", "--config", "--run", "required"]),
        (["sample", "--config", "none.yaml", "--run", "x", "--unet", "x", "--heads", "x", "--prior", "x", "--out", "x"], ["none.yaml", "no such config"]),
        ([*example("features")[1:], "--blocks", "al"], ["--blocks", "'al'", "'heads'", "'all'"]),
        ([*example("features")[1:], "--levels", "some"], ["levels is 'some'", "'validation'", "whole number"]),
        ([*example("heads")[1:], "--kind", "pairs"], ["--kind", "'pairs'", "'pair'", "'blocks'"]),
        ([*example("downstream")[1:], "--source", "guided"], ["source is 'guided'", "reference, unguided, dag, constant"]),
        ([*example("prepare")[1:], "--use", "train"], ["use is 'train'", "labels, validation"]),
        (["picture", "--model", "models/none", "--grid", "x.png"], ["models/none", "no such file or folder"]),
        (["picture", "--model", "models/rooms32", "--grid", "x.png", "--w-dc", "3"], ["--heads"]),
        (["picture", "--model", "models/rooms32", "--grid", "x.png", "--heads", "x.safetensors", "--w-dp", "3"], ["--prior"]),
        (["picture", "--model", "models/rooms32", "--grid", "x.png", "--n", "0"], ["--n is 0"]),
        (["picture", "--model", "models/rooms32", "--grid", "x.tif"], ["--grid is x.tif", ".png"]),
        (["picture", "--model", "models/rooms32", "--grid", "x.png", "--heads", "none", "--w-dc", "3"], ["--heads is none", "examples/guide_your_own.py"]),
        (["picture", "--model", "models/rooms32", "--grid", "x.png", "--heads", "models/rooms32", "--w-dc", "3"], ["expected what DepthHeads.save_pretrained"]),
        (["convert", "models/rooms32"], ["dag convert", "required: OUT"]),
        (["sample", "--model", "models/rooms32", "--grid", "x.png", "--rule", "half"], ["dag picture", "--rule", "'half'", "'score'"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capsys, words, expected):
    status, out, err = said(capsys, *words)
    assert status == 2
    assert err.count("\n") == 1
    assert all(part in err for part in ["dag", *expected]), err
    assert not out


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, Path]:
    """A small U-Net and heads on it, as the stages write them."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    architecture = {"block_out_channels": (8, 8), "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4}
    save_unet(UNet2DModel(16, layers_per_block=1, **architecture), folder / "unet", prediction_type="v_prediction", diffusion=Diffusion())
    sizes, blocks = {"width": 8, "layers": 1, "time_width": 4}, {"strong": [0, 1, 2], "weak": [2]}
    heads = build_heads(blocks, dict.fromkeys(range(4), 8), **sizes)
    save_module(heads, {"blocks": blocks, "channels": dict.fromkeys(range(4), 8), "sizes": sizes}, folder / "heads.safetensors")
    return folder / "unet", folder / "heads.safetensors"


def test_a_picture_needs_no_study(capsys, model, tmp_path):
    """`dag sample --model`: rows of the same seeds, a column each; a seed is the same picture whatever stands beside it."""
    unet, heads = map(str, model)
    for name, more in (("whole", ["--n", "18"]), ("part", ["--n", "2", "--first-seed", "16"])):
        grid = str(tmp_path / f"{name}.png")
        status, out, err = said(capsys, "sample", "--model", unet, "--heads", heads, "--w-dc", "300", "--steps", "4", *more, "--grid", grid)
        assert status == 0, err
        assert "rows: unguided; guided; depth, unguided; depth, guided" in out
    whole, part = (matplotlib.image.imread(tmp_path / f"{name}.png")[::6, ::6, :3] for name in ("whole", "part"))
    assert whole.shape == (2 * 4 * 16, 16 * 16, 3)
    assert part.shape == (4 * 16, 2 * 16, 3)
    assert np.abs(whole[4 * 16 :, : 2 * 16] - part).max() < 2 / 255
    unguided, guided = part[:16], part[16:32]
    assert np.abs(unguided - guided).max() > 2 / 255


def test_an_unguided_picture_needs_no_heads(capsys, model, tmp_path):
    status, out, _ = said(capsys, "picture", "--model", str(model[0]), "--n", "1", "--steps", "2", "--grid", str(tmp_path / "out.png"))
    assert status == 0
    assert "rows: unguided\n" in out
    assert matplotlib.image.imread(tmp_path / "out.png").shape[:2] == (96, 96)


def test_a_picture_of_a_model_with_other_blocks_is_refused_by_name(capsys, tmp_path):
    types = {"down_block_types": ("DownBlock2D", "AttnDownEncoderBlock2D"), "up_block_types": ("UpBlock2D",) * 2, "block_out_channels": (8, 8)}
    unet = UNet2DModel(16, layers_per_block=1, norm_num_groups=4, **types)
    save_unet(unet, tmp_path / "other", prediction_type="epsilon", diffusion=Diffusion())
    status, out, err = said(capsys, "picture", "--model", str(tmp_path / "other"), "--grid", str(tmp_path / "out.png"))
    assert (status, out) == (2, "")
    assert err.startswith(f"dag picture: {tmp_path / 'other'}: the U-Net has a AttnDownEncoderBlock2D, expected one of ")
    assert err.count("\n") == 1


def test_the_doctor_finds_a_whole_study(capsys):
    status, out, _ = said(capsys, "doctor")
    assert status == 0, out
    for line in ("weights   models/rooms32: loads, predicts v_prediction, checksum as in its model card", "config    config/rooms.yaml: study 'rooms'"):
        assert line in out
    assert "next: snakemake --cores all --configfile config/rooms.yaml --dry-run" in out


def test_the_doctor_finds_what_is_wrong(capsys, tmp_path):
    text = (ROOT / "config" / "rooms.yaml").read_text()
    (tmp_path / "device.yaml").write_text(f"{text}\ncompute: {{device: gpu}}\n")
    (tmp_path / "nowhere.yaml").write_text(text.replace("path: models/rooms32", "path: models/nowhere"))
    (tmp_path / "wrong.yaml").write_text(text.replace("size: 32", "size: 20"))
    faults = [("nowhere", "models/nowhere, which does not exist"), ("wrong", "domain.size is 20"), ("none", "no such config file")]
    faults += [] if torch.cuda.is_available() else [("device", "compute.device is 'gpu', but torch finds no CUDA device")]
    for name, expected in faults:
        status, out, _ = said(capsys, "doctor", "--config", str(tmp_path / f"{name}.yaml"))
        assert status == 1
        assert [line for line in out.splitlines() if line.startswith("FAIL") and expected in line], out
        assert "mend what says FAIL" in out


def test_a_write_that_the_system_ends_names_its_file(tmp_path):
    """A limit of zero bytes a file: as on a full disk, the system's error itself names none."""
    table, out = tmp_path / "sweep.csv", tmp_path / "scale.json"
    table.write_text("run,metric,value\nsweep_dc30,dfid,1\n")
    command = f"ulimit -f 0; exec {sys.executable} -m dag scale --config config/smoke.yaml --distances {table} --out {out}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"dag scale: {out}: [Errno 27] File too large\n"
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.csv"]


def test_a_missing_package_is_told_in_a_line(capsys, monkeypatch):
    monkeypatch.setattr("dag.stages.doctor.version", lambda name: _no_version(name) if name == "tqdm" else "1")
    status, out, err = said(capsys, "doctor")
    assert (status, err) == (1, "")
    assert "FAIL packages  missing: tqdm: pip install -c constraints.txt -e ." in out
    assert "weights" not in out  # nothing else can be asked without it

    def broken(*, config: Path = Path("x")) -> int:
        """A stage that needs what is not installed."""
        importlib.import_module("no_such_package")

    monkeypatch.setattr("dag.__main__.stage", lambda name: broken)
    status, _, err = said(capsys, "doctor")
    assert status == 2
    assert err.count("\n") == 1
    assert err.startswith("dag doctor: No module named 'no_such_package'")
    assert "pip install" in err


def _no_version(name: str) -> str:
    raise PackageNotFoundError(name)


def test_the_doctor_notices_other_weights(capsys, tmp_path, model):
    card = f"SHA-256 `{'0' * 64}`"
    (model[0] / "README.md").write_text(card)
    config = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text())
    config["unet"] = {"path": str(model[0])}
    config["heads"].update(strong=[0, 1], weak=[1])
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    status, out, _ = said(capsys, "doctor", "--config", str(tmp_path / "own.yaml"))
    (model[0] / "README.md").unlink()
    assert status == 1
    assert "its model card says 000000000000..." in out


def failures(capsys, config: Path) -> list[str]:
    status, out, err = said(capsys, "doctor", "--config", str(config))
    found = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert (status, err) == (int(bool(found)), "")
    return found


def _as(mode: str, name: str = "rgb/room03.jpg"):
    def change(folder: Path) -> None:
        picture = PIL.Image.open(folder / name).convert(mode)
        (folder / name).unlink()
        picture.save((folder / name).with_suffix(".png"))

    return change


def _deep(folder: Path) -> None:
    (folder / "rgb/room03.jpg").unlink()
    PIL.Image.fromarray(np.full((72, 96), 4000, np.uint16)).save(folder / "rgb/room03.png")


def _scaled(factor: float):
    def change(folder: Path) -> None:
        for path in folder.glob("depth/*.png"):
            PIL.Image.fromarray((np.asarray(PIL.Image.open(path)) * factor).astype(np.uint16)).save(path)

    return change


def _unknown(folder: Path) -> None:
    PIL.Image.fromarray(np.zeros((72, 96), np.uint16)).save(folder / "depth/room03.png")


def _turned(folder: Path) -> None:
    picture, exif = PIL.Image.open(folder / "rgb/room03.jpg"), PIL.Image.Exif()
    exif[0x0112] = 6  # stands upright when turned by a quarter to the right
    picture.rotate(90, expand=True).save(folder / "rgb/room03.jpg", exif=exif)


def _small(folder: Path) -> None:
    for path in (folder / "rgb/room03.jpg", folder / "depth/room03.png"):
        PIL.Image.open(path).resize((48, 36), PIL.Image.Resampling.NEAREST).save(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_as("L"), "room03.png: a picture of mode L, expected RGB, 8 bits a colour; convert it first"),
        (_as("RGBA"), "room03.png: a picture of mode RGBA, expected RGB"),
        (_deep, "room03.png: a picture of mode I;16, expected RGB"),
        (_as("L", "depth/room03.png"), "depth/room03.png: a picture of mode L, expected 16-bit grey"),
        (_scaled(0.1), "expected one within depth.near to depth.far, 0.5 to 10 m; domain.depth_unit is 0.001 m"),
        (_unknown, "room03.jpg: depth is unknown (0) everywhere in the square, expected metres"),
        (lambda folder: shutil.rmtree(folder / "depth"), "its 20 pictures have no depth: docs/own-data.md"),
        (lambda folder: (folder / "rgb/room19.jpg").unlink(), "20 depth maps for 19 pictures; 'room19' is only among the depths"),
        (lambda folder: None, ""),
        (_turned, ""),
        (_small, ""),
    ],
    ids=["grey", "transparent", "16 bits", "8-bit depth", "another unit", "all hole", "no depth", "no picture", "whole", "turned by EXIF", "another size"],
)
def test_the_doctor_reads_ones_own_pictures(capsys, monkeypatch, tmp_path, change, expected):
    """One bad picture anywhere among twenty is named, and the stage that would read it says the same."""
    pictures = tmp_path / "pictures"
    monkeypatch.setattr(sys, "argv", ["write_pictures.py", str(pictures)])
    runpy.run_path(str(ROOT / "examples" / "write_pictures.py"), run_name="__main__")
    change(pictures)
    config = tmp_path / "own.yaml"
    config.write_text((ROOT / "config" / "own.yaml").read_text().replace("root: own/pictures", f"root: {pictures}"))
    found = failures(capsys, config)
    assert len(found) == bool(expected)
    assert all(expected in line for line in found), found
    if expected and "no depth" not in expected:
        status, _, err = said(capsys, "prepare", "--config", str(config), "--use", "labels", "--out", str(tmp_path / "labels.npz"))
        assert status == 2
        assert expected in err
        assert not (tmp_path / "labels.npz").exists()


def test_the_doctor_asks_for_what_others_publish(capsys, monkeypatch, tmp_path):
    for name in ("config", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    (found,) = (line for line in failures(capsys, Path("config/paper.yaml")) if "not there: unet, lsun_train" in line)  # a GPU may be missing, too
    assert "snakemake --cores 1 fetch --configfile config/paper.yaml" in found


U_NET = {"sample_size": 32, "block_out_channels": (8, 8), "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4}


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (UNet2DModel(layers_per_block=1, **U_NET), "heads.strong names decoder blocks [4, 5, 6, 7]; this U-Net has blocks 0 to 3"),
        (UNet2DModel(**U_NET, in_channels=4, out_channels=4), "has in_channels 4, expected an unconditional UNet2DModel of RGB pictures: neither latents"),
        (UNet2DModel(**U_NET, num_class_embeds=3), "is conditioned on classes (num_class_embeds is 3), expected an unconditional UNet2DModel"),
        (UNet2DConditionModel(**U_NET, cross_attention_dim=8), "holds a UNet2DConditionModel, expected an unconditional UNet2DModel of RGB pictures"),
    ],
    ids=["too few blocks", "latents", "classes", "text"],
)
def test_the_doctor_knows_which_models_are_supported(capsys, tmp_path, network, expected):
    network.save_pretrained(tmp_path / "model")
    (tmp_path / "own.yaml").write_text((ROOT / "config" / "own.yaml").read_text().replace("path: models/rooms32", f"path: {tmp_path / 'model'}"))
    found = failures(capsys, tmp_path / "own.yaml")
    assert len(found) == 1
    assert expected in found[0]
