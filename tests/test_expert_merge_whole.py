"""Merging adapters of stacked experts on disk, into checkpoints of whole stacks: memory's bits, in any layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lowrank
from expert_models import FAMILIES, adapted, mixture
from lowrank.files.safetensors import read_tensors
from test_expert_merge import assert_both_are_merged, saved, tensors

WHOLE = ("granitemoe", "gpt_oss", "llama4_text")  # as transformers writes them; every other one can be kept so, too


def assert_as_in_memory(folder: Path, family: str, model: torch.nn.Module, **how: object) -> dict[str, Tensor]:
    """Merged on disk and in memory, the tensors are the same, bit for bit; those of the result."""
    base = tensors(folder / "base")
    report = lowrank.merge_checkpoint(folder / "base", folder / "adapter", folder / "out")
    lowrank.merge_and_unload(model)
    model.save_pretrained(folder / "memory", **how)
    got, wanted = tensors(folder / "out"), tensors(folder / "memory")
    assert list(got) == list(base) and got.keys() == wanted.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, wanted[name]), name
    assert report.merged == sum(not torch.equal(tensor, base[name]) for name, tensor in got.items()) > 0
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("family", WHOLE)
def test_stacks_as_transformers_writes_them(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = saved(family, tmp_path, dtype, target_modules=["lm_head"])
    assert_as_in_memory(tmp_path, family, model)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(WHOLE)))
def test_stacks_under_the_models_own_names(family: str, tmp_path: Path) -> None:
    model = mixture(family)
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    adapted(model)
    lowrank.save_adapter(model, tmp_path / "adapter")
    got = assert_as_in_memory(tmp_path, family, model, save_original_format=False)
    assert any(tensor.dim() == 3 and "experts" in name for name, tensor in got.items())


# How files can have the matrices of Qwen3-MoE's stacks; transformers does the like for Qwen3-VL, NeMo, Inkling, Step-3.
LAYOUTS: dict[str, tuple[str, str]] = {
    "transposed": ("mlp.experts.gate_and_up", "Transpose"),
    "interleaved": ("mlp.experts.w13", "Interleave"),
    "apart": ("moe.gate_proj.weight", "Concatenate"),
}


def entry(layout: str) -> object:
    """The line of transformers' table for gate_up_proj in this layout."""
    from transformers import core_model_loading as loading

    sources = ["moe.gate_proj.weight", "moe.up_proj.weight"] if layout == "apart" else [LAYOUTS[layout][0]]
    make = {
        "transposed": lambda: loading.Transpose(1, 2),
        "interleaved": lambda: loading.Interleave(1),
        "apart": lambda: loading.Concatenate(1),
    }[layout]
    return loading.WeightConverter(sources, ["mlp.experts.gate_up_proj"], operations=[make()])


