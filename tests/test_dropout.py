"""The mask of dropout: its probability, its independence, one bit an entry, the same in both passes."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import LoraConfig
from lowrank.functional import lora_linear
from lowrank.kernels import dropout
from lowrank.kernels.dropout import CLOSE, draw, shared

PROBABILITIES = [0.001, 0.05, 0.1, 0.25, 1 / 3, 0.5, 0.9, 0.999]


def ones_of(mask, x):
    """The mask as zeros and ones in x's shape and dtype."""
    return mask.of(torch.ones_like(x))


@pytest.mark.parametrize("probability", PROBABILITIES)
def test_as_many_are_dropped_as_asked(probability):
    """Within five standard deviations, in all and in every one of the bits of a word."""
    torch.manual_seed(0)
    x = torch.empty(1 << 14, 64)
    mask = draw(probability, x)
    ones = ones_of(mask, x)
    assert abs(1 - mask.kept - probability) <= max(CLOSE * min(probability, 1 - probability), 2**-17)
    spread = math.sqrt(mask.kept * (1 - mask.kept))
    assert set(ones.unique().tolist()) == {0.0, 1.0}
    assert abs(ones.mean().item() - mask.kept) < 5 * spread / math.sqrt(ones.numel())
    assert (ones.mean(0) - mask.kept).abs().max() < 5 * spread / math.sqrt(ones.shape[0])


def test_entries_are_independent_of_one_another():
    """No two of the bits of a word, and no two words that follow each other, are correlated."""
    torch.manual_seed(0)
    ones = ones_of(draw(0.3, torch.empty(1 << 14, 64)), torch.empty(1 << 14, 64))
    deviations = (ones - ones.mean(0)) / ones.std(0)
    both = torch.cat([deviations[:-1], deviations[1:]], dim=1)
    correlation = both.t() @ both / both.shape[0] - torch.eye(128)
    assert correlation.abs().max() < 6 / math.sqrt(both.shape[0])


def test_a_seed_fixes_the_mask_and_another_call_draws_another():
    x = torch.empty(5, 13, 7)
    torch.manual_seed(3)
    first, second = ones_of(draw(0.4, x), x), ones_of(draw(0.4, x), x)
    torch.manual_seed(3)
    assert torch.equal(ones_of(draw(0.4, x), x), first) and not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (3, 5), (2, 3, 11), (64, 64)])
def test_any_shape_and_dtype(shape, dtype):
    torch.manual_seed(0)
    x = torch.empty(shape, dtype=dtype)
    mask = draw(0.5, x)
    ones = ones_of(mask, x)
    assert ones.shape == x.shape and ones.dtype is dtype and mask.bits.numel() == max(1, math.ceil(x.numel() / 64))
    assert torch.equal(ones.double(), ones_of(mask, x.double()))


