"""The fused linear map against the reference, in value, gradient, memory and manners."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lowrank.functional import lora_linear
from lowrank.kernels import fused, onednn, products, reference
from lowrank.kernels.fused import fused_linear, reason_against
from lowrank.kernels.order import accumulates, choose_order
from lowrank.kernels.processor import has_matrix_tiles

SCALE = 1.75
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def problem(tokens=(3, 5), k=6, d=7, rank=2, dtype=torch.float64, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, weight, a, b = draw(*tokens, k), draw(d, k), draw(rank, k), draw(d, rank)
    return x, weight, draw(d) if bias else None, a, b


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def relative(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-300))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    k=st.integers(1, 9),
    d=st.integers(1, 9),
    rank=st.integers(1, 4),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 10**6),
)
def test_values_and_gradients_are_the_references(tokens, k, d, rank, bias, dtype, seed):
    x, weight, bias_value, a, b = problem(tokens, k, d, rank, dtype, bias, seed)
    upstream = torch.randn(*tokens, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    wide = leaves(*(None if t is None else t.double() for t in (x, bias_value, a, b)))
    wanted = reference.lora_linear(wide[0], weight.double(), wide[1], wide[2], wide[3], SCALE)
    wanted.backward(upstream.to(dtype).double())
    own = leaves(x, bias_value, a, b)
    assert reason_against(own[0], weight, own[1]) is None
    got = lora_linear(own[0], weight, own[1], own[2], own[3], SCALE)
    got.backward(upstream.to(dtype))
    magnitude = (x.double().abs() @ weight.double().abs().t()).norm() + 1
    assert float((got.double() - wanted).detach().norm() / magnitude) < TOLERANCE[dtype]
    for mine, theirs in zip(own, wide, strict=True):
        if mine is not None:
            spread = theirs.grad.norm().clamp_min(upstream.norm())
            assert float((mine.grad.double() - theirs.grad).norm() / spread) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(4,), (2, 3)])
def test_gradcheck(tokens, bias):
    x, weight, bias_value, a, b = leaves(*problem(tokens, bias=bias))
    weight = weight.detach()

    def call(x, a, b, *rest):
        return lora_linear(x, weight, rest[0] if rest else None, a, b, SCALE)

    assert torch.autograd.gradcheck(call, (x, a, b, *([bias_value] if bias else [])))


def test_gradcheck_with_dropout_and_a_fixed_seed():
    x, weight, bias, a, b = leaves(*problem())

    def call(x, a, b):
        torch.manual_seed(3)
        return lora_linear(x, weight.detach(), bias.detach(), a, b, SCALE, dropout=0.4)

    assert torch.autograd.gradcheck(call, (x, a, b))


def test_a_transposed_weight_is_used_as_it_lies():
    x, weight, bias, a, b = problem()
    stored = weight.t().contiguous()
    assert relative(fused_linear(x, stored.t(), bias, a, b), reference.lora_linear(x, weight, bias, a, b, 1.0)) < 1e-14


def test_folding_gives_the_same_and_is_chosen_for_many_tokens():
    x, weight, bias, a, b = problem((4096,), 24, 24, 2, torch.float32)
    assert choose_order(4096, 24, 24, 2, torch.float32, "cpu").fold
    assert not choose_order(4096, 24, 24, 2, torch.bfloat16, "cpu").fold
    own = leaves(x, a, b)
    got = lora_linear(own[0], weight, bias, own[1], own[2], SCALE)
    wanted = reference.lora_linear(*(t.double() for t in (x, weight, bias, a, b)), SCALE)
    assert relative(got, wanted) < 1e-6
    with torch.no_grad():
        assert torch.equal(lora_linear(x, weight, bias, a, b, SCALE), got)


def test_second_derivatives_are_refused_in_words():
    x, weight, bias, a, b = leaves(*problem())
    h = lora_linear(x, weight.detach(), bias.detach(), a, b, SCALE)
    (dx,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def projections(x, count=3):
    made = [problem(seed=seed)[1:] for seed in range(count)]
    return [(w, bias, *leaves(a, b)) for w, bias, a, b in made]


def both_ways(run):
    """(gradients by the fused path, by the reference): `run(linear)` returns a list of gradients."""
    return run(lambda x, *rest: lora_linear(x, *rest, SCALE)), run(
        lambda x, *rest: reference.lora_linear(x, *rest, SCALE)
    )


def assert_same(got, wanted):
    for mine, theirs in zip(got, wanted, strict=True):
        assert relative(mine, theirs) < 1e-12


def test_projections_of_one_input_share_its_gradient():
    x = problem()[0]

    def run(linear):
        leaf = x.clone().requires_grad_()
        hidden = leaf * 2  # an input that is itself computed, and used elsewhere too
        outputs = [linear(hidden, *p) for p in projections(x)]
        loss = sum((i + 1) * h.square().sum() for i, h in enumerate(outputs)) + hidden.sin().sum()
        return torch.autograd.grad(loss, leaf)

    assert_same(*both_ways(run))


@pytest.mark.parametrize(("tokens", "columns", "dealt"), [(600, 256, True), (600, 250, False), (511, 256, False)])
def test_a_gradient_dealt_out_to_two_threads_is_the_product(monkeypatch, tokens, columns, dealt):
    """Sᵀ·Y in blocks of Y's columns, also of a Y that is a part of something wider."""
    monkeypatch.setattr(products, "has_avx2_alone", lambda: True)
    monkeypatch.setattr(onednn, "serves", lambda *_: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    s, y = torch.randn(tokens, 5), torch.randn(tokens, columns + 3)[:, :columns]
    batches = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *operands: batches.append(operands) or bmm(*operands))
    got = products.weight_gradient(s, y)
    assert got.shape == (5, columns) and bool(batches) == dealt
    assert relative(got, s.double().t() @ y.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 5])
