"""Merging adapters of stacked experts on disk, into checkpoints that keep the experts one by one: memory's bits."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank
from expert_models import adapted, answer, mixture
from lowrank.analysis.inspection import inspect_adapter
from lowrank.files.safetensors import read_tensors
from lowrank.injection.adapters import lora_layers
from train_models import save_llama

ONE_BY_ONE = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "qwen3_next", "jamba", "nemotron_h")


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A mixture as transformers writes it, and the same with an adapter in memory, which is saved beside it."""
    model = mixture(family).to(dtype)
    model.save_pretrained(folder / "base")
    adapted(model, **options)
    lowrank.save_adapter(model, folder / "adapter")
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint, by their names in the files."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in read_tensors(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_the_result_has_the_bits_of_a_merge_in_memory(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = saved(family, tmp_path, dtype, target_modules=["lm_head"])
    names = list(tensors(tmp_path / "base"))
    assert any(".experts.3." in name for name in names)
    report = lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.merged == 1 + sum(".experts." in name for name in names)
    lowrank.merge_and_unload(model)
    model.save_pretrained(tmp_path / "memory")
    got, wanted = tensors(tmp_path / "out"), tensors(tmp_path / "memory")
    assert list(got) == names and got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in names)
    assert not all(torch.equal(got[name], tensor) for name, tensor in tensors(tmp_path / "base").items())


def assert_both_are_merged(model: Any, folder: Path) -> None:
    """The base on disk with both adapters merged answers as the model with both."""
    lowrank.save_adapter(model, folder / "two", "two")
    lowrank.merge_checkpoint(folder / "base", [(folder / "adapter", 1), (folder / "two", 1)], folder / "out")
    lowrank.set_active(model, ["default", "two"])
    wanted = answer(model)
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(folder / "out", attn_implementation="eager")
    torch.testing.assert_close(answer(merged), wanted, rtol=1e-4, atol=1e-5)


def test_one_stack_alone_two_adapters_and_weights(tmp_path: Path) -> None:
    model = saved("qwen3_moe", tmp_path, target_parameters=["down_proj"])
    adapted(model, "two", 5, r=2, lora_alpha=3, init_lora_weights="pissa")
    assert_both_are_merged(model, tmp_path)


def test_another_number_of_experts_is_refused_with_both_shapes(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "four")
    mixture("mixtral", num_local_experts=3).save_pretrained(tmp_path / "three")
    with pytest.raises(lowrank.LowrankError, match=r"3 experts of 96×32 at rank 3 want \[9, 32\] and \[96, 9\]"):
        lowrank.merge_checkpoint(tmp_path / "three", tmp_path / "four" / "adapter", tmp_path / "out")


def test_a_base_without_experts_is_no_base_of_these(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    save_llama(tmp_path / "dense")
    with pytest.raises(lowrank.LowrankError, match="dense has no experts: give the base it was made for"):
        lowrank.merge_checkpoint(tmp_path / "dense", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inspect_measures_every_expert(tmp_path: Path) -> None:
    model = saved("qwen3_moe", tmp_path, target_modules=["q_proj"], rank_pattern={"down_proj": 2})
    inspection = inspect_adapter(tmp_path / "adapter", against=tmp_path / "adapter")
    layers = {(layer.place.layer, layer.place.module): layer for layer in inspection.layers}
    assert len(layers) == 2 * (1 + 2 * 4)
    for path, stack in lora_layers(model):
        if not path.endswith("q_proj"):
            factors = stack.factors("default")
            for expert in range(4):
                found = layers[int(path.split(".")[2]), f"experts.{expert}.{stack.parameter}"]
                change = factors.scale * factors.b[expert] @ factors.a[expert]
                assert found.measure.norm == pytest.approx(float(change.norm()), rel=1e-4)
                assert found.measure.rank == factors.rank


def test_what_does_not_take_stacks_says_so(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    with pytest.raises(lowrank.LowrankError, match="adapts stacked experts"):
        lowrank.read_adapter(tmp_path / "adapter")
    with pytest.raises(lowrank.LowrankError, match=r"adapts stacked experts .* cannot be written as an mlx-lm adapter"):
        lowrank.convert_adapter(tmp_path / "adapter", tmp_path / "new", to="mlx")
    assert not (tmp_path / "new").exists()
