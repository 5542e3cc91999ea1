"""An adapted layer answers what the dense formula says, and so does the merged one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lowrank
import reference
from layer_cases import CASES, CASES_WITH_DORA, DTYPES, Holder, conv1d_linear, factors_of, holder, inject_all, move
from lowrank.core.factors import LoraFactors
from lowrank.core.rows import RowBlock
from lowrank.injection.apply import attach
from lowrank.injection.config import LoraConfig

ROUNDINGS = 3  # what the terms of h are rounded in all; the libraries keep the sums of half types in float32


def assert_within_rounding(got: Tensor, model: Holder, x: Tensor, wanted: Tensor, unit: Tensor) -> None:
    assert got.dtype == model.layer.weight.dtype
    assert got.shape == wanted.shape
    errors = (got.detach().double() - wanted.detach()).abs() / unit.clamp_min(1e-12)
    assert errors.max() <= ROUNDINGS, f"{errors.max():.3g} rounding units away"


def check_answers(model: Holder, x: Tensor, adapters: list[LoraFactors]) -> None:
    """adapted ≡ the dense formula ≡ merged, and the adapters really change the answer."""
    wanted = reference.adapted_answer(model.layer, x, adapters)
    unit = reference.rounding_unit(model.layer, x, adapters)
    base = reference.adapted_answer(model.layer, x, [])
    assert ((wanted - base).abs() > 2 * ROUNDINGS * unit).double().mean() > 0.05, "the test could not see a change"
    assert_within_rounding(model(x), model, x, wanted, unit)
    with torch.no_grad():
        assert_within_rounding(model(x), model, x, wanted, unit)
    lowrank.merge_and_unload(model)
    assert_within_rounding(model(x), model, x, wanted, unit)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_adapted_is_the_formula_is_merged(case: str, dtype: str, count: int) -> None:
    model, x = holder(case, DTYPES[dtype])
    check_answers(model, x, inject_all(model, count))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("case", ["linear", "own forward", "conv1d-linear", "embedding", "conv2d, groups"])
def test_start_factors_are_subtracted(case: str, init: str, dtype: str, count: int) -> None:
    model, x = holder(case, DTYPES[dtype])
    adapters = inject_all(model, count, init_lora_weights=init)
    move(adapters, by=1.0)
    check_answers(model, x, adapters)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", ["random", "pissa"])
@pytest.mark.parametrize("case", CASES_WITH_DORA)
def test_dora_rescales_rows(case: str, init: str, dtype: str, count: int) -> None:
    model, x = holder(case, DTYPES[dtype])
    adapters = inject_all(model, count, init_lora_weights=init, use_dora=True)
    move(adapters, by=0.7)
    check_answers(model, x, adapters)


@st.composite
def row_parts(draw: st.DrawFn) -> tuple[int, tuple[RowBlock, ...]]:
    """Row blocks that do not overlap, stacked or repeated, with rows between them that no part owns."""
    widths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    gap, lead = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    groups = draw(st.integers(1, 3))
    stride = sum(widths) + gap
    starts = [lead + sum(widths[:i]) for i in range(len(widths))]
    parts = [RowBlock(start, width, stride, groups) for start, width in zip(starts, widths, strict=True)]
    return lead + stride * groups, tuple(draw(st.permutations(parts)))


@given(
    layout=row_parts(),
    k=st.integers(1, 9),
    rank=st.integers(1, 5),
    alpha=st.floats(0.3, 20),
    transposed=st.booleans(),
    started=st.booleans(),
)
def test_parts_adapt_exactly_their_rows(
    layout: tuple[int, tuple[RowBlock, ...]], k: int, rank: int, alpha: float, transposed: bool, started: bool
) -> None:
    d, parts = layout
    model = Holder(conv1d_linear(d, k) if transposed else nn.Linear(k, d)).eval()
    x = torch.randn(3, 4, k)
    base = model(x).detach()
    own = sum(part.size for part in parts)

    def pair() -> tuple[Tensor, Tensor]:
        return torch.randn(len(parts) * rank, k), torch.randn(own, rank)

    a, b = pair()
    factors = LoraFactors(a, b, alpha / rank, start=pair() if started else None, parts=parts, out_features=d)
    attach(model, "default", LoraConfig(target_modules=["layer"]), {"layer": factors}, {}, {}, trainable=True)
    touched = sorted(row for part in parts for row in reference.rows_of(part))
    others = [row for row in range(d) if row not in touched]
    assert torch.equal(model(x)[..., others], base[..., others])
    wanted = reference.adapted_answer(model.layer, x, [factors])
    unit = reference.rounding_unit(model.layer, x, [factors])
    assert_within_rounding(model(x), model, x, wanted, unit)
    w0 = reference.matrix(model.layer, model.layer.weight.detach().clone())
    lowrank.merge_and_unload(model)
    assert_within_rounding(model(x), model, x, wanted, unit)
    assert torch.equal(reference.matrix(model.layer, model.layer.weight)[others], w0[others])


@given(
    k=st.integers(1, 12),
    d=st.integers(1, 12),
    rank=st.integers(1, 14),
    alpha=st.floats(-20, 20).filter(lambda alpha: abs(alpha) > 0.1),
    rslora=st.booleans(),
    batch=st.lists(st.integers(0, 3), max_size=3),
)
def test_any_shape_rank_and_alpha(k: int, d: int, rank: int, alpha: float, rslora: bool, batch: list[int]) -> None:
    model = Holder(nn.Linear(k, d))
    rank = min(rank, k, d)
    options = {"lora_alpha": alpha, "use_rslora": rslora, "init_lora_weights": "random"}
    lowrank.inject(model, LoraConfig(r=rank, target_modules=["layer"], **options))
    adapters = factors_of(model)
    assert adapters[0].scale == pytest.approx(alpha / (rank**0.5 if rslora else rank))
    x = torch.randn(*batch, k)
    wanted = reference.adapted_answer(model.layer, x, adapters)
    unit = reference.rounding_unit(model.layer, x, adapters)
    got = model(x)
    assert got.shape == (*batch, d)
    assert ((got.double() - wanted).abs() <= ROUNDINGS * unit).all()


def test_in_a_base_of_float64_everything_is_float64() -> None:
    model, x = holder("linear", torch.float64)
    adapters = inject_all(model, 2)
    assert {t.dtype for f in adapters for t in f.trainable()} == {torch.float64}
    assert torch.allclose(model(x), reference.adapted_answer(model.layer, x, adapters), rtol=1e-14, atol=1e-14)
