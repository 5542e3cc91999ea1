"""Merges that are refused, in words, before anything is touched."""

import pytest
import torch
from torch import nn

import lowrank
from layer_cases import Chain, Holder, chain, factors_of, holder, inject_all, move
from lowrank import LoraConfig
from lowrank.errors import LowrankError, MergeError
from snapshots import assert_same, snapshot


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("what", ["a", "b", "start_b", "magnitude"])
def test_non_finite_factors_are_refused_before_anything_is_touched(what: str, bad: float) -> None:
    options = {"use_dora": True} if what == "magnitude" else {"init_lora_weights": "pissa"}
    model = Chain()
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, target_modules=["first", "third"], **options))
    with torch.no_grad():
        getattr(model.third.factors("default"), what).flatten()[1] = bad
    before = snapshot(model)
    for merge in (lowrank.merge_and_unload, lambda model: lowrank.merged(model).__enter__()):
        with pytest.raises(MergeError, match=r"not finite in third"):
            merge(model)
        assert_same(model, before)


def test_a_merge_that_overflows_is_refused_before_anything_is_touched() -> None:
    """Finite factors whose sum float16 cannot hold: the merged weight would be infinite."""
    model = Chain().half()
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, target_modules=["first", "third"], init_lora_weights="random"))
    with torch.no_grad():
        model.third.factors("default").b.fill_(1e6)
    before = snapshot(model)
    with pytest.raises(MergeError, match="third"):
        lowrank.merge_and_unload(model)
    assert_same(model, before)


def test_a_large_change_that_fits_is_merged() -> None:
    """The bound on the merged values is too careful here, so the layer is merged on trial, and it fits."""
    model = Holder(nn.Linear(64, 5).half())
    inject_all(model, 1)
    factors = model.layer.factors("one")
    with torch.no_grad():
        factors.a[:, 0] = torch.tensor([3e3, -3e3, 0.0])
        factors.b[0] = torch.tensor([9.0, 9.0, 0.0])  # s·b₀·a₀ cancels, while ‖b₀‖·‖a₀‖ is beyond float16
    lowrank.merge_and_unload(model)
    assert torch.isfinite(model.layer.weight).all()


@pytest.mark.parametrize("magnitude", [9e4, 9e8])
def test_dora_rows_that_fit_are_merged_and_others_refused(magnitude: float) -> None:
    """A row of norm m has entries below m: 9e4 is beyond float16 as a norm, not as 64 entries of one size."""
    model = Holder(nn.Linear(64, 5).half())
    nn.init.constant_(model.layer.weight, 0.1)
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, target_modules=["layer"], use_dora=True))
    with torch.no_grad():
        model.layer.factors("default").magnitude.fill_(magnitude)
    if magnitude > 1e8:
        with pytest.raises(MergeError, match=r"do not fit into torch\.float16"):
            lowrank.merge_and_unload(model)
    else:
        lowrank.merge_and_unload(model)
        assert torch.allclose(model.layer.weight.float(), torch.tensor(magnitude / 8), rtol=1e-2)


def test_a_base_that_is_not_finite_is_refused() -> None:
    model, _ = chain("one")
    with torch.no_grad():
        model.second.weight[1, 2] = float("nan")
    with pytest.raises(MergeError, match="second: the base's weight holds values that are not finite"):
        lowrank.merge_and_unload(model)


def test_every_fault_is_named() -> None:
    model, _ = chain("one", "two")
    with torch.no_grad():
        model.first.factors("one").a[0, 0] = float("nan")
        model.third.factors("two").b[0, 0] = float("inf")
    with pytest.raises(MergeError, match=r"'one' has .* not finite in first; .*'two' has .* in third"):
        lowrank.merge_and_unload(model)


def test_a_dora_adapter_that_stays_is_refused() -> None:
    model, x = holder("linear")
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, target_modules=["layer"], use_dora=True), "directed")
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=5, target_modules=["layer"], init_lora_weights="random"), "plain")
    lowrank.set_active(model, ["directed", "plain"])
    move(factors_of(model))
    adapted, before = model(x), snapshot(model)
    with pytest.raises(MergeError, match=r"'directed' is DoRA in layer"):
        lowrank.merge_and_unload(model, adapters=["plain"])
    assert_same(model, before)
    lowrank.merge_and_unload(model)
    assert torch.allclose(model(x), adapted, atol=1e-5)


def test_wrong_calls_are_refused_in_one_sentence() -> None:
    model, _ = chain()
    with pytest.raises(LowrankError, match=r"no adapter: call lowrank\.inject"):
        lowrank.merge_and_unload(model)
    with pytest.raises(LowrankError, match="no adapter"):
        lowrank.unload(model)
    model, _ = chain("one", "two")
    before = snapshot(model)
    with pytest.raises(LowrankError, match=r"no adapter 'thre' in this model: it has 'one', 'two'"):
        lowrank.merge_and_unload(model, adapters=["thre"])
    with pytest.raises(MergeError, match="named twice"):
        lowrank.merge_and_unload(model, adapters=["one", "one"])
    lowrank.set_active(model, [])
    with pytest.raises(MergeError, match="no adapter is active"):
        lowrank.merge_and_unload(model)
    lowrank.set_active(model, ["one", "two"])
    assert_same(model, before)
