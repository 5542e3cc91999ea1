"""Few rows in training: plain operations, the low-rank part in float32, the same law."""

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoraConfig
from lowrank.functional import lora_linear
from lowrank.kernels import fused, order
from lowrank.kernels.order import few_rows
from lowrank.study.doctor import describe_model

FEW_ROWS = True  # the limit is what it is for users (conftest.py)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def test_few_is_counted_in_rows_whatever_the_shape():
    assert few_rows(torch.empty(127, 8)) and few_rows(torch.empty(3, 42, 8)) and few_rows(torch.empty(8))
    assert not few_rows(torch.empty(128, 8)) and not few_rows(torch.empty(2, 64, 8))
    assert not few_rows(torch.empty(1, 8, device="meta"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masters", [torch.float32, None], ids=["float32 factors", "factors of x's dtype"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_answer_and_gradients_are_those_of_the_formula(monkeypatch, dtype, masters, bias):
    monkeypatch.setattr(fused._FusedLinear, "apply", lambda *a: pytest.fail("this is for many rows"))
    monkeypatch.setattr(order, "half_products_are_slow", lambda dtype: False)
    own = dtype if masters is None or dtype is torch.float64 else masters
    x, weight = torch.randn(2, 20, 12).to(dtype).requires_grad_(), torch.randn(7, 12).to(dtype)
    added = torch.randn(7).to(dtype).requires_grad_() if bias else None
    a, b = torch.randn(3, 12).to(own).requires_grad_(), torch.randn(7, 3).to(own).requires_grad_()
    h = lora_linear(x, weight, added, a, b, 1.7)
    dh = torch.randn(2, 20, 7).to(dtype)
    leaves = [x, a, b, *([added] if added is not None else [])]
    got = torch.autograd.grad(h, leaves, dh)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = exact[0] @ weight.double().t() + 1.7 * exact[0] @ exact[1].t() @ exact[2].t()
    wanted = wanted + exact[3] if bias else wanted
    assert h.dtype is dtype
    for one, other in zip([h, *got], [wanted, *torch.autograd.grad(wanted, exact, dh.double())], strict=True):
        assert (one.double() - other).norm() <= ROUNDING[dtype] * other.norm()
    for leaf, gradient in zip(leaves, got, strict=True):
        assert gradient.dtype is leaf.dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_dropout_of_few_rows_is_that_of_many(monkeypatch, dtype):
    """The same mask from the same seed, by plain operations and by the kernels: answers and gradients."""
    x, weight = torch.randn(2, 20, 12, dtype=dtype, requires_grad=True), torch.randn(7, 12, dtype=dtype)
    a, b = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((3, 12), (7, 3)))
    dh, found = torch.randn(2, 20, 7, dtype=dtype), []
    for limit in (order.FEW_ROWS, 0):
        monkeypatch.setattr(order, "FEW_ROWS", limit)
        torch.manual_seed(5)
        h = lora_linear(x, weight, None, a, b, 1.7, 0.3)
        found.append([h.detach(), *torch.autograd.grad(h, [x, a, b], dh)])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= ROUNDING[dtype] * other.norm()
    whole = lora_linear(x, weight, None, a, b, 1.7).detach()
    assert (found[0][0] - whole).norm() > 0.1 * whole.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("limit", [order.FEW_ROWS, 0], ids=["plain", "kernels"])
def test_no_row_at_all(monkeypatch, limit, dropout):
    """An expert that no token was sent to."""
    monkeypatch.setattr(order, "FEW_ROWS", limit)
    x, weight = torch.randn(0, 12, requires_grad=True), torch.randn(7, 12)
    a, b = torch.randn(3, 12, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    h = lora_linear(x, weight, None, a, b, 1.7, dropout)
    got = torch.autograd.grad(h.sum(), [x, a, b])
    assert h.shape == (0, 7) and [one.shape for one in got] == [x.shape, a.shape, b.shape]
    assert not any(one.any() for one in got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_b_of_zero_gives_the_base_bit_for_bit(dtype):
    x, weight, bias = torch.randn(5, 12).to(dtype), torch.randn(7, 12).to(dtype), torch.randn(7).to(dtype)
    h = lora_linear(x, weight, bias, torch.randn(3, 12, requires_grad=True), torch.zeros(7, 3), 2.0)
    assert h.requires_grad and torch.equal(h, nn.functional.linear(x, weight, bias))


def test_a_model_learns_the_same_with_few_rows_as_with_the_kernels(monkeypatch):
    """Three steps of a model whose layers share inputs, by both ways."""
    found = []
    for limit in (order.FEW_ROWS, 0):
        monkeypatch.setattr(order, "FEW_ROWS", limit)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        lowrank.inject(model, LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"))
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        x = torch.randn(6, 8).double()
        for _ in range(3):
            optimiser.zero_grad()
            model(x).square().sum().backward()
            optimiser.step()
        found.append(model(x).detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("tokens", "wanted"), [(127, "plain, as 127 tokens are fewer than 128"), (128, "fused")])
def test_doctor_says_which_way_a_batch_goes(tokens, wanted):
    paths = describe_model("nano", "all-linear", 8, tokens, "float32")
    assert {group.path for group in paths.groups} == {wanted}
    assert all(bool(group.order) == (wanted == "fused") for group in paths.groups)