def test_a_large_gradient_of_b_is_turned_to_the_same_bits(monkeypatch, rank, dtype):
    dbt = torch.randn(rank, 7, dtype=dtype)
    found = []
    for entries in (1 << 14, 0):
        monkeypatch.setattr(fused, "ONE_PASS", entries)
        found.append(fused.laid_out_as_b(dbt.clone(), SCALE, torch.float32))
        assert found[-1].shape == (7, rank) and found[-1].is_contiguous()
    assert torch.equal(*found) and torch.equal(found[0], dbt.float().t() * SCALE)


def test_one_sum_serves_all_projections(monkeypatch):
    from lowrank.kernels import shared_input as module

    made = []
    original = module.SharedInput.__init__
    monkeypatch.setattr(module.SharedInput, "__init__", lambda self, x: (made.append(self), original(self, x))[1])
    x = problem()[0].requires_grad_()
    outputs = [lora_linear(x, *p, SCALE) for p in projections(x)]
    assert len(made) == 1 and made[0].members == 3
    x2 = x + 0
    again = lora_linear(x2, *projections(x)[0], SCALE)
    assert len(made) == 2
    (sum(h.sum() for h in outputs) + again.sum()).backward()


def test_an_input_written_to_between_two_calls_is_another_input():
    base = problem()[0]

    def run(linear):
        leaf = base.clone().requires_grad_()
        hidden = leaf * 1
        with torch.no_grad():
            first = linear(hidden.detach(), *projections(base)[0]).sum() * 0
        one = linear(hidden, *projections(base)[0])
        hidden.mul_(3)
        two = linear(hidden, *projections(base)[1])
        return torch.autograd.grad((two.square().sum() + first), leaf), one.shape

    (got, _), (wanted, _) = both_ways(run)
    assert_same(got, wanted)


def test_an_input_that_comes_to_require_a_gradient_between_two_calls():
    x = problem()[0]
    ps = projections(x)
    lora_linear(x, *ps[0], SCALE)
    x.requires_grad_()
    (got,) = torch.autograd.grad(lora_linear(x, *ps[1], SCALE).square().sum(), x)
    (wanted,) = torch.autograd.grad(reference.lora_linear(x, *ps[1], SCALE).square().sum(), x)
    assert relative(got, wanted) < 1e-12