def as_in_files(layout: str, model: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors as files of this layout have them."""
    files = {}
    for name, tensor in model.items():
        stem = name.removesuffix("mlp.experts.gate_up_proj")
        if stem == name:
            files[name] = tensor
        elif layout == "transposed":
            files[f"{stem}mlp.experts.gate_and_up"] = tensor.mT.contiguous()
        elif layout == "interleaved":
            files[f"{stem}mlp.experts.w13"] = torch.stack(tensor.chunk(2, 1), 2).flatten(1, 2)
        else:
            for word, half in zip(("gate", "up"), tensor.chunk(2, 1), strict=True):
                files[f"{stem}moe.{word}_proj.weight"] = half.contiguous()
    return files


def saved_turned(layout: str, folder: Path, monkeypatch: pytest.MonkeyPatch, adapt: Any = adapted) -> Any:
    """An adapted mixture, its adapter and its base in files that hold experts in this layout, as a table says."""
    from transformers import conversion_mapping

    model = mixture("qwen3_moe")
    model.save_pretrained(folder / "base", save_original_format=False)
    file = folder / "base" / "model.safetensors"
    save_file(as_in_files(layout, read_tensors(file)), file)
    adapt(model)
    lowrank.save_adapter(model, folder / "adapter")
    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", lambda _: [entry(layout)])
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_the_table_turns_into_the_models(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved_turned(layout, tmp_path, monkeypatch)
    report = lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify="full")
    monkeypatch.undo()
    assert len(report.surviving) == 2 * 4 * {"transposed": 2, "interleaved": 2, "apart": 3}[layout]
    lowrank.merge_and_unload(model)
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    got, wanted = tensors(tmp_path / "out"), as_in_files(layout, tensors(tmp_path / "memory"))
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, wanted[name]), name


SQUARE = {  # both sizes of down_proj are 32
    "granitemoe": {"intermediate_size": 32},
    "gpt_oss": {"intermediate_size": 32},
    "llama4_text": {"intermediate_size": 32},
}


@pytest.mark.parametrize("family", SQUARE)
@pytest.mark.parametrize("stacks", ["down_proj", r"\w+"])
def test_square_matrices_go_the_way_of_the_other_stacks_or_of_the_models_class(
    family: str, stacks: str, tmp_path: Path
) -> None:
    model = mixture(family, **SQUARE[family])
    model.save_pretrained(tmp_path / "base")
    adapted(model, target_parameters=rf".*\.experts\.{stacks}")
    lowrank.save_adapter(model, tmp_path / "adapter")
    assert_as_in_memory(tmp_path, family, model)


def test_square_matrices_of_an_unknown_class_are_refused(tmp_path: Path) -> None:
    import json

    model = mixture("gpt_oss", **SQUARE["gpt_oss"])
    model.save_pretrained(tmp_path / "base")
    adapted(model, target_parameters=["experts.down_proj"])
    lowrank.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"architectures": ["OursForCausalLM"]}))
    with pytest.raises(lowrank.LowrankError, match=r"square matrices, and its config\.json names no model"):
        lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_adapters_of_whole_stacks_and_weights_add_up(tmp_path: Path) -> None:
    model = saved("granitemoe", tmp_path)
    adapted(model, "two", 5, r=2, lora_alpha=3)
    assert_both_are_merged(model, tmp_path)


def test_what_no_adapter_changes_is_moved_byte_for_byte(tmp_path: Path) -> None:
    saved("granitemoe", tmp_path, target_parameters=[r"0.block_sparse_moe.experts.down_proj"])
    report = lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify="full")
    base, got = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    assert [name for name in base if not torch.equal(base[name], got[name])] == [
        "model.layers.0.block_sparse_moe.output_linear.weight"
    ]
    assert (report.merged, report.moved) == (1, len(base) - 1)


def test_an_experts_wrong_values_are_found_and_named(tmp_path: Path) -> None:
    saved("granitemoe", tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    held = read_tensors(file)
    name = "model.layers.1.block_sparse_moe.input_linear.weight"
    held[name][2, 60, 3] = torch.inf
    save_file(held, file)
    with pytest.raises(lowrank.LowrankError, match=f"expert 2 of {name}, rows from 48 on of the base holds values"):
        lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stack_of_another_number_of_experts_or_of_no_known_layout_is_refused_by_name(tmp_path: Path) -> None:
    saved("granitemoe", tmp_path / "four")
    mixture("granitemoe", num_local_experts=3).save_pretrained(tmp_path / "three")
    with pytest.raises(lowrank.LowrankError, match=r"linear.weight, 3 experts of 32×48, want \[9, 48\] and \[32, 9\]"):
        lowrank.merge_checkpoint(tmp_path / "three", tmp_path / "four" / "adapter", tmp_path / "out")
    file = tmp_path / "four" / "base" / "model.safetensors"
    held = read_tensors(file)
    other = {name.replace("input_linear.weight", "experts.all_in_one"): tensor for name, tensor in held.items()}
    save_file(other, file)
    with pytest.raises(lowrank.LowrankError, match=r"gate_up_proj: the base has no such experts, but .*all_in_one"):
        lowrank.merge_checkpoint(tmp_path / "four" / "base", tmp_path / "four" / "adapter", tmp_path / "out")
    save_file({name.replace("output_linear.weight", "experts.other"): t for name, t in other.items()}, file)
    with pytest.raises(lowrank.LowrankError, match=r"has none in a layout that .* knows \(but .*all_in_one"):
        lowrank.merge_checkpoint(tmp_path / "four" / "base", tmp_path / "four" / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stacks_in_mxfp4_become_plain_with_the_bits_of_a_merge_in_memory(tmp_path: Path) -> None:
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    model = mixture("gpt_oss", intermediate_size=64).bfloat16()
    packed, torch_draws = {}, torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            experts, columns, rows = parameter.shape
            shape = (experts, rows, columns // 32, 16)
            packed[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch_draws)
            packed[f"{name}_scales"] = torch.randint(120, 125, shape[:3], dtype=torch.uint8, generator=torch_draws)
            parameter.data = integration.convert_moe_packed_tensors(*list(packed.values())[-2:])
        else:
            packed[name] = parameter.data.clone()
    (tmp_path / "base").mkdir()
    save_file(packed, tmp_path / "base" / "model.safetensors")
    model.config.quantization_config = {"quant_method": "mxfp4"}
    model.config.save_pretrained(tmp_path / "base")
    del model.config.quantization_config
    adapted(model)
    lowrank.save_adapter(model, tmp_path / "adapter")
    lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    lowrank.merge_and_unload(model)
    got = tensors(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(got[name], parameter), name
    report = lowrank.merge_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "packed", onto="quantised", verify="full"
    )
    again = tensors(tmp_path / "packed")
    assert again.keys() == packed.keys() and report.repacked == 4 and min(report.surviving.values()) > 0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() < 3:
            assert torch.equal(again[name], packed[name])
            continue
        blocks, scales = again[f"{name}_blocks"], again[f"{name}_scales"]
        step = torch.exp2(scales.float() - 127).repeat_interleave(32, 2).transpose(1, 2)  # a block's; its widest is 2
        difference = (integration.convert_moe_packed_tensors(blocks, scales).float() - parameter.float()).abs()
        assert (difference <= 2.05 * step).all() and difference.norm() < 0.2 * parameter.float().norm()


def saved_in_fp8(model: torch.nn.Module, folder: Path) -> dict[str, Tensor]:
    """The files' tensors of the model with its stacks in FP8; in place: the model has the numbers that these hold."""
    files, largest = {}, torch.finfo(torch.float8_e4m3fn).max
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            scales = (parameter.detach().float().abs().amax((1, 2), keepdim=True) / largest).contiguous()
            files[name], files[f"{name}_scale_inv"] = (parameter / scales).to(torch.float8_e4m3fn), scales
            parameter.data = (files[name].float() * scales).bfloat16()
        else:
            files[name] = parameter.data.clone()
    folder.mkdir()
    save_file(files, folder / "model.safetensors")
    model.config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model.config.save_pretrained(folder)
    del model.config.quantization_config
    return files


@pytest.mark.parametrize("onto", ["16bit", "quantised"])
def test_stacks_in_fp8_are_merged_into_and_go_back_into_their_blocks(onto: str, tmp_path: Path) -> None:
    model = mixture("qwen3_moe").bfloat16()
    files = saved_in_fp8(model, tmp_path / "base")
    adapted(model)
    lowrank.save_adapter(model, tmp_path / "adapter")
    lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", onto=onto, verify="full")
    lowrank.merge_and_unload(model)
    got = tensors(tmp_path / "out")
    assert got.keys() == (files.keys() if onto == "quantised" else dict(model.named_parameters()).keys())
    for name, parameter in model.named_parameters():
        if onto == "16bit" or parameter.dim() < 3:
            assert torch.equal(got[name], parameter), name
        else:
            back = got[name].float() * got[f"{name}_scale_inv"]
            assert (back - parameter).norm() < 0.05 * parameter.float().norm()
