"""Routers of a mixture are left alone by "all-linear", and adapted where they are named."""

import pytest
import torch
from torch import nn

import lowrank
from expert_models import mixture
from lowrank import LoraConfig


class Block(nn.Module):
    """A mixture of four experts as Linear modules, with a gate of its own for each kind of experts."""

    def __init__(self, experts: nn.Module, **others: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        for name, module in others.items():
            setattr(self, name, module)


def experts() -> nn.ModuleList:
    return nn.ModuleList(nn.ModuleDict({"gate_proj": nn.Linear(8, 4), "down_proj": nn.Linear(4, 8)}) for _ in range(4))


def targets(model: nn.Module, **chosen: object) -> set[str]:
    return {entry.path for entry in lowrank.inject(model, LoraConfig(r=1, **chosen)).entries}


@pytest.mark.parametrize(
    "kind", [nn.ModuleList, lambda found: nn.ModuleDict({f"e{i}": m for i, m in enumerate(found)})]
)
def test_what_chooses_experts_is_no_target_unless_it_is_named(kind: object) -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({
            "one": Block(kind(experts()), gate=nn.Linear(8, 4)),
            "two": Block(kind(experts()), gate=nn.ModuleDict({"wg": nn.Linear(8, 4)})),
            "three": Block(kind(experts()), router=nn.ModuleDict({"classifier": nn.Linear(8, 4)})),
            "four": Block(kind(experts()), shared_expert_gate=nn.Linear(8, 1), gate=nn.Linear(8, 5)),
            "five": nn.ModuleDict({"gate": nn.Linear(8, 4), "up": nn.Linear(8, 4)}),
        })  # fmt: skip

    found = targets(model(), target_modules="all-linear")
    assert {path for path in found if ".experts." not in path} == {
        "four.shared_expert_gate", "four.gate", "five.gate", "five.up",
    }  # fmt: skip
    assert sum(".experts." in path for path in found) == 4 * 4 * 2
    named = targets(model(), target_modules=["one.gate", "wg", "classifier"])
    assert named == {"one.gate", "two.gate.wg", "three.router.classifier"}


@pytest.mark.parametrize("family", ["afmoe", "longcat_flash"])
def test_routers_of_families_that_have_linear_ones(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from families import shrink

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shrink(AutoConfig.for_model(family)))
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = {path for path in linear if path.endswith(("router.gate", "router.classifier"))}
    found = {entry.path for entry in lowrank.plan(model, LoraConfig(r=1, target_modules="all-linear")).entries}
    assert chosen and not chosen & found and linear - chosen - {"lm_head"} <= found


def test_a_gate_of_a_dense_layer_is_a_target() -> None:
    model = mixture("deepseek_v3")
    found = targets(model, target_modules="all-linear")
    assert "model.layers.0.mlp.gate_proj" in found and not any(path.endswith(".gate") for path in found)
