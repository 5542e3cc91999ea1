"""Projections of one input are computed together, and nobody can tell from the numbers."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import LoraConfig
from lowrank.kernels import together
from lowrank.kernels.fused import fused_linear


class Block(nn.Module):
    """Three projections of one input, then one that is alone with its own."""

    def __init__(self, bias=True):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(24, n, bias=bias) for n in (24, 32, 24, 24))
        self.between = lambda: None
        self.skipped = ()

    def forward(self, x):
        q = self.q(x)
        self.between()
        k = 0 if "k" in self.skipped else self.k(x).sin()[..., :24]
        return self.o(q * k + self.v(x))


def adapted(dtype=torch.float32, **config):
    torch.manual_seed(0)
    model = Block(config.pop("bias", True)).to(dtype)
    config = {"r": 4, "lora_alpha": 7, "init_lora_weights": "random", "rank_pattern": {"v": 2}} | config
    lowrank.inject(model, LoraConfig(target_modules=["q", "k", "v", "o"], **config))
    return model


def batch(dtype=torch.float32, seed=1):
    return torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def results(model, x):
    """The answer and the gradients of x and of all that is trained."""
    model.zero_grad()
    h = model(x * 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [h.detach(), *torch.autograd.grad(h.square().sum(), [x, *trained])]


def by_itself(layer, x, own, share_mask=True):
    return together._alone(layer, x, own, share_mask)


def alone(model, x):
    """The same with every projection computed by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank.layers.linear.projection", by_itself)
        return results(model, x)


def nodes(monkeypatch):
    """The sizes of the groups that are computed from here on."""
    sizes = []
    original = together._compute
    monkeypatch.setattr(
        together, "_compute", lambda c, x, group, m: (sizes.append(len(group)), original(c, x, group, m))[1]
    )
    return sizes


def assert_same_bits(got, wanted):
    assert len(got) == len(wanted) and all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", [{}, {"bias": False}, {"use_rslora": True}], ids=str)
def test_every_call_has_the_bits_of_separate_projections(monkeypatch, dtype, config):
    """The first call learns, later ones go together: all the same."""
    model, x = adapted(dtype, **config), batch(dtype)
    wanted = alone(model, x)
    sizes = nodes(monkeypatch)
    for _ in range(3):
        assert_same_bits(results(model, x), wanted)
    assert sizes == [3, 1] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_too(monkeypatch, dtype):
    """x, the weights and the biases are float32, the products are not; a trained bias keeps its dtype."""
    model, x = adapted(), batch()
    model.k.bias.requires_grad_()
    with torch.autocast("cpu", dtype):
        wanted = alone(model, x)
        sizes = nodes(monkeypatch)
        for _ in range(3):
            got = results(model, x)
            assert_same_bits(got, wanted)
        assert {one.dtype for one in got[1:]} == {torch.float32}
    assert sizes == [3, 1] * 2
    exact = results(model.double(), batch().double().detach().requires_grad_())
    for one, other in zip(got, exact, strict=True):
        assert (one.double() - other).norm() <= 0.05 * other.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_trained_bias_gets_its_gradient_in_a_group(autocast):
    model, x = adapted(), batch()
    model.k.bias.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted = alone(model, x)
        for _ in range(3):
            assert_same_bits(results(model, x), wanted)


def test_a_group_is_one_node():
    model, x = adapted(), batch()
    results(model, x)
    seen = {}
    for name in "qkv":
        model.get_submodule(name).register_forward_hook(lambda m, i, h, n=name: seen.update({n: h.grad_fn}))
    model(x * 1)
    assert seen["q"] is seen["k"] is seen["v"]


def test_an_answer_nobody_uses_costs_no_gradient():
    model, x = adapted(), batch()
    results(model, x)
    q, k = model.q, model.k

    def partial():
        hidden = x * 1
        q(hidden), model.v(hidden)
        return torch.autograd.grad(k(hidden).square().sum(), [x, k.active_factors[0].b])

    got = partial()
    hidden = x * 1
    *own, _ = k.operands()
    wanted = torch.autograd.grad(fused_linear(hidden, *own).square().sum(), [x, own[3]])
    assert_same_bits(got, wanted)


