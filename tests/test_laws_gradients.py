"""Gradients of the factors and of the input against autograd through the dense formula; dropout."""

import pytest
import torch
from torch import Tensor, nn

import lowrank
import reference
from layer_cases import CASES, CASES_WITH_DORA, DTYPES, holder, inject_all, move
from lowrank import LoraConfig
from lowrank.core.factors import LoraFactors

MIXED = ({"r": 3, "lora_alpha": 5}, {"r": 2, "lora_alpha": 7, "lora_dropout": 0.3})


def gradients(model: nn.Module, x: Tensor, h: Tensor, adapters: list[LoraFactors]) -> list[Tensor]:
    """∂Σ(h·c)/∂ of every trained tensor, and of the input where it is not ids; c is fixed and random."""
    wanted = [t for factors in adapters for t in factors.trainable()]
    if x.is_floating_point():
        wanted.append(x)
    generator = torch.Generator().manual_seed(3)
    c = torch.randn(h.shape, generator=generator, dtype=torch.float64)
    return list(torch.autograd.grad((h.double() * c).sum(), wanted))


def assert_gradients(model: nn.Module, x: Tensor, adapters: list[LoraFactors], tolerance: float) -> None:
    if x.is_floating_point():
        x.requires_grad_(True)
    got = gradients(model, x, model(x), adapters)
    wanted = gradients(model, x, reference.adapted_answer(model.layer, x, adapters), adapters)
    padding = getattr(model.layer, "padding_idx", None)
    for ours, true in zip(got, wanted, strict=True):
        assert ours.shape == true.shape
        if (
            padding is not None and ours.shape[1] == model.layer.num_embeddings
        ):  # an A: its padding column is left alone
            assert not ours[:, padding].any()
            true[:, padding] = 0
        assert true.abs().max() > 0
        assert (ours.double() - true.double()).abs().max() <= tolerance * true.abs().max().double()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_a_base_in_float64(case: str, count: int) -> None:
    model, x = holder(case, torch.float64)
    assert_gradients(model, x, inject_all(model, count), 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_gradients_in_the_dtypes_of_models(case: str, dtype: str) -> None:
    model, x = holder(case, DTYPES[dtype])
    assert_gradients(model, x, inject_all(model, 2), 32 * torch.finfo(DTYPES[dtype]).eps)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("init", ["random", "pissa"])
@pytest.mark.parametrize("case", CASES_WITH_DORA)
def test_gradients_of_dora_hold_the_norm_constant(case: str, init: str, count: int) -> None:
    model, x = holder(case, torch.float64)
    adapters = inject_all(model, count, use_dora=True, init_lora_weights=init)
    move(adapters)
    assert_gradients(model, x, adapters, 1e-11)


@pytest.mark.parametrize("case", ["linear", "own forward", "conv1d-linear", "embedding, padded", "conv2d, groups"])
def test_gradients_of_start_factors(case: str) -> None:
    model, x = holder(case, torch.float64)
    adapters = inject_all(model, 2, init_lora_weights="pissa")
    move(adapters)
    assert_gradients(model, x, adapters, 1e-12)


@pytest.mark.parametrize("case", ["linear", "own forward", "conv1d-linear", "conv2d"])
def test_numerical_gradients(case: str) -> None:
    model, x = holder(case, torch.float64)
    (factors,) = inject_all(model, 1)
    original = factors.a.detach().clone()

    def along(a: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"layer.lora_one.a": a}, (x,))

    assert torch.autograd.gradcheck(along, (original.requires_grad_(True), x.requires_grad_(True)))


@pytest.mark.parametrize("case", CASES)
def test_only_what_should_train_gets_gradients(case: str) -> None:
    model, x = holder(case)
    inject_all(model, 2)
    lowrank.set_active(model, ["one", "v2.1"], trainable=["v2.1"])
    model(x).sum().backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {"layer.lora_v2%2E1.a", "layer.lora_v2%2E1.b"}
    assert got == {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_frozen_base_is_not_in_the_graph_without_a_trained_adapter() -> None:
    model, x = holder("linear")
    inject_all(model, 2)
    lowrank.set_active(model, ["one"])
    assert not model(x).requires_grad


DROPPING = ["linear", "own forward", "conv1d-linear", "conv2d, groups"]


@pytest.mark.parametrize("case", DROPPING)
def test_dropout_acts_in_training_only_and_on_the_change_only(case: str) -> None:
    model, x = holder(case)
    base = model(x)
    adapters = inject_all(model, 1, lora_dropout=0.5)
    quiet = model(x)
    assert torch.equal(model(x), quiet)
    model.train()
    assert not torch.equal(model(x), quiet)
    assert not torch.equal(model(x), model(x))
    with torch.no_grad():
        adapters[0].b.zero_()
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("case", DROPPING)
def test_dropout_keeps_the_mean_and_has_its_own_probability(case: str) -> None:
    """The mean over masks is the answer without dropout, and the variance is p/(1−p)·Σ(s·(B·A)_ij·x_j)²."""
    model, x = holder(case)
    x = x[:1]
    (factors,) = inject_all(model, 1, lora_dropout=0.25)
    quiet = model(x).detach().double()
    model.train()
    with torch.no_grad():
        drawn = torch.stack([model(x).double() for _ in range(3000)])
    standard_error = drawn.std(0) / 3000**0.5
    assert ((drawn.mean(0) - quiet).abs() <= 5 * standard_error + 1e-5).all()
    if case == "conv2d, groups":
        return  # an entry of x enters at many positions there, which the simple formula for the variance leaves out
    terms = reference.delta(factors, reference.matrix(model.layer, model.layer.weight)) * x.double().unsqueeze(-2)
    variance = 0.25 / 0.75 * terms.square().sum(-1)
    assert torch.allclose(drawn.var(0), variance.detach(), rtol=0.2)


@pytest.mark.parametrize("case", DROPPING[:3])
def test_gradients_see_the_mask_that_the_answer_saw(case: str) -> None:
    """h is linear in B and in x given the mask, so Σ ∂h/∂b·b is the adapter's whole share of h."""
    model, x = holder(case, torch.float64)
    model.train()
    base = model(x).detach()
    (factors,) = inject_all(model, 1, lora_dropout=0.4)
    for tensor in (factors.a, factors.b):
        h = model(x)
        (gradient,) = torch.autograd.grad(h.sum(), [tensor])
        assert torch.allclose((gradient * tensor).sum(), (h - base).sum())
    x = x.clone().requires_grad_(True)
    h = model(x)
    (gradient,) = torch.autograd.grad(h.sum(), [x])
    bias = model.layer.bias.sum() * h[..., 0].numel()
    assert torch.allclose((gradient * x).sum(), h.sum() - bias)


def test_adapters_with_different_dropouts_each_keep_their_own() -> None:
    model, x = holder("linear", torch.float64)
    for name, options in zip(("still", "dropping"), MIXED, strict=True):
        lowrank.inject(model, LoraConfig(target_modules=["layer"], init_lora_weights="random", **options), name)
    lowrank.set_active(model, ["still", "dropping"])
    model.train()
    assert not torch.equal(model(x), model(x))
    with torch.no_grad():
        model.layer.factors("dropping").b.zero_()
    assert torch.equal(model(x), model(x))
