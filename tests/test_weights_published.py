"""Published checkpoints: the full ADM architecture, presets, the layout of google/ddpm-*, averaged weights, hub names, `dag convert`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from standins import ADM_BEDROOM, adm_shapes, adm_state, write_adm, write_ddpm

from dag.__main__ import main
from dag.guided_diffusion import PRESETS, module_names, original_name, read_flags, rename
from dag.tensor_files import open_pickle
from dag.weights import load_unet

PRESET = "adm-lsun-bedroom-256"
TINY = {"width": 32, "mult": (1, 2), "blocks": 1, "factors": (2,)}
FLAGS = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "8",
    "num_head_channels": 32,
    "learn_sigma": True,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def adm(tmp_path) -> Path:
    return write_adm(tmp_path / "adm.pt", FLAGS, **TINY)


def test_the_description_of_the_stand_in_is_that_of_guided_diffusion(fixtures):
    state = torch.load(fixtures / "adm_tiny.pt", weights_only=True)
    ours = adm_shapes(width=32, mult=(1, 2, 3, 4), blocks=2, factors=(2, 4, 8))
    assert {key: tuple(value.shape) for key, value in state.items()} == ours


def test_every_key_of_the_full_bedroom_model_has_its_place():
    config, settings = read_flags(PRESETS[PRESET], Path(PRESET))
    shapes = adm_shapes(**ADM_BEDROOM)
    assert round(sum(torch.Size(s).numel() for s in shapes.values()) / 1e6, 1) == 552.8
    names = module_names(config)
    with torch.device("meta"):
        expected = {key: value.shape for key, value in UNet2DModel.from_config(config).state_dict().items()}
        file = {key: torch.empty(shape) for key, shape in shapes.items()}
    places = [(key, new, part.shape) for key, value in file.items() for new, part in rename(key, value, names, 64, False, Path("x.pt")).items()]
    assert len({new for _, new, _ in places}) == len(places)
    assert {new: shape for _, new, shape in places} == expected
    assert all(original_name(new, names) == key for key, new, _ in places)
    assert settings == {"prediction_type": "epsilon", "num_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


MEASURE = """
import sys
from diffusers.models.unets.unet_2d import UNet2DModel
from dag.weights import load_unet

def mib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

before = mib("VmHWM")
unet, meta = load_unet(sys.argv[1], sys.argv[2])
print(mib("VmHWM") - before, sum(p.numel() for p in unet.parameters()) * 4 / 2**20, unet.down_blocks[5].attentions[1].to_k.weight[:, 5].double().sum().item())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_loading_the_full_bedroom_model_takes_little_more_than_its_size(tmp_path):
    shapes = adm_shapes(**ADM_BEDROOM)
    state = adm_state(shapes)
    torch.save(state, tmp_path / "lsun_bedroom.pt")
    # The encoder's last attention; heads of 64 channels, each with its queries, keys and values one after the other.
    keys = state["input_blocks.17.1.qkv.weight"].reshape(16, 3, 64, 1024)[:, 1].reshape(1024, 1024)
    expected = keys[:, 5].double().sum().item()
    del state
    command = [sys.executable, "-c", MEASURE, tmp_path / "lsun_bedroom.pt", PRESET]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    peak, model, found = map(float, done.stdout.split())
    assert model == pytest.approx(552.8e6 * 4 / 2**20, rel=1e-3)
    assert peak <= 1.3 * model
    assert found == expected


def test_flags_may_be_a_preset_a_file_or_given(adm, tmp_path):
    expected = load_unet(adm)[0].state_dict()
    elsewhere = tmp_path / "flags" / "mine.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(json.dumps(FLAGS))
    adm.with_suffix(".json").unlink()
    assert same(load_unet(adm, elsewhere)[0].state_dict(), expected)
    assert same(load_unet(adm, FLAGS)[0].state_dict(), expected)
    with pytest.raises(FileNotFoundError, match=rf"adm\.pt: no flags beside it, .*preset \({PRESET}\)"):
        load_unet(adm)
    with pytest.raises(FileNotFoundError, match=rf"^adm-lsun-bedrom: no such file of flags, and no preset \({PRESET}\)$"):
        load_unet(adm, "adm-lsun-bedrom")
    with pytest.raises(ValueError, match=rf"of {PRESET}, num_channels is 256, the shapes imply 32 and channel_mult is") as error:
        load_unet(adm, PRESET)
    assert "channel_mult is [1, 1, 2, 2, 4, 4], the shapes imply [1, 2]" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_channels": 64}, "num_channels is 64, the shapes imply 32"),
        ({"num_res_blocks": 2}, "num_res_blocks is 2, the shapes imply 1"),
        ({"channel_mult": "1,2,2"}, "channel_mult is [1, 2, 2], the shapes imply [1, 2]"),
        ({"attention_resolutions": "16,8"}, "attention_resolutions is 16,8, the shapes imply 8"),
        ({"attention_resolutions": [1]}, "attention_resolutions is [1], the shapes imply [2]"),
        ({"learn_sigma": False}, "learn_sigma is False, the shapes imply True"),
        ({"use_scale_shift_norm": False}, "use_scale_shift_norm is False, the shapes imply True"),
        ({"resblock_updown": False}, "resblock_updown is False, the shapes imply True"),
        ({"in_channels": 1}, "in_channels is 1, the shapes imply 3"),
    ],
)
def test_flags_against_the_shapes_are_named_with_what_the_shapes_imply(adm, changes, words):
    with pytest.raises(ValueError, match=r"adm\.pt: ") as error:
        load_unet(adm, {**FLAGS, **changes})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_class_conditional_checkpoint_is_named_so(adm):
    state = {**torch.load(adm, weights_only=True), "label_emb.weight": torch.zeros(10, 128)}
    torch.save(state, adm)
    with pytest.raises(ValueError, match=r"key label_emb\.weight is not one of .* class_cond is False, the shapes imply True"):
        load_unet(adm)


