"""Files of other programs and other years: read for what they are, or told what they are."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank
from lowrank.adapters.convert import convert_adapter
from lowrank.checkpoint.adapter_folder import target_of
from lowrank.checkpoint.read import read_adapter
from lowrank.errors import CheckpointError, ConfigError, LowrankError
from merge_disk_models import linear_factors, write_adapter, write_base

QKV = "transformer.h.0.self_attention.query_key_value"


def old_bloom(folder, pickled):
    """As PEFT 0.2 saved MergedLinear layers: B a grouped 1×1 convolution, query and value of a fused projection."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((6, 8), (16, 3, 1)))
    tensors = {f"base_model.model.{QKV}.lora_A.weight": a, f"base_model.model.{QKV}.lora_B.weight": b}
    folder.mkdir()
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 7, "enable_lora": [True, False, True], "bias": "none",
        "target_modules": ["query_key_value"], "fan_in_fan_out": False, "base_model_name_or_path": "bloom",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    wanted = torch.zeros(
        24, 8
    )  # PEFT 0.2: delta_w = conv1d(A, B, groups=2) * scaling on the rows of the enabled thirds
    wanted[:8], wanted[16:] = 7 / 3 * b[:8, :, 0] @ a[:3], 7 / 3 * b[8:, :, 0] @ a[3:]
    return wanted


@pytest.mark.parametrize("pickled", [True, False])
def test_peft_0_2s_merged_linear_folder_is_read_as_its_config_says(tmp_path, pickled):
    wanted = old_bloom(tmp_path / "in", pickled)
    with pytest.raises(CheckpointError, match="lowrank convert"):
        read_adapter(tmp_path / "in", allow_pickle=True)
    if pickled:
        with pytest.raises(CheckpointError, match="is a pickle"):
            convert_adapter(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ConfigError, match="says its scale"):
        convert_adapter(tmp_path / "in", tmp_path / "out", alpha=3, allow_pickle=True)
    convert_adapter(tmp_path / "in", tmp_path / "out", allow_pickle=pickled)
    target = target_of(read_adapter(tmp_path / "out"), QKV)
    assert torch.allclose(target.scale * target.b @ target.a, wanted, atol=1e-6)
    base = write_base(tmp_path / "base", {f"{QKV}.weight": (24, 8)}, {})
    lowrank.merge_checkpoint(base, tmp_path / "out", tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors")[f"{QKV}.weight"] for f in (base, tmp_path / "merged"))
    assert torch.allclose(after - before, wanted, atol=1e-5)


def test_its_weights_alone_are_read_with_what_the_caller_says(tmp_path):
    wanted = old_bloom(tmp_path / "in", pickled=True)
    file = tmp_path / "in" / "adapter_model.bin"
    convert_adapter(file, tmp_path / "out", alpha=7, enable_lora=[True, False, True], allow_pickle=True)
    target = target_of(read_adapter(tmp_path / "out"), QKV)
    assert torch.allclose(target.scale * target.b @ target.a, wanted, atol=1e-6)


@pytest.mark.parametrize("change", [{"lora_alpha": None}, {"enable_lora": "true"}, {"enable_lora": [True, True, True]}])
def test_a_merged_linear_config_that_says_too_little_is_refused(tmp_path, change):
    old_bloom(tmp_path / "in", pickled=False)
    config = tmp_path / "in" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(LowrankError, match=r"lora_alpha|enable_lora"):
        convert_adapter(tmp_path / "in", tmp_path / "out")


def test_a_kohya_file_is_called_one(tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}
    save_file(tensors | {f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "kohya.safetensors")
    for alpha in (None, 1.0):
        with pytest.raises(CheckpointError, match=r"is a kohya file .* diffusers"):
            convert_adapter(tmp_path / "kohya.safetensors", tmp_path / "out", alpha=alpha)
    folder = write_adapter(tmp_path / "folder", linear_factors("q_proj", 6, 4))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="is a kohya file"):
        read_adapter(folder)


@pytest.mark.parametrize("to", ["loralib", "gguf"])
@pytest.mark.parametrize("name", ["x", "x.onnx", "x.v2"])
def test_a_file_gets_an_ending_by_which_it_is_known(tmp_path, to, name):
    made = write_adapter(tmp_path / "in", linear_factors("q_proj", 6, 4))
    with pytest.raises(ConfigError, match="must end in"):
        convert_adapter(made, tmp_path / name, to=to)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("b", [(6, 2, 1), (6, 2, 1, 1)])
def test_a_b_with_more_dimensions_than_its_a_is_refused(tmp_path, b):
    factors = {"q_proj.lora_A.weight": torch.ones(2, 4), "q_proj.lora_B.weight": torch.ones(b)}
    made = write_adapter(tmp_path / "in", factors)
    with pytest.raises(CheckpointError, match="q_proj has A"):
        read_adapter(made)
    turned = {"q_proj.lora_A.weight": torch.ones(2, 4, 1), "q_proj.lora_B.weight": torch.ones(6, 2)}
    with pytest.raises(CheckpointError, match="q_proj has A"):
        read_adapter(write_adapter(tmp_path / "turned", turned))


def test_every_file_is_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        made = write_adapter(tmp_path / "in", linear_factors("lm_head", 6, 4))
        convert_adapter(made, tmp_path / "x.safetensors", to="loralib")
        convert_adapter(made, tmp_path / "x.bin", to="loralib")
        convert_adapter(made, tmp_path / "mlx", to="mlx")
        convert_adapter(made, tmp_path / "peft")
        base = write_base(tmp_path / "base", {"lm_head.weight": (6, 4)}, {})
        lowrank.merge_checkpoint(base, made, tmp_path / "merged")
        old = tmp_path / "old"
        old.mkdir()
        torch.save({"q_proj.weight": torch.ones(6, 4)}, old / "pytorch_model.bin")
        convert_adapter(old, tmp_path / "new", to="safetensors", allow_pickle=True)
    finally:
        os.umask(before)
    written = [tmp_path / "x.safetensors", tmp_path / "x.bin"]
    written += [file for name in ("mlx", "peft", "merged", "new") for file in (tmp_path / name).iterdir()]
    assert len(written) >= 8
    assert {file.name: oct(stat.S_IMODE(file.stat().st_mode)) for file in written} == {f.name: "0o640" for f in written}