def test_a_backward_pass_that_stops_early_leaves_nothing_behind():
    x = problem()[0]

    def run(linear):
        leaf = x.clone().requires_grad_()
        hidden = leaf * 2
        ps = projections(x)
        outputs = [linear(hidden, *p) for p in ps]
        early = torch.autograd.grad(outputs[0].sum(), ps[0][3], retain_graph=True)  # only B: never reaches x
        partial = torch.autograd.grad(outputs[1].square().sum(), leaf, retain_graph=True)
        whole = torch.autograd.grad(sum(h.square().sum() for h in outputs), leaf, retain_graph=True)
        again = torch.autograd.grad(sum(h.square().sum() for h in outputs), leaf)
        return [*early, *partial, *whole, *again]

    assert_same(*both_ways(run))


def test_an_exception_in_backward_leaves_nothing_behind():
    x = problem()[0].requires_grad_()
    hidden = x * 2
    ps = projections(x)
    outputs = [lora_linear(hidden, *p, SCALE) for p in ps]

    def fail(_):
        raise RuntimeError("stopped")

    handle = hidden.register_hook(fail)
    with pytest.raises(RuntimeError, match="stopped"):
        torch.autograd.grad(sum(h.sum() for h in outputs), x, retain_graph=True)
    handle.remove()
    (got,) = torch.autograd.grad(sum(h.sum() for h in outputs), x)
    leaf = x.detach().clone().requires_grad_()
    plain = sum(reference.lora_linear(leaf * 2, *p, SCALE).sum() for p in ps)
    assert relative(got, torch.autograd.grad(plain, leaf)[0]) < 1e-12


def saved_bytes(run):
    seen = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(t.data_ptr(), t), lambda t: t):
        run()
    return seen


def test_what_is_kept_for_backward_is_the_shared_input_and_s():
    tokens, k, d, rank = 64, 32, 48, 4
    x, weight, bias, a, b = problem((tokens,), k, d, rank, torch.float32)
    x.requires_grad_()
    hidden = x * 1
    factors = [leaves(a, b) for _ in range(3)]
    kept = saved_bytes(lambda: [lora_linear(hidden, weight, bias, *f, 1.0).sum() for f in factors])
    for own in (weight, bias, *(t for f in factors for t in f)):
        kept.pop(own.data_ptr(), None)
    activations = sorted(t.numel() for t in kept.values() if t.numel() >= tokens)
    assert activations.count(tokens * k) == 1  # one x for three projections
    assert activations.count(tokens * rank) == 3
    assert tokens * d not in activations


def test_no_input_gradient_is_formed_where_none_is_needed():
    x, weight, bias, a, b = problem()
    a, b = leaves(a, b)
    h = lora_linear(x, weight, bias, a, b, SCALE)
    names, stack = set(), [h.grad_fn]
    while stack:
        node = stack.pop()
        names.add(type(node).__name__)
        stack += [n for n, _ in node.next_functions if n is not None]
    assert "_JoinBackward" not in names
    h.sum().backward()
    assert a.grad is not None and b.grad is not None


def test_float32_masters_get_float32_gradients_under_a_half_base():
    x, weight, bias, a, b = problem(dtype=torch.bfloat16)
    a, b = leaves(a.float(), b.float())
    lora_linear(x, weight, bias, a, b, SCALE).sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32


