"""Targets that do nothing are said: no gradient reaches them, filters leave none of a name, "all-linear" is not all."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn

import lowrank
import models
from lowrank import LoraConfig
from lowrank.errors import LowrankWarning
from lowrank.injection.dead import complaint, without_gradient


class Experts(nn.Module):
    """Two layers of experts, of which a batch meets one each, and a layer that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in range(2))
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for experts in self.layers:
            x = experts[1](x)
        return x


def experts(**settings: object) -> Experts:
    model = Experts()
    lowrank.inject(model, LoraConfig(r=2, target_modules="all-linear", **settings))
    return model


def test_modules_that_no_gradient_reaches_are_named_and_resting_experts_are_not() -> None:
    model = experts()
    with pytest.warns(LowrankWarning, match=r"no gradient reaches the adapters of unused: .* makes no use") as seen:
        model(torch.randn(3, 4)).sum().backward()
    assert len(seen) == 1 and without_gradient(model) == ["unused"] and "unused" in complaint(["unused"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(3, 4)).sum().backward()  # said once


def test_nothing_is_said_where_every_sort_of_module_is_reached() -> None:
    model = experts(exclude_modules=["unused"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(model)(torch.randn(3, 4)).sum().backward()
        model(torch.randn(3, 4)).sum().backward()
        model.double()
        model(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    assert without_gradient(model) == [] and without_gradient(lowrank.unload(model)) == []


def test_what_waits_for_the_first_backward_pass_holds_no_model() -> None:
    model = experts()
    ref = weakref.ref(model.unused)
    del model
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["v_proj"]},
        {"layers_to_transform": 1, "exclude_modules": r".*v_proj"},
        {"modules_to_save": ["v_proj"]},
    ],
)
def test_a_name_of_which_filters_leave_nothing_is_said(options: dict[str, object]) -> None:
    model = models.causal("llama")
    with pytest.warns(
        LowrankWarning, match="target_modules: 'v_proj' names 2 modules, and exclude_modules, .* none of"
    ):
        plan = lowrank.inject(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))
    assert all("v_proj" not in entry.path for entry in plan.entries)


def test_layers_to_transform_that_hold_none_of_a_name_are_said() -> None:
    model = models.causal("llama")
    del model.model.layers[1].self_attn.v_proj
    with pytest.warns(LowrankWarning, match="'v_proj' names 1 modules, and .*layers_to_transform .* none of them"):
        lowrank.inject(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=1))


def test_all_linear_says_which_weights_it_leaves_out_and_how_much_they_are() -> None:
    model = models.causal("mixtral")
    with pytest.warns(
        LowrankWarning, match=r'"all-linear" leaves out 4 expert stacks, \d+% of the weights: experts\.down'
    ):
        plan = lowrank.inject(model, LoraConfig(r=2, target_modules="all-linear", exclude_modules=["experts"]))
    stacks = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n and "lora" not in n)
    share = f"4 expert stacks, {stacks / plan.base_parameters:.0%}"
    assert share in plan.left_out and f"not adapted: {plan.left_out}" in str(plan)
    assert "1 embedding table" in plan.left_out and "1 output head" in plan.left_out


def test_all_linear_of_a_dense_model_warns_of_nothing() -> None:
    for name in ("llama", "gpt2", "vit", "t5", "convnet"):
        model = models.MODELS[name]()
        with warnings.catch_warnings():
            warnings.simplefilter("error", LowrankWarning)
            plan = lowrank.inject(model, LoraConfig(r=2, target_modules="all-linear"))
        assert "stack" not in plan.left_out
