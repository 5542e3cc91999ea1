"""FP8, int8 and MXFP4 as they lie in files: read by rows, merged into, refused where parts do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank
from lowrank.errors import CheckpointError, MergeError
from merge_disk_models import linear_factors, write_adapter

Q, OTHER = "layers.0.q_proj", "layers.0.k_proj"
D, K = 48, 64
FP8 = torch.float8_e4m3fn


def numbers(dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.int8:
        return torch.randint(-127, 128, (D, K), dtype=torch.int8)
    return torch.randn(D, K).mul(100).to(dtype)


def spread(scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The scale of every number, the slow and obvious way."""
    return torch.stack([torch.stack([scales[i // block[0], j // block[1]] for j in range(K)]) for i in range(D)])


FP8_CONFIG = {"quant_method": "fp8", "weight_block_size": [32, 32]}
FORMS: dict[str, tuple[torch.dtype, str, tuple[int, ...], tuple[int, int], dict[str, Any]]] = {
    "fp8 blocks": (FP8, "weight_scale_inv", (2, 2), (32, 32), FP8_CONFIG),  # the last block of rows is cut
    "fp8 channels": (FP8, "weight_scale", (D, 1), (1, K), {"quant_method": "compressed-tensors"}),
    "fp8 tensor": (FP8, "weight_scale", (), (D, K), {"quant_method": "compressed-tensors"}),
    "int8 channels": (torch.int8, "weight_scale", (D, 1), (1, K), {"quant_method": "compressed-tensors"}),
    "int8 groups": (torch.int8, "weight_scale", (D, 4), (1, 16), {"quant_method": "compressed-tensors"}),
}


def write(folder: Path, form: str, **changes: torch.Tensor | None) -> tuple[Path, torch.Tensor]:
    """(a base whose two weights are in the form, W0 of the first in bfloat16)."""
    dtype, name, grid, block, config = FORMS[form]
    tensors: dict[str, torch.Tensor] = {"norm.weight": torch.randn(K).bfloat16()}
    for path in (Q, OTHER):
        tensors[f"{path}.weight"] = numbers(dtype)
        tensors[f"{path}.{name}"] = torch.rand(grid) * 1e-3 + 1e-4
        tensors[f"{path}.input_scale"] = torch.ones(())
    scales = tensors[f"{Q}.{name}"].reshape(1, 1) if grid == () else tensors[f"{Q}.{name}"]
    weight = (tensors[f"{Q}.weight"].float() * spread(scales, block)).bfloat16()
    tensors = {key: tensor for key, tensor in (tensors | changes).items() if tensor is not None}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"quantization_config": config, "dtype": "bfloat16"}))
    return folder, weight


@pytest.mark.parametrize("form", FORMS)
def test_a_merge_is_that_into_the_dequantised_weight(tmp_path, form):
    base, weight = write(tmp_path / "base", form)
    plain = {"norm.weight": torch.randn(K).bfloat16(), f"{Q}.weight": weight}
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain" / "model.safetensors")
    adapter = write_adapter(tmp_path / "adapter", {k: 0.01 * t for k, t in linear_factors(Q, D, K).items()})
    for name in ("base", "plain"):
        lowrank.merge_checkpoint(tmp_path / name, adapter, tmp_path / f"{name}-out", verify="full")
    got, wanted = (load_file(tmp_path / f"{name}-out" / "model.safetensors") for name in ("base", "plain"))
    assert got.keys() == {"norm.weight", f"{Q}.weight", f"{OTHER}.weight"}
    assert torch.equal(got[f"{Q}.weight"], wanted[f"{Q}.weight"]) and got[f"{Q}.weight"].dtype is torch.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "base-out" / "config.json").read_text())
    assert base.is_dir()


@pytest.mark.parametrize("form", FORMS)
def test_small_numbers_go_back_into_their_own_form(tmp_path, form):
    """Every number is the nearest to W0 + ΔW, scales are the blocks' own, and all else is the base's, byte for byte."""
    base, weight = write(tmp_path / "base", form)
    adapter = write_adapter(tmp_path / "adapter", {k: 0.05 * t for k, t in linear_factors(Q, D, K).items()})
    report = lowrank.merge_checkpoint(base, adapter, tmp_path / "out", onto="quantised", verify="full")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    dtype, name, grid, block, _ = FORMS[form]
    assert before.keys() == after.keys() and all(before[key].dtype is after[key].dtype for key in before)
    assert {key for key in before if not same(before[key], after[key])} == {f"{Q}.weight", f"{Q}.{name}"}
    a, b = (0.05 * t for t in linear_factors(Q, D, K).values())
    wanted = weight.float() + 1.5 * b @ a
    scale = after[f"{Q}.{name}"].reshape(1, 1) if grid == () else after[f"{Q}.{name}"]
    largest = torch.finfo(dtype).max if dtype.is_floating_point else 127
    torch.testing.assert_close(scale * largest, amax_of(wanted, scale.shape, block))
    exact = wanted / spread(scale, block)
    rounded = exact.clamp(-largest, largest).to(dtype) if dtype.is_floating_point else exact.round().to(dtype)
    torch.testing.assert_close(after[f"{Q}.weight"].float(), rounded.float(), rtol=0.13, atol=1e-2)
    assert report.surviving[f"{Q}.weight"] > 0.5 and report.repacked == 1
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8)) if one.dim() else torch.equal(one, other)


