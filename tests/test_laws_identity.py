"""What must not change anything: injecting and unloading, the first step, disabled adapters, leaving `merged`."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lowrank
from layer_cases import CASES, CASES_WITH_DORA, DTYPES, NAMES, holder, inject_all, move
from lowrank import LoraConfig
from lowrank.core.init import INITS
from snapshots import assert_same, same_bits, snapshot

KEEPS_ANSWERS = [*(name for name in INITS if name != "random"), "pissa_niter_4", True]
SUBTRACTED = ("olora", "pissa", "pissa_niter_4")  # their two products cancel in answers; a merged float32 weight rounds


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_unload_undoes_inject_bit_for_bit(case: str, dtype: str, count: int) -> None:
    model, x = holder(case, DTYPES[dtype])
    next(model.parameters()).requires_grad_(False)  # flags that differ must come back as they were
    model.layer.register_forward_hook(lambda *_: None)
    before, answer = snapshot(model), model(x)
    inject_all(model, count)
    assert not same_bits(model(x), answer)
    assert lowrank.unload(model) is model
    assert_same(model, before)
    assert same_bits(model(x), answer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_merging_keeps_objects_keys_classes_and_flags(case: str, dtype: str) -> None:
    model, _ = holder(case, DTYPES[dtype])
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    inject_all(model, 2)
    lowrank.merge_and_unload(model)
    assert not same_bits(model.layer.weight, before.state["layer.weight"])
    before.state["layer.weight"] = model.layer.weight.detach()
    assert_same(model, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", KEEPS_ANSWERS)
@pytest.mark.parametrize("case", CASES)
def test_step_zero_is_the_base(case: str, init: str | bool, dtype: str) -> None:
    model, x = holder(case, DTYPES[dtype])
    answer = model(x)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["layer"], init_lora_weights=init)
    lowrank.inject(model, config)
    assert torch.equal(model(x), answer)
    model.train()
    assert torch.equal(model(x), answer)
    weight = model.layer.weight.detach().clone()
    lowrank.merge_and_unload(model)
    assert torch.allclose(model.layer.weight, weight, rtol=0, atol=0 if init not in SUBTRACTED else 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", KEEPS_ANSWERS)
@pytest.mark.parametrize("case", CASES_WITH_DORA)
def test_step_zero_of_dora_is_the_base(case: str, init: str | bool, dtype: str) -> None:
    model, x = holder(case, DTYPES[dtype])
    answer = model(x)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["layer"], init_lora_weights=init, use_dora=True)
    lowrank.inject(model, config)
    assert torch.equal(model(x), answer)
    weight = model.layer.weight.detach().clone()
    lowrank.merge_and_unload(model)
    assert torch.allclose(model.layer.weight, weight, rtol=0, atol=0 if init not in SUBTRACTED else 2e-6)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_disabled_is_the_base_and_passes(case: str, dtype: str, count: int) -> None:
    model, x = holder(case, DTYPES[dtype])
    answer = model(x)
    inject_all(model, count)
    adapted, before = model(x), snapshot(model)
    with lowrank.disabled(model) as inside:
        assert inside is model
        assert same_bits(model(x), answer)
        assert lowrank.active_adapters(model) == ()
    assert same_bits(model(x), adapted)
    with pytest.raises(KeyError), lowrank.disabled(model):
        raise KeyError
    assert_same(model, before)
    assert lowrank.active_adapters(model) == NAMES[:count]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_merged_is_the_merge_and_passes(case: str, dtype: str, count: int) -> None:
    model, x = holder(case, DTYPES[dtype])
    inject_all(model, count)
    adapted, before = model(x), snapshot(model)
    with lowrank.merged(model) as inside:
        assert inside is model
        answer = model(x)
    assert_same(model, before)
    assert same_bits(model(x), adapted)
    with pytest.raises(KeyError), lowrank.merged(model):
        raise KeyError
    assert_same(model, before)
    assert same_bits(lowrank.merge_and_unload(model)(x), answer)


def test_merged_leaves_dora_and_start_factors_as_they_were() -> None:
    model, _ = holder("linear")
    move(inject_all(model, 2, init_lora_weights="pissa", use_dora=True))
    before = snapshot(model)
    with lowrank.merged(model):
        pass
    assert_same(model, before)


def test_merged_puts_back_the_base_when_merging_itself_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = holder("linear")
    inject_all(model, 1)
    adapted, before = model(x), snapshot(model)

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("lowrank.layers.base.merge_weight", fail)
        with pytest.raises(MemoryError), lowrank.merged(model):
            pass
    assert_same(model, before)
    assert same_bits(model(x), adapted)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("case", CASES)
def test_a_copy_answers_alike_and_lives_apart(case: str, way: str) -> None:
    copied: Callable[[nn.Module], nn.Module] = COPIES[way]
    model, x = holder(case)
    inject_all(model, 2)
    twin = copied(model)
    adapted = model(x)
    assert same_bits(twin(x), adapted)
    assert type(twin.layer) is type(model.layer)
    assert lowrank.active_adapters(twin) == NAMES[:2]
    lowrank.unload(model)
    assert same_bits(twin(x), adapted)
    lowrank.merge_and_unload(twin)
    assert type(twin.layer) is type(model.layer)
    assert torch.allclose(twin(x), adapted, atol=1e-5)


def test_equal_layers_stay_of_one_class() -> None:
    first, _ = holder("linear")
    second, _ = holder("linear")
    inject_all(first, 1)
    inject_all(second, 2)
    assert type(first.layer) is type(second.layer)
    assert isinstance(first.layer, torch.nn.Linear)