def test_autocast_computes_in_its_own_dtype():
    x, weight, bias, a, b = problem(dtype=torch.float32)
    own = leaves(x, a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = lora_linear(own[0], weight, bias, own[1], own[2], SCALE)
    assert h.dtype is torch.bfloat16
    h.sum().backward()
    wanted = reference.lora_linear(x, weight, bias, a, b, SCALE)
    assert relative(h, wanted) < 2e-2 and own[0].grad.dtype is torch.float32


def test_a_trained_base_takes_the_reference_path():
    x, weight, bias, a, b = leaves(*problem())
    assert "base weight is trained" in reason_against(x, weight, bias)
    lora_linear(x, weight, bias, a, b, SCALE).sum().backward()
    assert weight.grad is not None


def test_dropout_drops_the_inputs_of_a_only_and_only_in_training():
    x, weight, bias, a, b = problem((1, 50_000), 4, 3, 2, torch.float64)
    x = torch.ones_like(x)
    plain = lora_linear(x, weight, bias, a, b, SCALE)
    assert torch.equal(lora_linear(x, weight, bias, a, b, SCALE, dropout=0.3, training=False), plain)
    torch.manual_seed(0)
    change = lora_linear(x, weight, bias, a, b, SCALE, dropout=0.3) - F.linear(x, weight, bias)  # (1, T, 3)
    delta = SCALE * b @ a  # (3, 4)
    expected = delta.sum(1)
    variance = delta.square().sum(1) * 0.3 / 0.7  # of an entry kept with probability 0.7 and divided by it
    assert torch.all((change.mean((0, 1)) - expected).abs() < 5 * (variance / 50_000).sqrt())
    assert torch.allclose(change.var((0, 1)), variance, rtol=0.05)


def test_torch_func_and_vmap_go_by_the_plain_operations():
    x, weight, bias, a, b = problem()

    def loss(a, b, x):
        return lora_linear(x, weight, bias, a, b, SCALE).square().sum()

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, None, 0))(a, b, x)
    own = leaves(a)[0]
    loss(own, b, x[1]).backward()
    assert relative(per_example[1], own.grad) < 1e-12


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_function_is_one_graph():
    x, weight, bias, a, b = problem(dtype=torch.float32)
    own = leaves(x, a, b)
    compiled = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
    h = compiled(own[0], weight, bias, own[1], own[2], SCALE)
    h.sum().backward()
    assert relative(h, reference.lora_linear(x, weight, bias, a, b, SCALE)) < 1e-6


def test_orders_are_explained_and_do_not_depend_on_the_clock():
    for shape in ((1024, 768, 768), (1024, 768, 2048), (4096, 2048, 2048), (8, 768, 768)):
        first = choose_order(*shape, 16, torch.float32, "cpu")
        assert first == choose_order(*shape, 16, torch.float32, "cpu")
        assert ("fold" if first.fold else "accumulate") == first.why.split(":")[0]
    assert not choose_order(1024, 768, 768, 16, torch.float32, "cpu").fold  # too close to call
    assert accumulates(torch.float32, "cpu") and accumulates(torch.bfloat16, "cuda")
    assert accumulates(torch.bfloat16, "cpu") == has_matrix_tiles()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    from torch.utils.checkpoint import checkpoint

    x = problem()[0]

    def run(linear):
        leaf = x.clone().requires_grad_()
        ps = projections(x)

        def block(hidden):
            return sum(linear(hidden, *p).sin() for p in ps)

        out = checkpoint(block, leaf * 2, use_reentrant=reentrant)
        out.square().sum().backward()
        return [leaf.grad, *(p[2].grad for p in ps), *(p[3].grad for p in ps)]

    assert_same(*both_ways(run))


def test_an_empty_batch_passes():
    _, weight, bias, a, b = problem()
    a, b = leaves(a, b)
    x = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    h = lora_linear(x, weight, bias, a, b, SCALE)
    h.sum().backward()
    assert h.shape == (0, 7) and x.grad.shape == (0, 6) and not a.grad.any()


def test_modules_keep_their_dtype_policy_in_a_model():
    import lowrank

    layer = nn.Sequential(nn.Linear(6, 7).bfloat16())
    lowrank.inject(layer, lowrank.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights="random"))
    factors = layer[0].active_factors[0]
    assert factors.a.dtype is torch.float32
    layer(torch.randn(2, 6).bfloat16()).sum().backward()
    assert factors.b.grad.dtype is torch.float32
