"""What an in-memory merge says: a change that rounding swallows, a scale that no dtype holds, a computed weight."""

import warnings

import pytest
import torch
from torch import nn

import lowrank
from layer_cases import chain
from lowrank import LoraConfig
from lowrank.errors import LowrankError, LowrankWarning, MergeError


def small(dtype: torch.dtype, by: float, **settings: object) -> nn.Module:
    """A model whose adapters change its weights by about `by` of their size."""
    model, _ = chain()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["first", "second"], init_lora_weights="random", **settings)
    lowrank.inject(model.to(dtype), config)
    with torch.no_grad():
        for layer in (model.first, model.second):
            factors = layer.factors("default")
            factors.a.fill_(1.0)
            factors.b.fill_(by / 5)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_change_that_rounding_swallows_is_said(dtype: torch.dtype) -> None:
    model = small(dtype, 1e-4)
    message = (
        rf"2 of 2 merged tensors lose more than half of .ΔW.² in rounding to {str(dtype)[6:]} \(worst: first, 0\.0%"
    )
    with pytest.warns(LowrankWarning, match=message):
        lowrank.merge_and_unload(model)


@pytest.mark.parametrize(("dtype", "by"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.bfloat16, 0.0)])
def test_nothing_is_said_where_the_change_survives_or_there_is_none(dtype: torch.dtype, by: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", LowrankWarning)
        lowrank.merge_and_unload(small(dtype, by))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_start_factors_that_cancel_are_no_change(init: str) -> None:
    model, _ = chain()
    lowrank.inject(model.bfloat16(), LoraConfig(r=3, target_modules=["first"], init_lora_weights=init))
    with warnings.catch_warnings():
        warnings.simplefilter("error", LowrankWarning)
        lowrank.merge_and_unload(model)


@pytest.mark.parametrize("merge", [lowrank.merge_and_unload, lambda m: lowrank.merged(m).__enter__()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scale_beyond_the_dtype_is_refused_by_name(merge, dtype: torch.dtype) -> None:
    model, _ = chain()
    lowrank.inject(model.to(dtype), LoraConfig(r=2, lora_alpha=1e308, target_modules=["first", "third"]))
    with pytest.raises(
        MergeError, match=r"cannot merge: first: .*scale 5e\+307.*does not fit into torch\.float32; third: "
    ):
        merge(model)
    lowrank.unload(model)


@pytest.mark.parametrize("merge", [lowrank.merge_and_unload, lambda m: lowrank.merged(m).__enter__()])
@pytest.mark.parametrize("by", ["parametrizations.weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_parametrised_after_injection_is_an_error_in_merging(merge, by: str) -> None:
    model, x = chain()
    inject = LoraConfig(r=2, lora_alpha=5, target_modules=["first", "third"], init_lora_weights="random")
    lowrank.inject(model, inject)
    put = {
        "parametrizations.weight_norm": nn.utils.parametrizations.weight_norm,
        "spectral_norm": nn.utils.spectral_norm,
    }
    put[by](model.first)
    model(x)
    with pytest.raises(MergeError, match=r"first: its weight is computed by a parametrisation .* remove that first"):
        merge(model)


def test_a_layer_parametrised_after_injection_is_not_made_plain() -> None:
    """Its class is the parametrisation's, made of the adapted one: the plain class would have no weight at all."""
    model, x = chain("one", "two")
    base, _ = chain()
    base.load_state_dict({name: value for name, value in model.state_dict().items() if ".lora_" not in name})
    lowrank.delete_adapter(model, "two")
    nn.utils.parametrizations.weight_norm(model.first)
    adapted, keys = model(x), model.state_dict().keys()
    for gone in (lowrank.unload, lambda m: lowrank.delete_adapter(m, "one")):
        with pytest.raises(LowrankError, match=r"first cannot be plain again: its weight is computed by a param"):
            gone(model)
        assert torch.equal(model(x), adapted) and model.state_dict().keys() == keys
    lowrank.inject(model, LoraConfig(r=2, target_modules=["second"]), "elsewhere")
    lowrank.delete_adapter(model, "elsewhere")
    lowrank.set_active(model, ["one"])
    assert torch.equal(model(x), adapted)
    nn.utils.parametrize.remove_parametrizations(model.first, "weight")
    lowrank.unload(model)
    assert torch.allclose(model(x), base(x), atol=1e-6)


def test_a_parametrised_layer_stops_a_merge_before_the_first_weight() -> None:
    """The adapter that is merged is elsewhere; the one that would be dropped at the end cannot be."""
    model, x = chain("one")
    lowrank.inject(model, LoraConfig(r=2, target_modules=["second"]), "here")
    lowrank.inject(model, LoraConfig(r=2, target_modules=["third"]), "there")
    lowrank.delete_adapter(model, "one")
    nn.utils.parametrizations.weight_norm(model.second)
    before, answer = model.third.base_weight.clone(), model(x)
    with pytest.raises(LowrankError, match="second cannot be plain again"):
        lowrank.merge_and_unload(model)
    assert torch.equal(model.third.base_weight, before) and torch.equal(model(x), answer)
    lowrank.merge_and_unload(model, ["there"])
    assert lowrank.adapter_configs(model).keys() == {"here"}
