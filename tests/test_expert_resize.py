"""resize and combine take each expert of a stack as a module, and write the stacks again, in PEFT's order."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowrank

EXPERTS = 4
LAYER = "base_model.model.model.layers.0."
WRAPPED = {"experts.gate_up_proj": "mlp.experts.base_layer.", "experts.down_proj": "mlp.experts."}
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": 3, "lora_alpha": 5, "rank_pattern": {"experts.down_proj": 2},
    "alpha_pattern": {"experts.down_proj": 7}, "target_modules": ["q_proj"], "target_parameters": sorted(WRAPPED),
}  # fmt: skip


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Two stacks of different ranks and scales, and an ordinary module."""
    torch.manual_seed(0)
    shapes = {
        "mlp.experts.base_layer.": ((EXPERTS * 3, 5), (8, 3 * EXPERTS)),
        "mlp.experts.": ((EXPERTS * 2, 4), (5, 2 * EXPERTS)),
        "self_attn.q_proj.": ((3, 5), (5, 3)),
    }
    tensors = {
        f"{LAYER}{path}lora_{role}.weight": torch.randn(shape)
        for path, pair in shapes.items()
        for role, shape in zip("AB", pair, strict=True)
    }
    return written(tmp_path / "adapter", tensors, CONFIG)


def written(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """A folder of PEFT's format."""
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def value(table: dict[str, Any], path: str, default: Any) -> Any:
    """What a pattern of PEFT's says of a module."""
    return next((found for key, found in table.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def changes(folder: Path) -> dict[str, Tensor]:
    """{stack: ΔW of every expert}, and q_proj's, as PEFT reads them."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_parameters"] == CONFIG["target_parameters"] and config["target_modules"] == ["q_proj"]
    found = {}
    for name, key in {**WRAPPED, "q_proj": "self_attn.q_proj."}.items():
        path = "model.layers.0." + ("mlp." if name != "q_proj" else "self_attn.") + name
        rank = value(config["rank_pattern"], path, config["r"])
        scale = value(config["alpha_pattern"], path, config["lora_alpha"]) / rank
        a, b = (tensors.pop(f"{LAYER}{key}lora_{role}.weight") for role in "AB")
        count = 1 if name == "q_proj" else EXPERTS
        assert a.shape[0] == b.shape[1] == count * rank
        b, a = b.reshape(b.shape[0], rank, count), a.reshape(count, rank, -1)
        found[name] = scale * torch.einsum("ore,eri->eoi", b, a)
    assert not tensors
    return found


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, change in wanted.items():
        torch.testing.assert_close(got[name], change, rtol=1e-4, atol=1e-4)


def test_all_of_the_energy_and_more_rank_keep_every_change(adapter: Path, tmp_path: Path) -> None:
    lowrank.resize_adapter(adapter, tmp_path / "same", energy=1.0)
    lowrank.resize_adapter(adapter, tmp_path / "more", rank=4)
    assert_same(changes(tmp_path / "same"), changes(adapter))
    assert_same(changes(tmp_path / "more"), changes(adapter))


def test_less_rank_is_the_best_of_every_expert(adapter: Path, tmp_path: Path) -> None:
    lowrank.resize_adapter(adapter, tmp_path / "less", ranks={"down_proj": 1})
    got, wanted = changes(tmp_path / "less"), changes(adapter)
    for expert, change in enumerate(wanted["experts.down_proj"]):
        u, sigma, vh = torch.linalg.svd(change)
        torch.testing.assert_close(got["experts.down_proj"][expert], sigma[0] * u[:, :1] @ vh[:1], rtol=1e-4, atol=1e-4)
    assert_same(got, {name: change for name, change in wanted.items() if name != "experts.down_proj"})


def test_a_weighted_sum_is_that_of_every_expert_and_unlike_stacks_are_refused(adapter: Path, tmp_path: Path) -> None:
    lowrank.resize_adapter(adapter, tmp_path / "same", energy=1.0)
    lowrank.combine_adapters([(adapter, 0.25), (tmp_path / "same", 1.75)], tmp_path / "both")
    assert_same(changes(tmp_path / "both"), {name: 2 * change for name, change in changes(adapter).items()})
    few = {k: t for k, t in load_file(adapter / "adapter_model.safetensors").items() if "base_layer" not in k}
    written(tmp_path / "one", few, CONFIG | {"target_parameters": ["experts.down_proj"]})
    with pytest.raises(lowrank.LowrankError, match="go together only where they name and adapt the same modules"):
        lowrank.combine_adapters([(adapter, 0.5), (tmp_path / "one", 0.5)], tmp_path / "not")
    assert not (tmp_path / "not").exists()