def test_pickles_of_both_kinds_and_views_are_read_exactly(tmp_path):
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {"view": whole[1:3, ::2], "t": whole.T, "half": whole.half(), "bf": whole.bfloat16(), "one": torch.tensor(3), "none": torch.zeros(0, 2)}
    for name, new in (("new.pt", True), ("old.pt", False)):
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=new)
        file = open_pickle(tmp_path / name)
        assert same(file.all(), state)
        assert {key: spec.shape for key, spec in file.specs.items()} == {key: value.shape for key, value in state.items()}


@pytest.mark.parametrize("kind", ["bin", "safetensors", "ema.safetensors"])
def test_the_layout_of_google_ddpm_is_read(tmp_path, kind):
    unet = write_ddpm(tmp_path / "ddpm-ema-church-256", kind)
    loaded, settings = load_unet(tmp_path / "ddpm-ema-church-256")
    assert same(loaded.state_dict(), unet.state_dict())
    assert settings["prediction_type"] == "epsilon"


def test_averaged_weights_of_a_pipeline_are_a_folder_beside_its_own(tmp_path):
    unet = write_ddpm(tmp_path / "model" / "unet_ema")
    (tmp_path / "model" / "unet_ema" / "scheduler_config.json").unlink()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    (tmp_path / "model" / "scheduler").mkdir()
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps({"beta_start": 1e-4, "prediction_type": "v_prediction"}))
    loaded, settings = load_unet(tmp_path / "model" / "unet_ema")
    assert same(loaded.state_dict(), unet.state_dict())
    assert settings["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_hub_name_is_downloaded_without_what_is_not_needed(tmp_path, monkeypatch, kind):
    import huggingface_hub

    unet, asked = write_ddpm(tmp_path / "cache", kind), []

    def snapshot_download(repo, *, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert same(load_unet("google/ddpm-church-256@main")[0].state_dict(), unet.state_dict())
    first, second = ("google/ddpm-church-256", "main", ["*.json", "*.safetensors"]), ("google/ddpm-church-256", "main", ["*.json", "*.bin"])
    assert asked == ([first, second] if kind == "bin" else [first])


def test_a_hub_that_cannot_be_reached_is_one_line_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"^no-one/has-this-model: no such file or folder, and the hub ") as error:
        load_unet("no-one/has-this-model")
    assert str(error.value).endswith("; download its files where there is a network and give the path of their folder")
    assert "\n" not in str(error.value)


def test_flags_are_for_guided_diffusion_alone(tmp_path):
    write_ddpm(tmp_path / "model")
    with pytest.raises(ValueError, match="model: flags are given, expected none"):
        load_unet(tmp_path / "model", FLAGS)


def test_convert_writes_what_diffusers_reads(adm, tmp_path, capsys):
    from diffusers import DDPMPipeline

    assert main(["convert", str(adm), str(tmp_path / "out"), "--precision", "fp32"]) == 0
    expected = load_unet(adm)[0].state_dict()
    assert same(UNet2DModel.from_pretrained(tmp_path / "out").state_dict(), expected)
    assert same(load_unet(tmp_path / "out")[0].state_dict(), expected)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert same(pipeline.unet.state_dict(), expected)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert json.loads((tmp_path / "out" / "source.json").read_text())["sha256"] == load_unet(adm)[1]["sha256"]
    capsys.readouterr()
    assert main(["convert", str(adm), str(tmp_path / "other"), "--flags", PRESET]) == 2
    message = capsys.readouterr().err
    assert message.startswith("dag convert: ")
    assert message.count("\n") == 1
    assert "num_channels is 256, the shapes imply 32" in message
    assert not (tmp_path / "other").exists()
    assert main(["convert", str(adm), str(tmp_path / "other"), "--precision", "int8"]) == 2
    assert "precision is 'int8', expected one of fp16, bf16, fp32" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [0, 1000, 100_000, -10])
def test_a_truncated_checkpoint_is_one_line(adm, keep):
    adm.write_bytes(adm.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"adm\.pt: not a whole PyTorch file of tensors .* bytes found, copy or download it again"):
        load_unet(adm)
