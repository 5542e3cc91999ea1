"""Gate and up of stacked experts adapted apart: an A of its own for each, in every layout, in files and on disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank
from expert_models import FAMILIES, IMPLEMENTATIONS, adapted, answer, dense_answer, mixture
from lowrank import LoraConfig
from lowrank.analysis.inspection import inspect_adapter
from lowrank.injection.adapters import lora_layers
from test_expert_files import READ_BY_PEFT, peft_model
from test_expert_merge import ONE_BY_ONE
from test_expert_merge_whole import WHOLE, assert_as_in_memory

GATED = [family for family in FAMILIES if family != "nemotron_h"]
CASES = [(family, way) for family in GATED for way in IMPLEMENTATIONS if family != "llama4_text"]
CASES.append(("llama4_text", "its own"))
APART = {"target_parameters": ["experts.gate_up_proj[gate,up]", "experts.down_proj"]}


def parted(model: nn.Module) -> dict[str, Tensor]:
    """{parameter: W0 + ΔW} with A and B of each part on its own rows, differentiable in the factors."""
    weights = {}
    for path, stack in lora_layers(model):
        factors, base = stack.factors("default"), stack.base_weight.detach()
        a, b, rank = factors.a, factors.scale * factors.b, factors.rank
        change = b @ a[:, :rank]  # (E, d, k)
        if path.endswith("gate_up_proj"):
            half = b.shape[1] // 2
            gate, up = b[:, :half] @ a[:, :rank], b[:, half:] @ a[:, rank:]
            in_turn = not getattr(stack.experts, "is_concatenated", True)
            change = torch.stack([gate, up], 2).flatten(1, 2) if in_turn else torch.cat([gate, up], 1)
        weights[path] = base + (change.mT if stack.transposed else change)
    return weights


@pytest.mark.parametrize(("family", "way"), CASES)
def test_each_part_is_its_own_map_and_so_are_the_gradients(family: str, way: str) -> None:
    model = adapted(mixture(family, way), **APART)
    factors = [p for _, layer in lora_layers(model) for p in layer.factors("default").trainable()]
    got, wanted = answer(model), dense_answer(model, parted(model))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(got)
    gradients = torch.autograd.grad((got * direction).sum(), factors)
    for one, other in zip(gradients, torch.autograd.grad((wanted * direction).sum(), factors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-6)
        assert other.abs().max() > 0
    with lowrank.merged(model):
        torch.testing.assert_close(answer(model), got, rtol=1e-4, atol=1e-5)
    lowrank.merge_and_unload(model)
    torch.testing.assert_close(answer(model), got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["gate", "up"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_a_name_means_the_rows_that_the_module_takes_for_it(family: str, part: str) -> None:
    """A gate that is far below zero closes, whatever up is; an up that is far from it does not."""
    model = mixture(family)
    lowrank.inject(model, LoraConfig(target_modules=(), target_parameters=f"experts.gate_up_proj[{part}]", r=2))
    for _, stack in lora_layers(model):
        rows = torch.cat([block.indices() for block in stack.factors("default").parts])
        gate_up = torch.ones(1, 2 * len(rows))
        gate_up[:, rows] = -1e4
        if hasattr(stack.experts, "_apply_gate"):
            out = stack.experts._apply_gate(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)  # as in Llama 4's forward
            out = up * stack.experts.act_fn(gate)
        assert (out.abs() < 1e-6).all() if part == "gate" else (out.abs() > 1).all()


@pytest.mark.parametrize("family", READ_BY_PEFT)
@pytest.mark.parametrize("init", [True, "pissa"])
def test_peft_answers_as_we_do_and_loading_gives_the_parts_back(family: str, init: object, tmp_path: Path) -> None:
    model = adapted(mixture(family, "eager"), **APART, init_lora_weights=init)
    lowrank.save_adapter(model, tmp_path / "one")
    torch.testing.assert_close(answer(peft_model(family, tmp_path / "one")), answer(model), rtol=1e-4, atol=1e-5)
    other = mixture(family, "eager")
    lowrank.load_adapter(other, tmp_path / "one")
    with torch.no_grad():
        assert torch.equal(answer(other), answer(model))
    for (path, layer), (same, loaded) in zip(lora_layers(model), lora_layers(other), strict=True):
        one, two = layer.factors("default"), loaded.factors("default")
        assert path == same and one.parts == two.parts and bool(one.parts) == path.endswith("gate_up_proj")
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    lowrank.save_adapter(other, tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors", "lowrank.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("family", [family for family in (*ONE_BY_ONE, *WHOLE) if family in GATED])
def test_merged_on_disk_it_has_the_bits_of_memory(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = mixture(family).to(dtype)
    model.save_pretrained(tmp_path / "base")
    lowrank.save_adapter(adapted(model, **APART, init_lora_weights="pissa"), tmp_path / "adapter")
    assert_as_in_memory(tmp_path, family, model)


def test_inspect_tells_the_parts_and_resize_takes_what_they_make(tmp_path: Path) -> None:
    model = adapted(mixture("qwen3_moe"), **APART)
    lowrank.save_adapter(model, tmp_path / "adapter")
    layers = inspect_adapter(tmp_path / "adapter").layers
    for layer in layers:
        gated = layer.measure.path.endswith("gate_up_proj")
        assert (layer.measure.parts, layer.measure.rank) == ((("gate", "up") if gated else ()), 3)
    assert sum(layer.measure.parameters for layer in layers) == sum(
        p.numel() for _, layer in lora_layers(model) for p in layer.factors("default").trainable()
    )
    lowrank.resize_adapter(tmp_path / "adapter", tmp_path / "same", energy=1.0)
    other = mixture("qwen3_moe")
    lowrank.load_adapter(other, tmp_path / "same")
    torch.testing.assert_close(answer(other), answer(model), rtol=1e-4, atol=1e-4)


def test_the_plan_counts_and_names_the_parts() -> None:
    model = mixture("gpt_oss")
    plan = lowrank.inject(model, LoraConfig(target_modules=(), **APART, r=2))
    assert plan.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "model.layers.0.mlp.experts.gate_up_proj[gate,up]" in str(plan)
    alone = lowrank.inject(mixture("gpt_oss"), LoraConfig(target_modules=(), target_parameters=["gate_up_proj[up]"]))
    assert {entry.part_names for entry in alone.entries} == {("up",)}


WRONG = {
    "a part that there is not": (["gate_up_proj[q]"], r"has no part q; its parts are gate, up"),
    "a part twice": (["gate_up_proj[up,up]"], "a part is named twice"),
    "parts of what has none": (["down_proj[gate]"], r"which rows of .*down_proj belong to each part cannot be known"),
    "as a whole and by parts": (["gate_up_proj", "gate_up_proj[up]"], "is meant twice, as a whole and by parts"),
    "a part by a module's name": (["experts.up_proj"], r'it is a part of a stack here: "gate_up_proj\[up\]"'),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_meant_is_said_and_changes_nothing(what: str) -> None:
    names, message = WRONG[what]
    model = mixture("mixtral")
    with pytest.raises(lowrank.LowrankError, match=message):
        lowrank.inject(model, LoraConfig(target_modules=(), target_parameters=names, r=2))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_dora_is_for_whole_stacks() -> None:
    with pytest.raises(lowrank.LowrankError, match=r"not for .*gate_up_proj\[gate,up\]"):
        lowrank.inject(mixture("mixtral"), LoraConfig(target_modules=(), **APART, r=2, use_dora=True))
