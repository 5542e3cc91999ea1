"""Under autocast an input is cast once, and the copy is never one of something else."""

import gc
import weakref

import pytest
import torch

from lowrank.kernels import autocast
from lowrank.kernels.autocast import under_autocast

BF16 = torch.autocast("cpu", torch.bfloat16)


def test_calls_with_one_tensor_share_one_copy_and_one_gradient():
    leaf = torch.randn(4, 6, requires_grad=True)
    x = leaf * 1
    with BF16:
        first, second = under_autocast(x), under_autocast(x)
    assert first is second and first.dtype is torch.bfloat16 and torch.equal(first, x.bfloat16())
    (first.sum() + second.sum()).backward()
    assert torch.equal(leaf.grad, torch.full((4, 6), 2.0))


@pytest.mark.parametrize("what", ["written", "no_grad", "grad", "requires_grad", "dtype", "another"])
def test_what_changes_between_two_calls_is_seen(what):
    x = original = torch.randn(4, 6)
    with BF16, torch.set_grad_enabled(what != "grad"):
        first = under_autocast(x)
    if what == "written":
        x.add_(1)
    elif what == "requires_grad":
        x.requires_grad_()
    elif what == "another":
        x = x.clone() + 1
    dtype = torch.float16 if what == "dtype" else torch.bfloat16
    with torch.autocast("cpu", dtype), torch.set_grad_enabled(what != "no_grad"):
        second = under_autocast(x)
        assert second is not first and under_autocast(x) is second
    assert (original is x) == (what != "another")  # two living tensors, not one after the other
    assert torch.equal(second, x.to(dtype)) and second.requires_grad == x.requires_grad


def test_a_graph_is_not_lost_to_a_copy_made_without_one():
    x = torch.randn(4, 6, requires_grad=True) * 1
    with BF16:
        with torch.no_grad():
            assert not under_autocast(x).requires_grad
        assert under_autocast(x).requires_grad


def test_the_copy_dies_with_its_tensor():
    x = torch.randn(4, 6, requires_grad=True) * 1
    with BF16:
        copy = weakref.ref(under_autocast(x))
    assert copy() is not None
    gc.disable()
    try:
        del x
        assert copy() is None and not autocast._casts._last.values
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_what_autocast_leaves_is_left(dtype):
    x = torch.randn(4, 6, dtype=dtype)
    with BF16:
        assert under_autocast(x) is x
    assert under_autocast(x.float()).dtype is torch.float32


def test_inference_tensors_have_no_version_and_are_cast_each_time():
    with torch.inference_mode(), BF16:
        x = torch.randn(4, 6)
        assert torch.equal(under_autocast(x), x.bfloat16()) and under_autocast(x) is not under_autocast(x)


def test_transformed_tensors_are_not_remembered():
    with BF16:
        doubled = torch.func.vmap(lambda row: under_autocast(row).float() * 2)(torch.ones(3, 4))
        slope = torch.func.grad(lambda x: under_autocast(x).float().square().sum())(torch.full((4,), 3.0))
    assert torch.equal(doubled, torch.full((3, 4), 2.0)) and torch.equal(slope, torch.full((4,), 6.0))