def test_the_answer_and_all_gradients_are_those_of_that_mask(monkeypatch):
    """h = W0·x + bias + s/q·B·A·(m∘x), and nothing of a dropped entry passes A in either direction."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 12).double(), torch.randn(7, 12).double(), torch.randn(7).double()
    a, b = torch.randn(3, 12).double(), torch.randn(7, 3).double()
    leaves = [tensor.requires_grad_() for tensor in (x, bias, a, b)]
    drawn = []
    monkeypatch.setattr("lowrank.kernels.linear.draw", lambda p, t: drawn.append(draw(p, t)) or drawn[-1])
    h = lora_linear(x, weight, bias, a, b, 1.3, dropout=0.4)
    (mask,) = drawn
    ones = ones_of(mask, x.detach())
    assert 0 < ones.sum() < ones.numel()
    wanted = x @ weight.t() + bias + 1.3 / mask.kept * (ones * x) @ a.t() @ b.t()
    torch.testing.assert_close(h, wanted)
    dh = torch.randn_like(h)
    got, expected = torch.autograd.grad(h, leaves, dh), torch.autograd.grad(wanted, leaves, dh)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_product_is_added_through_the_mask(monkeypatch, dtype, on_cpu):
    """dX += m∘(dS·A) in blocks of rows, of which the last may be short; exact, since all numbers are small integers."""
    monkeypatch.setattr(dropout, "BLOCK", 16 * 13 * dtype.itemsize)
    ds, a = torch.randint(-3, 4, (43, 3)).to(dtype), torch.randint(-3, 4, (3, 13)).to(dtype)
    dx = torch.randint(-9, 9, (43, 13)).to(dtype)
    mask = draw(0.4, dx) if on_cpu else dropout.Mask(0.6, 7, None)
    wanted = dx + ones_of(mask, dx) * (ds @ a)
    mask.add_product_(dx, ds, a)
    assert torch.equal(dx, wanted) and not torch.equal(ones_of(mask, dx), torch.ones_like(dx))


def test_what_is_dropped_does_not_matter_at_all():
    """Also not where it is no number."""
    x = torch.full((8, 8), math.inf)
    seen = draw(0.5, x).of(x)
    assert set(seen.unique().tolist()) == {0.0, math.inf}


def test_all_that_read_one_tensor_read_it_through_one_mask():
    x, q, k = torch.randn(6, 64), nn.Identity(), nn.Identity()
    first = shared(0.5, x, q)
    assert shared(0.5, x, k) is first
    again = shared(0.5, x, k)  # k reads x a second time: as a second pass of a model does
    assert again is not first and shared(0.5, x, q) is again
    assert shared(0.4, x, nn.Identity()) is not again
    last = shared(0.5, x, nn.Identity())
    x.add_(1)
    assert shared(0.5, x, nn.Identity()) is not last
    assert shared(0.5, x.clone(), nn.Identity()) is not shared(0.5, x, nn.Identity())
    with torch.inference_mode():
        x = torch.randn(6, 64)
        assert shared(0.5, x, q) is not shared(0.5, x, k)


def test_a_reader_that_is_gone_has_no_heir():
    """Else it would depend on where memory lies whether a new reader gets a new mask."""
    x = torch.randn(6, 64)
    first = shared(0.5, x, nn.Identity())
    assert all(shared(0.5, x, nn.Identity()) is first for _ in range(100))


@pytest.mark.parametrize("training", [True, False])
def test_projections_of_one_input_share_the_mask_and_a_second_pass_draws_another(training):
    """Equal factors give q and k equal changes; o, which reads another tensor, and the next pass see other masks."""
    q, k, o = nn.Linear(64, 8, bias=False), nn.Linear(64, 8, bias=False), nn.Linear(64, 8, bias=False)
    model = nn.ModuleDict({"q": q, "k": k, "o": o})
    lowrank.inject(model, LoraConfig(r=2, target_modules=["q", "k", "o"], lora_dropout=0.5, init_lora_weights="random"))
    for one in (k, o):
        one.weight.data = q.weight.data
        one.load_state_dict(q.state_dict())
    model.train(training)
    x = torch.randn(16, 64, requires_grad=True) * 1
    first, same, other, again = q(x), k(x), o(x * 1), q(x)
    assert torch.equal(first, same)
    assert torch.equal(first, other) is torch.equal(first, again) is not training


def test_it_is_kept_at_one_bit_an_entry():
    model = nn.Sequential(nn.Linear(256, 64))
    lowrank.inject(model, LoraConfig(r=2, target_modules=["0"], lora_dropout=0.1))
    x, kept = torch.randn(128, 256, requires_grad=True), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(x)
    assert sum(size for at, size in kept.items() if at not in own) == 128 * 256 // 8 + 128 * 2 * 4  # the mask, and S


def test_elsewhere_than_on_cpu_the_mask_is_drawn_again_from_its_seed():
    """The path of a GPU: nothing is kept but the seed."""
    x = torch.empty(40, 50)
    mask = dropout.Mask(0.7, 5, None)
    assert torch.equal(ones_of(mask, x), ones_of(mask, x)) and set(ones_of(mask, x).unique().tolist()) == {0.0, 1.0}
    assert abs(ones_of(mask, x).mean().item() - 0.7) < 0.06


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("blocks", [["q", "k", "v"], ["qk", "v"], ["qkv"]], ids=str)
def test_blocks_that_are_computed_again_draw_what_they_drew(reentrant, blocks):
    """Several checkpointed blocks given one tensor, as attention and MLP side by side: the change is linear in B, so
    the gradient of B at B is the change itself, if both passes saw one mask."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(64, 8, bias=False) for name in "qkv"})
    lowrank.inject(model, LoraConfig(r=2, target_modules=list("qkv"), lora_dropout=0.5, init_lora_weights="random"))
    for layer in model.values():
        layer.weight.data.zero_()
    x = torch.randn(16, 64, requires_grad=True) * 1

    def block(names):
        return lambda t: sum((i + 1) * model[name](t) for i, name in enumerate(names))

    weights, total, changes = torch.randn(16, 8), 0, []
    for names in blocks:
        changes.append(checkpoint(block(names), x, use_reentrant=reentrant))
        total = total + (weights * changes[-1]).sum()
    total.backward()
    for names, change in zip(blocks, changes, strict=True):
        got = sum((model[name].factors("default").b.grad * model[name].factors("default").b).sum() for name in names)
        torch.testing.assert_close(got, (weights * change).sum())
