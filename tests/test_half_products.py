"""bfloat16 and float16 on a CPU without fast products of them: all but W0·x is computed in float32."""

import pytest
import torch
from torch.nn import functional as F

from lowrank.functional import lora_linear
from lowrank.kernels import order, processor, products, reference

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["widened", "not widened"])
def widened(request, monkeypatch):
    monkeypatch.setattr(products, "half_products_are_slow", lambda dtype: request.param)
    return request.param


def relative(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_those_of_float64(dtype, dropout):
    given = [
        torch.randn(3, 50, 40),
        torch.randn(24, 40) / 6,
        torch.randn(24),
        torch.randn(8, 40) / 6,
        torch.randn(24, 8),
    ]
    x, weight, bias, a, b = (t.to(dtype) for t in given)
    found = []
    for map_, wide in ((lora_linear, dtype), (lora_linear, torch.float64)):
        torch.manual_seed(1)
        leaves = [t.to(wide, copy=True).requires_grad_() for t in (x, a, b)]
        masters = [leaves[0], weight.to(wide), bias.to(wide), leaves[1], leaves[2]]
        h = map_(*masters, 1.75, dropout) + map_(*masters, 0.5, dropout)
        h.square().sum().backward()
        found.append([h.detach(), *(leaf.grad for leaf in leaves)])
    for got, wanted in zip(*found, strict=True):
        assert got.dtype is dtype
        assert relative(got, wanted) < (0.02 if dtype is torch.bfloat16 else 0.003)
    if not dropout:
        plain = reference.lora_linear(x, weight, bias, a, b, 1.75)
        assert relative(lora_linear(x, weight, bias, a, b, 1.75), plain.double()) < 0.02


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_an_adapter_that_changes_nothing_gives_the_answer_of_the_base_bit_for_bit(dtype):
    x, weight, bias = torch.randn(2, 70, 24).to(dtype), torch.randn(40, 24).to(dtype), torch.randn(40).to(dtype)
    h = lora_linear(
        x, weight, bias, torch.randn(4, 24, requires_grad=True), torch.zeros(40, 4, requires_grad=True), 2.0
    )
    assert torch.equal(h, F.linear(x, weight, bias))


def test_it_is_more_exact_than_half_products_not_less(monkeypatch):
    x, weight = torch.randn(300, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    dy, onto = torch.randn(300, 96).bfloat16(), torch.randn(300, 64).bfloat16()
    exact = onto.double() + dy.double() @ weight.double()
    monkeypatch.setattr(products, "half_products_are_slow", lambda dtype: True)
    got = products.input_gradient(dy, weight, onto.clone())
    assert torch.equal(got, exact.to(torch.bfloat16)) or relative(got, exact) < 2e-3
    assert products.weight_gradient(dy, x).dtype is torch.float32


def test_few_rows_go_by_nodes_where_plain_products_are_slow(monkeypatch):
    monkeypatch.setattr(order, "FEW_ROWS", 128)
    for slow in (True, False):
        monkeypatch.setattr(order, "half_products_are_slow", lambda dtype, slow=slow: slow and dtype in HALF)
        assert order.few_rows(torch.empty(8, 4, dtype=torch.bfloat16)) != slow
        assert order.few_rows(torch.empty(8, 4))


def test_wide_dtypes_are_never_slow():
    assert not processor.half_products_are_slow(torch.float32) and not processor.half_products_are_slow(torch.float64)


@pytest.mark.parametrize("slow", [True, False])
def test_doctor_and_train_say_so_before_anything_is_computed(monkeypatch, slow):
    monkeypatch.setattr(processor, "half_products_are_slow", lambda dtype: slow and dtype in HALF)
    said = processor.warning_of_slow_products(torch.bfloat16, "cpu")
    assert bool(said) == slow and ("float32" in said) == slow
    assert not processor.warning_of_slow_products(torch.float32, "cpu")
    assert not processor.warning_of_slow_products(torch.bfloat16, "cuda")
