"""Adapters of experts as modules (PEFT up to 0.17) against bases on disk, whole or one by one: merged and measured."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank
from expert_models import adapted, mixture
from lowrank.analysis.inspection import inspect_adapter
from lowrank.injection.adapters import lora_layers
from test_expert_files import OLD, single_experts
from test_expert_merge import tensors

APART = {"target_parameters": ["gate_up_proj[gate,up]", "down_proj"]}
KEPT = {"one by one": {}, "in whole stacks": {"save_original_format": False}}


def saved(family: str, folder: Path, kept: str, skip: int = -1, dtype: torch.dtype = torch.float32) -> Any:
    """A base, an old adapter for it, and the model with the same adapter in its stacks."""
    model = mixture(family).to(dtype)
    model.save_pretrained(folder / "base", **KEPT[kept])
    single_experts(adapted(model, **APART), folder / "old", OLD[family], skip)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            if skip >= 0:
                layer.factors("default").b[skip] = 0
    return model


@pytest.mark.parametrize("skip", [-1, 2], ids=["all", "without the third"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("family", OLD)
def test_merged_on_disk_it_is_merged_in_memory(
    family: str, kept: str, dtype: torch.dtype, skip: int, tmp_path: Path
) -> None:
    model = saved(family, tmp_path, kept, skip, dtype)
    lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "old", tmp_path / "out", verify="full")
    lowrank.merge_and_unload(model)
    model.save_pretrained(tmp_path / "memory", **KEPT[kept])
    got, wanted = tensors(tmp_path / "out"), tensors(tmp_path / "memory")
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("family", OLD)
def test_every_module_is_measured_beside_its_own_rows(family: str, kept: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path, kept)
    layers = {layer.measure.path: layer for layer in inspect_adapter(tmp_path / "old", tmp_path / "base").layers}
    moe = "block_sparse_moe" if "w1" in OLD[family] else "mlp"
    assert len(layers) == 2 * 4 * 3
    for leaf, (stack, number, count) in OLD[family].items():
        weight = model.get_parameter(f"model.layers.1.mlp.experts.{stack}")[3].chunk(count)[number]
        found = layers[f"model.layers.1.{moe}.experts.3.{leaf}"].base
        assert found is not None and found.weight_norm == pytest.approx(float(weight.norm()), rel=1e-5)


def test_experts_that_the_stacks_do_not_have_are_refused(tmp_path: Path) -> None:
    saved("mixtral", tmp_path, "in whole stacks")
    mixture("mixtral", num_local_experts=3).save_pretrained(tmp_path / "three", save_original_format=False)
    mixture("mixtral", intermediate_size=40).save_pretrained(tmp_path / "thin", save_original_format=False)
    for base, message in (
        ("three", r"experts\.3\.w\d is expert 3, and there are 3 at"),
        ("thin", r"experts\.0\.w1 has A \[3, 32\] and B \[48, 3\], and an expert of .* wants \[3, 32\] and \[40, 3\]"),
    ):
        for read in (
            lambda base=base: lowrank.merge_checkpoint(tmp_path / base, tmp_path / "old", tmp_path / "out"),
            lambda base=base: inspect_adapter(tmp_path / "old", tmp_path / base),
        ):
            with pytest.raises(lowrank.LowrankError, match=message):
                read()
    assert not (tmp_path / "out").exists()