def amax_of(matrix: torch.Tensor, grid: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    """The largest of every block, the slow and obvious way."""
    rows, columns = grid
    tall, wide = block
    return torch.stack(
        [
            torch.stack(
                [matrix[i * tall : (i + 1) * tall, j * wide : (j + 1) * wide].abs().max() for j in range(columns)]
            )
            for i in range(rows)
        ]
    )


@pytest.mark.parametrize("onto", ["16bit", "quantised"])
def test_stacks_of_fp8_experts_are_read_and_left_alone(tmp_path, onto):
    numbers, scales = torch.randn(3, 40, 64).mul(100).to(FP8), torch.rand(3, 2, 2) * 1e-3
    name = "layers.0.experts.gate_up_proj"
    base, _ = write(tmp_path / "base", "fp8 blocks", **{name: numbers, f"{name}_scale_inv": scales})
    adapter = write_adapter(tmp_path / "adapter", {k: 0.05 * t for k, t in linear_factors(Q, D, K).items()})
    lowrank.merge_checkpoint(base, adapter, tmp_path / "out", onto=onto, verify="full")
    got = load_file(tmp_path / "out" / "model.safetensors")
    if onto == "quantised":
        assert same(got[name], numbers) and torch.equal(got[f"{name}_scale_inv"], scales)
    else:
        wide = scales.repeat_interleave(32, 1)[:, :40].repeat_interleave(32, 2)
        assert torch.equal(got[name], (numbers.float() * wide).bfloat16()) and f"{name}_scale_inv" not in got


def test_a_stack_whose_scales_do_not_fit_is_said(tmp_path):
    name = "layers.0.experts.gate_up_proj"
    stack = {name: torch.ones(3, 40, 64).to(FP8), f"{name}_scale_inv": torch.ones(2, 2, 2)}
    base, _ = write(tmp_path / "base", "fp8 blocks", **stack)
    adapter = write_adapter(tmp_path / "adapter", linear_factors(Q, D, K))
    with pytest.raises(CheckpointError, match=r"gate_up_proj_scale_inv .* does not fit experts of shape \[3, 40, 64\]"):
        lowrank.merge_checkpoint(base, adapter, tmp_path / "out")


def test_four_bits_that_only_others_write_are_not_written(tmp_path):
    blocks = {"layers.0.q_proj.weight_packed": torch.zeros(6, 8, dtype=torch.int32)}
    base, _ = write(tmp_path / "base", "fp8 channels", **blocks)
    adapter = write_adapter(tmp_path / "adapter", linear_factors(Q, D, K))
    with pytest.raises(MergeError, match="compressed-tensors' packed integers"):
        lowrank.merge_checkpoint(base, adapter, tmp_path / "out")


SCALE = f"{Q}.weight_scale_inv"
FAULTS = {
    "no scales": ({SCALE: None}, r"its scales are missing \(weight_scale_inv or weight_scale\)"),
    "another shape": ({SCALE: torch.ones(5, 7)}, rf"{SCALE} cannot be read: its shape \[5, 7\] does not fit"),
    "another dtype": ({SCALE: torch.ones(2, 2, dtype=torch.int32)}, "it is I32, and should be F32 or BF16 or F16"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parts_that_do_not_fit_are_said_in_a_sentence(tmp_path, fault):
    changes, sentence = FAULTS[fault]
    base, _ = write(tmp_path / "base", "fp8 blocks", **changes)
    adapter = write_adapter(tmp_path / "adapter", linear_factors(Q, D, K))
    with pytest.raises(CheckpointError, match=sentence):
        lowrank.merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_cannot_become_plain_as_a_whole_is_refused(tmp_path):
    stack = {"layers.0.experts.weight": torch.ones(2, 3, 4).to(FP8)}
    base, _ = write(tmp_path / "base", "fp8 blocks", **stack)
    adapter = write_adapter(tmp_path / "adapter", linear_factors(Q, D, K))
    with pytest.raises(MergeError, match=r"holds layers.0.experts.weight .* so it cannot become plain as a whole"):
        lowrank.merge_checkpoint(base, adapter, tmp_path / "out")


def test_mxfp4_experts_become_numbers_beside_a_merged_weight(tmp_path):
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(115, 130, (3, 10, 2), dtype=torch.uint8)
    name = "layers.0.experts.down_proj"
    (tmp_path / "base").mkdir()
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{Q}.weight": torch.randn(D, K).bfloat16()}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    adapter = write_adapter(tmp_path / "adapter", linear_factors(Q, D, K))
    lowrank.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", verify="full")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == {name, f"{Q}.weight"}
    assert torch.equal(got[name], integration.convert_moe_packed_tensors(blocks, scales))


def test_what_nobody_reads_is_named_with_who_does(tmp_path):
    (tmp_path / "base").mkdir()
    save_file(
        {f"{Q}.qweight": torch.zeros(1, 6, dtype=torch.int32), f"{OTHER}.weight": torch.randn(D, K)},
        tmp_path / "base" / "model.safetensors",
    )
    adapter = write_adapter(tmp_path / "adapter", linear_factors(Q, D, K))
    with pytest.raises(CheckpointError, match=r"GPTQ or AWQ, which gptqmodel dequantises.*give the model it was made"):
        lowrank.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
