"""Weight files: what is written is read back by us and by diffusers, and what is missing, damaged or foreign is named."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from dag.diffusion import Diffusion
from dag.weights import architecture, load_module_file, load_unet, save_module, save_unet, sha256

CONFIG = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 8,
}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def tiny(**changes) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**{**CONFIG, **changes}).eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


@pytest.fixture
def pipeline(tmp_path):
    """A diffusers pipeline folder in float32, and the network in it."""
    unet = tiny()
    save_unet(unet, tmp_path / "model", prediction_type="v_prediction", diffusion=Diffusion(500, 2e-4, 0.03), dtype=torch.float32)
    return tmp_path / "model", unet


def test_diffusers_reads_what_we_write(pipeline):
    from diffusers import DDPMPipeline

    folder, unet = pipeline
    assert same(UNet2DModel.from_pretrained(folder, subfolder="unet"), unet)
    loaded = DDPMPipeline.from_pretrained(folder)
    assert same(loaded.unet, unet)
    scheduler = loaded.scheduler.config
    assert (scheduler.prediction_type, scheduler.num_train_timesteps, scheduler.beta_schedule) == ("v_prediction", 500, "linear")
    assert (scheduler.beta_start, scheduler.beta_end, scheduler.variance_type) == (2e-4, 0.03, "fixed_small")


def test_we_read_what_we_write(pipeline):
    folder, unet = pipeline
    for path in (folder, str(folder), folder / "unet"):
        loaded, settings = load_unet(path)
        assert same(loaded, unet)
        assert settings == {
            "prediction_type": "v_prediction",
            "num_timesteps": 500,
            "beta_start": 2e-4,
            "beta_end": 0.03,
            "beta_schedule": "linear",
            "learn_sigma": False,
            "sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        }
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert architecture(loaded) == architecture(unet)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]


def test_we_read_what_diffusers_writes(tmp_path):
    unet = tiny(out_channels=6, time_embedding_type="fourier")
    unet.save_pretrained(tmp_path / "flat")
    loaded, settings = load_unet(tmp_path / "flat")
    assert same(loaded, unet)
    assert {k: v for k, v in settings.items() if k != "sha256"} == {
        "prediction_type": "epsilon",
        "num_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "learn_sigma": True,
    }
    unet.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert same(load_unet(tmp_path / "bin")[0], unet)


def test_half_precision_files_load_as_float32(tmp_path):
    unet = tiny()
    save_unet(unet, tmp_path / "half", prediction_type="epsilon", diffusion=Diffusion())
    assert all(v.dtype == torch.float16 for v in load_file(tmp_path / "half" / WEIGHTS).values())
    assert same(load_unet(tmp_path / "half")[0], unet.half().float())
    unet.half().save_pretrained(tmp_path / "variant", variant="fp16")
    loaded, _ = load_unet(tmp_path / "variant")
    assert same(loaded, unet.float())


def test_an_existing_folder_keeps_its_other_files(pipeline):
    folder, _ = pipeline
    (folder / "README.md").write_text("card")
    other = tiny(block_out_channels=(8, 24))
    save_unet(other, folder, prediction_type="epsilon", diffusion=Diffusion(), dtype=torch.float32)
    loaded, settings = load_unet(folder)
    assert same(loaded, other)
    assert settings["prediction_type"] == "epsilon"
    assert (folder / "README.md").read_text() == "card"


def test_old_names_of_attention_are_understood(pipeline):
    folder, unet = pipeline
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = unet.state_dict()
    for new, name in old.items():
        state = {k.replace(f".{new}.", f".{name}."): v for k, v in state.items()}
    assert any(".proj_attn." in k for k in state)
    save_file(state, folder / WEIGHTS)
    assert same(load_unet(folder)[0], unet)


def test_own_file_carries_its_architecture(tmp_path):
    unet = tiny()
    path = tmp_path / "new" / "unet.safetensors"
    save_module(unet, {"architecture": architecture(unet), "prediction_type": "sample", "num_timesteps": 100}, path)
    loaded, settings = load_unet(path)
    assert same(loaded, unet)
    assert (settings["prediction_type"], settings["num_timesteps"], settings["sha256"]) == ("sample", 100, sha256(path))
    assert [p.name for p in path.parent.iterdir()] == ["unet.safetensors"]


def test_module_round_trip(tmp_path):
    module, config = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), {"channels": {"2": 8}, "blocks": [2, 4], "rate": 0.1, "name": "weak", "none": None}
    save_module(module, config, tmp_path / "head.safetensors")
    state, loaded = load_module_file(tmp_path / "head.safetensors")
    assert loaded == config
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in module.state_dict().items())
    with pytest.raises(ValueError, match=r"head\.safetensors: its metadata has blocks.*expected the architecture"):
        load_unet(tmp_path / "head.safetensors")


def spoil(folder, change) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


@pytest.mark.parametrize("config", ["hello", "[1, 2]", "3"])
def test_metadata_that_is_no_config_is_named(tmp_path, config):
    save_file({"x": torch.zeros(1)}, tmp_path / "heads.safetensors", {"config": config})
    with pytest.raises(ValueError, match=r"heads\.safetensors: 'config' of its metadata is no JSON object"):
        load_module_file(tmp_path / "heads.safetensors")


def test_a_module_saved_twice_gives_the_same_bytes(tmp_path):
    """Whatever the number of keys of its config."""
    module, config = nn.Linear(3, 4), {f"key{i}": i for i in range(40)}
    for name in ("one", "two"):
        save_module(module, config, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert load_module_file(tmp_path / "one")[1] == config


def test_every_tensor_is_used_once_and_fits(pipeline):
    folder, _ = pipeline
    original = (folder / WEIGHTS).read_bytes()
    cases = (
        (lambda s: s.pop("conv_in.bias"), "key conv_in.bias is missing"),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), "key extra.weight is not one of this network's"),
        (lambda s: s.update({"conv_in.bias": torch.zeros(9)}), "conv_in.bias has shape (9,), expected (8,)"),
    )
    for change, words in cases:
        (folder / WEIGHTS).write_bytes(original)
        spoil(folder, change)
        with pytest.raises(ValueError) as error:  # noqa: PT011 one_line looks at the message
            load_unet(folder)
        one_line(error, WEIGHTS, words)


@pytest.mark.parametrize("keep", [0, 5, 300, -10])
def test_truncated_safetensors(pipeline, keep):
    folder, _ = pipeline
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(ValueError, match="not a whole safetensors file") as error:
        load_unet(folder)
    one_line(error, WEIGHTS, f"{len(data[:keep])} bytes")


@pytest.mark.parametrize("keep", [0, 5, 300, 10_000, -10])
def test_truncated_pickle(tmp_path, keep):
    tiny().save_pretrained(tmp_path, safe_serialization=False)
    file = tmp_path / "diffusion_pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a whole PyTorch file") as error:
        load_unet(tmp_path)
    one_line(error, file.name)


def test_pickles_of_anything_but_tensors_are_not_run(tmp_path):
    tiny().save_pretrained(tmp_path, safe_serialization=False)
    file = tmp_path / "diffusion_pytorch_model.bin"
    torch.save(nn.Linear(1, 1), file)
    with pytest.raises(ValueError, match="holds more than tensors, which could run code and is not read; expected a state dict: tensors by name$"):
        load_unet(tmp_path)
    torch.save([torch.zeros(1)], file)
    with pytest.raises(ValueError, match="holds a list, expected a state dict"):
        load_unet(tmp_path)


def test_missing_files_are_named(pipeline, tmp_path):
    folder, _ = pipeline
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder"):
        load_unet(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors: no such file"):
        load_module_file(tmp_path / "absent.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: has neither config\.json nor unet/config\.json"):
        load_unet(tmp_path / "empty")
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ValueError, match=r"model\.onnx: a \.onnx file, expected"):
        load_unet(tmp_path / "model.onnx")
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights, expected one of diffusion_pytorch_model\.safetensors"):
        load_unet(folder)
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json: missing"):
        load_unet(folder)


def rewrite(file, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type is 'flow', expected one of epsilon"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "has trained_betas"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "has rescale_betas_zero_snr"),
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "a UNet2DConditionModel, expected a UNet2DModel"),
        ("unet/config.json", {"num_class_embeds": 10}, "class-conditional"),
        ("unet/config.json", {"down_block_types": ["NoBlock2D", "DownBlock2D"]}, "NoBlock2D"),
    ],
)
def test_configs_that_do_not_fit(pipeline, file, changes, words):
    folder, _ = pipeline
    rewrite(folder / file, **changes)
    with pytest.raises(ValueError) as error:  # noqa: PT011 one_line looks at the message
        load_unet(folder)
    one_line(error, str(folder), words)


def test_damaged_json(pipeline):
    folder, _ = pipeline
    (folder / "unet" / "config.json").write_text('{"in_channels": 3,')
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        load_unet(folder)


def test_unknown_prediction_type_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="prediction_type is 'eps', expected one of epsilon"):
        save_unet(tiny(), tmp_path / "model", prediction_type="eps", diffusion=Diffusion())
    assert not list(tmp_path.iterdir())


@pytest.fixture
def adm(fixtures, tmp_path):
    for name in ("adm_tiny.pt", "adm_tiny.json"):
        shutil.copyfile(fixtures / name, tmp_path / name)
    return tmp_path / "adm_tiny.pt"


def test_guided_diffusion_becomes_a_diffusers_folder(adm, tmp_path):
    unet, settings = load_unet(adm)
    assert (settings["prediction_type"], settings["num_timesteps"], settings["learn_sigma"]) == ("epsilon", 1000, True)
    assert (settings["beta_start"], settings["beta_end"], settings["sha256"]) == (1e-4, 0.02, sha256(adm))
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in unet.parameters())
    save_unet(unet, tmp_path / "model", prediction_type="epsilon", diffusion=Diffusion())
    assert same(load_unet(tmp_path / "model")[0], unet)
    assert json.loads((tmp_path / "model/scheduler/scheduler_config.json").read_text())["variance_type"] == "learned_range"


def test_flags_of_the_command_line_say_the_same(adm):
    unet, _ = load_unet(adm)
    flags = json.loads(adm.with_suffix(".json").read_text())
    flags["num_channels"] = flags.pop("model_channels")
    flags.update(attention_resolutions="16,8,4", channel_mult="1,2,3,4", class_cond=False)
    del flags["out_channels"]
    adm.with_suffix(".json").unlink()
    adm.with_suffix(".yaml").write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in flags.items()))
    assert same(load_unet(adm)[0], unet)


def test_new_attention_order_stores_the_same_rows_otherwise(adm):
    unet, _ = load_unet(adm)
    state = torch.load(adm, weights_only=True)
    for key in [k for k in state if ".qkv." in k]:
        rows, head_dim = len(state[key]) // 3, 16
        heads_first = state[key].reshape(rows // head_dim, 3, head_dim, *state[key].shape[1:])
        state[key] = heads_first.transpose(0, 1).reshape(state[key].shape)
    torch.save(state, adm)
    rewrite(adm.with_suffix(".json"), use_new_attention_order=True)
    assert same(load_unet(adm)[0], unet)


def test_guided_diffusion_keys_are_used_once_and_fit(adm):
    original = torch.load(adm, weights_only=True)
    key = "output_blocks.5.2.in_layers.0.weight"
    cases = (
        ({k: v for k, v in original.items() if k != key}, f"key {key} is missing"),
        ({k: v for k, v in original.items() if k != "middle_block.1.qkv.bias"}, "key middle_block.1.qkv.bias is missing"),
        ({**original, "label_emb.weight": torch.zeros(1)}, "key label_emb.weight is not one of"),
        ({**original, key: torch.zeros(3)}, f"{key} has shape (3,), expected (96,)"),
        ({**original, "middle_block.1.qkv.weight": torch.zeros(5, 128, 1)}, "middle_block.1.qkv.weight has 5 rows"),
    )
    for state, words in cases:
        torch.save(state, adm)
        with pytest.raises(ValueError) as error:  # noqa: PT011 one_line looks at the message
            load_unet(adm)
        one_line(error, "adm_tiny.pt", words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_head_chanels": 16}, "unknown flag num_head_chanels"),
        ({"class_cond": True}, "class_cond is True, expected False"),
        ({"noise_schedule": "cosine"}, "noise_schedule is 'cosine', expected 'linear'"),
        ({"num_head_channels": -1}, "num_heads is 4 without num_head_channels"),
        ({"use_scale_shift_norm": "False"}, "use_scale_shift_norm is 'False', expected true or false"),
        ({"channel_mult": "a,b"}, "channel_mult is 'a,b', expected numbers"),
    ],
)
def test_flags_that_do_not_fit(adm, changes, words):
    rewrite(adm.with_suffix(".json"), **changes)
    with pytest.raises(ValueError) as error:  # noqa: PT011 one_line looks at the message
        load_unet(adm)
    one_line(error, "adm_tiny.json", words)


def test_flags_that_contradict_the_weights(adm):
    rewrite(adm.with_suffix(".json"), attention_resolutions=[4, 8])
    with pytest.raises(ValueError, match=r"key input_blocks\.4\.1\.norm\.weight is not one of the network that its flags describe"):
        load_unet(adm)


def test_flags_must_be_there(adm):
    adm.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no flags beside it, expected adm_tiny\.json or adm_tiny\.yaml"):
        load_unet(adm)


def test_plain_resampling_and_one_head_have_their_names(tmp_path):
    """The older layout: strided convolutions instead of resampling ResNets, one head, no scale and shift. Names were written down from its code."""
    from dag.guided_diffusion import module_names, original_name, read_flags

    flags = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "8", "num_heads": 1}
    config, _ = read_flags({**flags, "use_scale_shift_norm": False, "resblock_updown": False}, tmp_path)
    assert config["attention_head_dim"] is None
    names = module_names(config)
    assert names["input_blocks.2.0.op"] == "down_blocks.0.downsamplers.0.conv"
    assert names["output_blocks.1.2.conv"] == "up_blocks.0.upsamplers.0.conv"
    parameters = UNet2DModel(**config).state_dict()
    originals = {original_name(key, names) for key in parameters}
    assert originals.isdisjoint(parameters)
    assert len(originals) == len(parameters) - 2 * 2 * sum(".to_q.weight" in key for key in parameters)