@pytest.mark.parametrize("what", ["a", "b", "weight", "bias", "scale", "active", "x", "no_grad"])
def test_what_changes_between_two_calls_is_seen(what):
    """k's answer waits since q's call; by k's call it is out of date."""
    model, x = adapted(), batch()
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=2, target_modules=["k"], init_lora_weights="random"), "other")
    lowrank.set_active(model, ["default"])
    results(model, x)
    factors, hidden = model.k.factors("default"), x * 1
    with torch.no_grad():
        h = model.q(hidden)
        again = model.q(hidden)
    h = model.q(hidden)
    if what == "no_grad":
        with torch.no_grad():
            assert not model.k(hidden).requires_grad
        return
    with torch.no_grad():
        if what in ("a", "b"):
            getattr(factors, what).mul_(3)
        elif what in ("weight", "bias"):
            getattr(model.k, what).add_(1)
        elif what == "scale":
            factors.scale = 11.0
        elif what == "active":
            lowrank.set_active(model, ["other"])
        else:
            hidden = hidden.detach()
            hidden.add_(1)
    got = model.k(hidden)
    weight, bias, a, b, scale, _ = model.k.operands()
    wanted = nn.functional.linear(hidden, weight, bias) + scale * (hidden @ a.t()) @ b.t()
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(h, again)


def test_a_new_bias_at_the_id_of_the_old_is_seen():
    """No graph holds a frozen bias: only the waiting answer keeps its id from being given to another."""
    model, x = adapted(), batch()
    model.k.bias = nn.Parameter(torch.zeros(32), requires_grad=False)  # as new ones, never written to
    results(model, x)
    hidden = x * 1
    model.q(hidden)
    waiting, old = together._local.calls.ready[id(model.k)].h.detach().clone(), id(model.k.bias)
    ones = torch.ones(32)
    model.k.bias = None
    others = [nn.Parameter(ones, requires_grad=False) for _ in range(1000)]
    model.k.bias = next((one for one in others if id(one) == old), others[0])
    got = model.k(hidden)
    assert not torch.equal(got, waiting)
    assert torch.equal(got, by_itself(model.k, hidden, model.k.operands()))


def test_a_follower_that_does_not_come_is_let_go_and_not_waited_for_again(monkeypatch):
    model, x = adapted(), batch()
    results(model, x)
    model.skipped = ("k",)
    sizes = nodes(monkeypatch)
    h = model(x * 1)
    assert sizes[0] == 3
    hidden = weakref.ref(h)
    del h
    gc.collect()
    assert hidden() is None and not together._local.calls.ready
    assert torch.equal(model(x * 1).detach(), alone_forward(model, x))
    assert sizes == [3, 1, 1]  # o is alone with its input; q and v are no longer computed ahead
    model.skipped = ()
    assert_same_bits(results(model, x), alone(model, x))
    assert sizes == [3, 1, 1, 1]


