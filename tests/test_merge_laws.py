"""Merging: rounded once, the same bits every way, some adapters or all."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lowrank
import reference
from layer_cases import DTYPES, NAMES, Holder, chain, conv1d_linear, factors_of, holder, inject_all
from lowrank.core.factors import LoraFactors
from lowrank.core.merging import BLOCK_ELEMENTS, merge_weight, prepare
from snapshots import same_bits

HALVES = {
    "bfloat16": 1e-3,
    "float16": 4e-3,
}  # the share of weights that float32 sums may put on the other side of a tie


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_merging_rounds_once(dtype: str, transposed: bool, count: int) -> None:
    """Each merged weight is the float64 sum rounded to the dtype, or its neighbour at a tie that float32 misses."""
    layer = conv1d_linear(640, 512) if transposed else nn.Linear(512, 640)
    model = Holder(layer.to(DTYPES[dtype]))
    adapters = inject_all(model, count, r=16)
    wanted = reference.adapted_weight(layer, adapters).to(DTYPES[dtype])
    base = layer.weight.detach().clone()
    lowrank.merge_and_unload(model)
    apart = reference.ulps_apart(layer.weight.detach(), wanted)
    tiny = wanted.abs() < 2.0**-10 * wanted.abs().max()  # sums that cancel have finer ulps than their terms
    assert apart[~tiny].max() <= 1
    assert (apart[~tiny] > 0).double().mean() < HALVES[dtype]
    assert (layer.weight - base).abs().mean() > 0.1 * base.abs().mean()


def test_merging_float32_is_within_float32_rounding() -> None:
    model = Holder(nn.Linear(300, 200))
    adapters = inject_all(model, 3, r=16)
    wanted = reference.adapted_weight(model.layer, adapters)
    size = model.layer.weight.detach().double().abs()
    for factors in adapters:
        size = size + abs(factors.scale) * reference.product(factors, factors.a.abs(), factors.b.abs())
    lowrank.merge_and_unload(model)
    assert ((model.layer.weight.double() - wanted).abs() <= 4 * torch.finfo(torch.float32).eps * size).all()


def test_blocks_of_rows_leave_no_seam() -> None:
    """A weight of several blocks, the last of them not full."""
    columns = 700
    rows = BLOCK_ELEMENTS // columns * 2 + 37
    model = Holder(nn.Linear(columns, rows))
    adapters = inject_all(model, 2)
    wanted = reference.adapted_weight(model.layer, adapters)
    lowrank.merge_and_unload(model)
    assert torch.allclose(model.layer.weight.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["linear", "conv1d-linear", "embedding, scaled", "conv2d, groups"])
@pytest.mark.parametrize("merge", [("one",), ("v2.1",), ("three", "one")])
def test_merging_some_leaves_the_others_active(case: str, merge: tuple[str, ...]) -> None:
    model, x = holder(case)
    inject_all(model, 3)
    adapted = model(x)
    lowrank.merge_and_unload(model, adapters=merge)
    left = tuple(name for name in NAMES if name not in merge)
    assert lowrank.active_adapters(model) == left
    assert tuple(lowrank.adapter_configs(model)) == left
    assert torch.allclose(model(x), adapted, atol=2e-5)
    merged_base = model.layer.weight.detach().clone()
    wanted = reference.adapted_weight(model.layer, factors_of(model))
    with lowrank.disabled(model):
        assert not torch.allclose(model(x), adapted, atol=1e-3)
    lowrank.merge_and_unload(model)
    assert torch.allclose(model(x), adapted, atol=2e-5)
    assert torch.allclose(model.layer.weight.double(), wanted, atol=1e-5)
    assert not torch.equal(model.layer.weight, merged_base)


def test_merging_an_inactive_adapter_by_name_leaves_the_active_one() -> None:
    model, x = chain("one", "two")
    both = model(x)
    lowrank.set_active(model, ["one"], trainable=["one"])
    lowrank.merge_and_unload(model, adapters=["two"])
    assert lowrank.active_adapters(model) == ("one",)
    assert torch.allclose(model(x), both, atol=1e-5)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"{layer}.lora_one.{factor}" for layer in ("first", "second", "third") for factor in "ab"
    ]


def test_merging_the_active_ones_drops_the_inactive_ones() -> None:
    model, x = chain("one", "two")
    lowrank.set_active(model, ["two"])
    adapted = model(x)
    lowrank.merge_and_unload(model)
    assert lowrank.adapter_configs(model) == {}
    assert type(model.first) is nn.Linear
    assert torch.allclose(model(x), adapted, atol=1e-5)


def test_merging_all_by_name_gives_the_plain_model() -> None:
    model, x = chain("one", "two")
    adapted = model(x)
    lowrank.merge_and_unload(model, adapters=["one", "two"])
    assert lowrank.adapter_configs(model) == {}
    assert all(p.requires_grad for p in model.parameters())
    assert torch.allclose(model(x), adapted, atol=1e-5)


def test_progress_draws_a_bar_and_merges_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = chain("one")
    adapted = model(x)
    lowrank.merge_and_unload(model, progress=True)
    assert "merging" in capsys.readouterr().err
    assert torch.allclose(model(x), adapted, atol=1e-5)


def test_merged_keeps_what_is_trained_and_what_is_not() -> None:
    model, x = chain("one", "two")
    lowrank.set_active(model, ["one", "two"], trainable=["two"])
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with lowrank.merged(model):
        assert not model(x).requires_grad
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    weighting=st.floats(-2, 2),
)
def test_weighted_merges_of_any_shape(
    rows: int, columns: int, ranks: list[int], dtype: torch.dtype, weighting: float
) -> None:
    weight = torch.randn(rows, columns).to(dtype)
    adapters = [LoraFactors(torch.randn(r, columns), torch.randn(rows, r), 1.7 / r) for r in ranks]
    changes = [prepare(factors, weight, transposed=False, weighting=weighting) for factors in adapters]
    wanted = weight.double() + sum(weighting * reference.delta(f, weight) for f in adapters)
    size = weight.double().abs() + sum(
        abs(weighting * f.scale) * reference.product(f, f.a.abs(), f.b.abs()) for f in adapters
    )
    merged = merge_weight(weight, changes)
    assert merged.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2 * wanted.abs() + 8 * torch.finfo(torch.float32).eps * size + 1e-7
    assert ((merged.double() - wanted).abs() <= rounding).all()


def test_bits_do_not_depend_on_the_way_to_the_merge() -> None:
    """merged() and merge_and_unload are one formula: equal bits, whatever the order in which they run."""
    model, _ = holder("linear", torch.bfloat16)
    inject_all(model, 3)
    with lowrank.merged(model):
        inside = model.layer.weight.detach().clone()
    lowrank.merge_and_unload(model)
    assert same_bits(inside, model.layer.weight.detach())
