"""What an in-memory merge says: a change that rounding swallows, a scale that no dtype holds, a computed weight."""

import warnings

import pytest
import torch
from torch import nn

import lowrank
from layer_cases import chain
from lowrank import LoraConfig
from lowrank.errors import LowrankWarning, MergeError


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