def alone_forward(model, x):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank.layers.linear.projection", by_itself)
        return model(x * 1).detach()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_before_and_after_learning(reentrant):
    model, x = adapted(), batch()
    wanted = alone(model, x)
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(3):
        model.zero_grad()
        leaf = x.detach().clone().requires_grad_()
        checkpoint(model, leaf * 1, use_reentrant=reentrant).square().sum().backward()
        assert_same_bits([leaf.grad, *(p.grad for p in trained)], wanted[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dropout_has_the_bits_of_separate_projections(monkeypatch, dtype):
    """One mask for q, k and v, whether they are computed one by one or together, and another for o."""
    model, x = adapted(dtype, lora_dropout=0.4), batch(dtype)
    torch.manual_seed(3)
    wanted = alone(model, x)
    sizes = nodes(monkeypatch)
    for _ in range(3):
        torch.manual_seed(3)
        assert_same_bits(results(model, x), wanted)
    assert sizes == [3, 1] * 2


def test_an_answer_computed_ahead_is_a_reading_of_the_mask(monkeypatch):
    """k's answer was computed with q's; called again with the same input, k sees another mask, as it would alone."""
    model, x = adapted(lora_dropout=0.4), batch()
    for expected in ([], [3]):
        sizes, hidden = nodes(monkeypatch), x * 1
        model.q(hidden)
        first, second = model.k(hidden), model.k(hidden)
        model.v(hidden)
        assert sizes == expected and not torch.equal(first, second)


def test_projections_that_differ_in_dropout_do_not_go_together(monkeypatch):
    model, x = adapted(lora_dropout=0.4), batch()
    model.k.factors("default").dropout = 0.2
    results(model, x)
    sizes = nodes(monkeypatch)
    torch.manual_seed(3)
    got = results(model, x)
    torch.manual_seed(3)
    wanted = alone(model, x)
    assert_same_bits(got, wanted)  # of dX too, though k's part comes between those of q and v
    assert sizes == [2, 1]  # q and v, o


CALLS = {"another order": "qvk", "one twice": "qkvk", "the first again": "qkvq", "one more": "qokv", "fewer": "qv"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("order", CALLS.values(), ids=CALLS)
def test_calls_in_another_order_than_was_learned_have_the_bits_of_separate_projections(monkeypatch, order, dtype):
    model, x = adapted(dtype, bias=False), batch(dtype)
    results(model, x)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]

    def step():
        hidden = x * 1
        answers = [model.get_submodule(name)(hidden).square().sum() * (i + 1) for i, name in enumerate(order)]
        return torch.autograd.grad(sum(answers), trained, allow_unused=True, materialize_grads=True)

    sizes = nodes(monkeypatch)
    got = [step() for _ in range(2)]
    assert sizes[0] == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank.layers.linear.projection", by_itself)
        wanted = step()
    for one in got:
        assert_same_bits(one, wanted)


def test_a_layer_called_with_another_input_in_a_checkpointed_block_between():
    """What is checkpointed is computed alone, with an input of its own, so k's part goes into another sum than q's."""
    model, x = adapted(torch.float64), batch(torch.float64)
    results(model, x)

    def step():
        hidden = x * 1
        q = model.q(hidden)
        between = checkpoint(model.o, hidden * 2, use_reentrant=False)
        return torch.autograd.grad((q * between + model.v(hidden)).square().sum() + model.k(hidden).sin().sum(), x)

    got = step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank.layers.linear.projection", by_itself)
        assert_same_bits(got, step())


def test_an_answer_that_waits_is_not_given_after_the_backward_pass_of_its_group():
    model, x = adapted(), batch()
    results(model, x)
    hidden = x * 1
    model.q(hidden).sum().backward(retain_graph=True)
    (got,) = torch.autograd.grad(model.k(hidden).square().sum(), x)
    (wanted,) = torch.autograd.grad(model.k(x * 1).square().sum(), x)
    assert torch.equal(got, wanted)


def test_nothing_is_kept_of_a_group():
    """Neither x nor the answers outlive the pass, with the garbage collector switched off."""
    model = adapted()
    for _ in range(3):
        results(model, batch())
    gc.collect()
    gc.disable()
    try:
        x = batch()
        hidden = x * 1
        watched = [weakref.ref(hidden), weakref.ref(h := model(hidden))]
        del hidden, h, x
        assert not any(ref() is not None for ref in watched)
    finally:
        gc.enable()


def test_copies_and_other_models_learn_for_themselves():
    model, x = adapted(), batch()
    results(model, x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.k.factors("default").b.mul_(2)
    for one in (other, model, other, model):
        assert_same_bits(results(one, x), alone(one, x))
    assert_same_bits(
        results(lowrank.unload(copy.deepcopy(model)).requires_grad_(True), x)[:1], [lowrank_base(model, x)]
    )


def lowrank_base(model, x):
    with lowrank.disabled(model):
        return model(x * 1).detach()
