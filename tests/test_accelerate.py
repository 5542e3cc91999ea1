"""`lowrank.peft.accelerate`: PEFT's answers and gradients, faster, and nothing else changed."""

import copy
import pickle

import peft
import pytest
import torch
from torch import Tensor, nn

import accelerate_models as models
import lowrank
from accelerate_models import answer, assert_same, base_model, config, counted, gradients, pair, peft_model, stir
from lowrank.errors import TargetError
from lowrank.peft import accelerate, restore

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")
KINDS = sorted(models.BASES)


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def reasons(model: nn.Module) -> set[str]:
    return {layer.reason for layer in accelerate(model).with_peft if layer.reason is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_float32_answers_and_gradients_are_peft_s(kind, monkeypatch):
    plain, fast = pair(peft_model(kind))
    layers = accelerate(fast).layers
    assert len(layers) > 7 and all(layer.reason is None for layer in layers)
    assert_same(plain, fast)
    with counted(monkeypatch) as ranks:
        answer(fast)
        assert ranks == [models.RANK] * len(layers)


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_s_gradient_is_peft_s(kind):
    plain, fast = pair(peft_model(kind))
    got = []
    for model in (plain, fast):
        embeds = model.get_input_embeddings()(models.IDS).detach().requires_grad_()
        model(inputs_embeds=embeds, labels=models.IDS).loss.backward()
        got.append(embeds.grad)
    torch.testing.assert_close(got[1], got[0], rtol=1e-4, atol=1e-5 * float(got[0].abs().max()))


def _error(model: nn.Module, exact: Tensor, exact_gradients: dict[str, Tensor]) -> Tensor:
    """(error of the answer, mean error of the gradients), each relative to float64's."""
    got = gradients(model)
    assert got.keys() == exact_gradients.keys()
    assert all(g.dtype is torch.float32 for g in got.values())  # the masters PEFT made
    errors = [float((got[n].double() - e).norm() / e.norm()) for n, e in exact_gradients.items()]
    return torch.tensor(
        [float((answer(model).detach().double() - exact).norm() / exact.norm()), sum(errors) / len(errors)]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_errors_are_of_peft_s_size(kind):
    """Against the same numbers in float64, over four draws; a change as large as the base's own weight."""
    errors = []
    for seed in range(4):
        model = peft.get_peft_model(base_model(kind, torch.bfloat16, seed), config(kind))
        plain, fast = pair(stir(model, std=0.05))
        assert answer(fast).dtype is answer(plain).dtype is torch.bfloat16
        exact = copy.deepcopy(plain).double()
        reference = answer(exact).detach(), gradients(exact)
        errors.append(torch.stack([_error(plain, *reference), _error(fast, *reference)]))
    by_peft, ours = torch.stack(errors).mean(0)
    assert (ours < 1.5 * by_peft).all(), (ours, by_peft)
    assert (ours < 0.04).all(), ours  # 0.0301 where sums are not vectorised (ATEN_CPU_CAPABILITY=default)


def test_several_active_adapters_add_up(monkeypatch):
    model = peft_model()
    model.add_adapter("second", config(r=3, lora_alpha=5))
    model.base_model.set_adapter(["default", "second"])
    plain, fast = pair(stir(model))
    assert_same(plain, fast)
    with counted(monkeypatch) as ranks:
        answer(fast)
    assert set(ranks) == {models.RANK + 3}


def test_the_scale_is_read_at_each_call():
    from peft.helpers import rescale_adapter_scale

    plain, fast = pair(peft_model())
    before = answer(fast)
    with rescale_adapter_scale(plain, 3.0), rescale_adapter_scale(fast, 3.0):
        assert_same(plain, fast)
        assert not torch.allclose(answer(fast), before, atol=1e-2)
    torch.testing.assert_close(answer(fast), before)


def test_trained_biases_of_the_base_get_their_gradients():
    plain, fast = pair(peft_model(bias="all"))
    assert sum(name.endswith("bias") for name in gradients(fast)) >= 6
    assert_same(plain, fast)


def test_the_answer_may_be_written_to_in_place():
    """As ReLU(inplace=True) after a linear layer does."""
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))
    plain, fast = pair(stir(peft.get_peft_model(net, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"]))))
    x = torch.randn(7, 6)
    for model in (plain, fast):
        model(x).square().sum().backward()
    for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (3, 6), (2, 3, 6)])
def test_inputs_of_any_shape(shape):
    net = nn.Sequential(nn.Linear(6, 5))
    plain, fast = pair(stir(peft.get_peft_model(net, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))))
    x = torch.randn(shape)
    torch.testing.assert_close(fast(x), plain(x))


def test_dropout_has_peft_s_law_and_a_true_gradient(monkeypatch):
    """With A = B = 1 the change is the dropped x itself: each entry is 0 or x/(1 − p), scaled."""
    width, p = 64, 0.25
    net = nn.Sequential(nn.Linear(width, width))
    made = peft.LoraConfig(r=width, lora_alpha=3 * width, target_modules=["0"], lora_dropout=p)
    model = peft.get_peft_model(net, made)
    layer = model.base_model.model[0]
    for part in (layer.lora_A, layer.lora_B):
        nn.init.eye_(part["default"].weight)
    accelerate(model)
    x = torch.randn(50, width, requires_grad=True)
    with counted(monkeypatch) as ranks:
        h = model(x)
    assert ranks == [width]
    mask = ((h - layer.base_layer(x)) / (3 * x)).detach()
    kept = mask > 0.5
    torch.testing.assert_close(mask, kept / (1 - p), rtol=1e-3, atol=1e-3)
    assert abs(float(kept.float().mean()) - (1 - p)) < 0.03
    assert not torch.equal(model(x), h)
    g = torch.randn_like(h)
    h.backward(g)
    torch.testing.assert_close(x.grad, g @ layer.base_layer.weight + 3 * g * mask, rtol=1e-3, atol=1e-3)
    model.eval()
    torch.testing.assert_close(model(x), layer.base_layer(x) + 3 * x)


def test_every_layer_draws_a_mask_of_its_own_as_in_peft():
    """Also those that are called with one tensor and have equal weights and factors, in the first passes and later."""
    net = nn.ModuleDict({name: nn.Linear(64, 8) for name in "qk"})
    net["k"].load_state_dict(net["q"].state_dict())
    model = peft.get_peft_model(nn.Sequential(net), peft.LoraConfig(r=2, target_modules=["q", "k"], lora_dropout=0.5))
    q, k = model.base_model.model[0].values()
    for part in ("lora_A", "lora_B"):
        nn.init.normal_(getattr(q, part)["default"].weight)
    k.load_state_dict(q.state_dict())
    accelerate(model)
    model.train()
    for _ in range(3):
        x = torch.randn(16, 64, requires_grad=True) * 1
        assert not torch.equal(q(x), k(x))
    model.eval()
    assert torch.equal(q(x), k(x))


def test_several_adapters_under_dropout_draw_a_mask_each(monkeypatch):
    model = peft_model(lora_dropout=0.3)
    model.add_adapter("second", config(r=3, lora_alpha=5, lora_dropout=0.3))
    model.base_model.set_adapter(["default", "second"])
    plain, fast = pair(stir(model).train())
    outcomes = []
    for m in (plain, fast):
        torch.manual_seed(4)
        with counted(monkeypatch) as ranks:
            outcomes.append(answer(m))
        assert not ranks
    assert torch.equal(outcomes[0], outcomes[1])
    assert reasons(fast) == {"each of its active adapters draws a dropout mask of its own"}
    plain.eval(), fast.eval()
    assert_same(plain, fast)
    assert not reasons(fast)


def test_a_few_tokens_in_inference_are_peft_s(monkeypatch):
    """One token at a time gains nothing by the fused products: generation is never slower than PEFT's."""
    plain, fast = pair(peft_model(target_modules=["q_proj"]).eval())
    with torch.no_grad(), counted(monkeypatch) as ranks:
        assert torch.equal(answer(fast), answer(plain)) and not ranks
        many = models.IDS.repeat(20, 1)
        torch.testing.assert_close(fast(many).logits, plain(many).logits, rtol=1e-4, atol=1e-5)
        assert len(ranks) == 2
        fast.train()
        answer(fast)  # the first pass of reentrant checkpointing must take the path of its second
        assert len(ranks) == 4
    with counted(monkeypatch) as ranks:
        answer(fast.eval())
    assert len(ranks) == 2  # a gradient will be wanted


def test_the_report_names_every_layer():
    report = accelerate(peft_model(target_modules=["q_proj", "embed_tokens"]))
    assert len(report.fused) == 2 and len(report.with_peft) == 1
    assert "Embedding" in str(report.with_peft[0].reason)
    text = str(report)
    assert all(layer.name in text for layer in report.layers) and "2 of 3" in text


def test_accelerate_is_idempotent_and_restore_is_exact():
    model = peft_model()
    before, outcome = classes(model), answer(model)
    first = accelerate(model)
    changed = classes(model)
    assert changed != before
    assert accelerate(model) == first and classes(model) == changed
    assert restore(model) == len(first.fused)
    assert classes(model) == before and restore(model) == 0
    assert torch.equal(answer(model), outcome)


def test_a_wrapper_that_kept_the_forward_survives_restore():
    plain, fast = pair(peft_model())
    kept = fast.base_model.model.model.layers[0].self_attn.q_proj.forward
    restore(fast)
    x = torch.randn(3, 32)
    assert torch.equal(kept(x), plain.base_model.model.model.layers[0].self_attn.q_proj(x))


def test_accelerated_models_are_copied_and_pickled():
    _, fast = pair(peft_model())
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert classes(again) == classes(fast)
        assert_same(fast, again)


def test_a_model_without_peft_s_layers_is_refused():
    with pytest.raises(TargetError, match="no LoRA layer of PEFT"):
        accelerate(base_model())
    ours = base_model()
    lowrank.inject(ours, lowrank.LoraConfig(r=2))
    with pytest.raises(TargetError, match=r"lowrank\.inject"):
        accelerate(ours)


VARIANTS = {
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "aLoRA": {"alora_invocation_tokens": [3]},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_fall_through_and_are_listed(name, monkeypatch):
    fields = VARIANTS[name]
    plain, fast = pair(peft_model(**fields, task_type="CAUSAL_LM"))
    assert len(accelerate(fast).with_peft) == 14
    assert any(name.lower() in reason.lower() for reason in reasons(fast))
    with counted(monkeypatch) as ranks:
        assert torch.equal(answer(fast), answer(plain))
    assert not ranks


def test_a_plain_adapter_beside_dora_is_fused_while_it_alone_is_active(monkeypatch):
    model = peft_model()
    model.add_adapter("dora", config(use_dora=True))
    plain, fast = pair(stir(model))
    for active, fused in (("default", 14), ("dora", 0), ("default", 14)):
        plain.set_adapter(active), fast.set_adapter(active)
        with counted(monkeypatch) as ranks:
            torch.testing.assert_close(answer(fast), answer(plain), rtol=1e-4, atol=1e-5)
        assert len(ranks) == fused


class _Images(nn.Module):
    """One of each layer that PEFT adapts and we leave to it, before a linear layer that we take."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(16, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.tokens(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def test_other_kinds_of_layer_stay_peft_s():
    made = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["tokens", "conv", "attention", "head"])
    plain, fast = pair(stir(peft.get_peft_model(_Images(), made)))
    report = accelerate(fast)
    assert [layer.name for layer in report.fused] == ["base_model.model.head"]
    assert len(report.with_peft) == 4  # MultiheadAttention has an out_proj of its own inside
    ids = torch.randint(16, (2, 7))
    torch.testing.assert_close(fast(ids), plain(ids))
    restore(fast)
    assert classes(fast) == classes(plain)


def _hook_base(layer: nn.Module) -> None:
    layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)


def _hook_a(layer: nn.Module) -> None:
    layer.lora_A["default"].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _replace_forward(layer: nn.Module) -> None:
    layer.base_layer.forward = lambda x: torch.zeros(*x.shape[:-1], layer.out_features) + x.sum()


def _replace_own_forward(layer: nn.Module) -> None:
    own = layer.forward
    layer.forward = lambda x: own(x) * 2


def _another_a(layer: nn.Module) -> None:
    class Negated(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return -super().forward(input)

    layer.lora_A["default"].__class__ = Negated


def _factor_of_a_class_of_its_own(layer: nn.Module) -> None:
    class Counted(nn.Parameter):
        pass

    layer.lora_A["default"].weight = Counted(layer.lora_A["default"].weight.data)


def _train_base(layer: nn.Module) -> None:
    layer.base_layer.weight.requires_grad_(True)


def _another_base(layer: nn.Module) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer.base_layer.__class__ = Doubled


def _no_casting(layer: nn.Module) -> None:
    layer.cast_input_dtype_enabled = False


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook_base, "base layer has hooks"),
        (_hook_a, "adapter 'default' has hooks"),
        (_replace_forward, "base layer has hooks"),
        (_replace_own_forward, "forward was replaced"),
        (_another_a, "made of Negated"),
        (_factor_of_a_class_of_its_own, "factors are of a class of their own"),
        (_train_base, "base weight is trained"),
        (_another_base, "base layer is a Doubled"),
        (_no_casting, "casting the input"),
    ],
)
def test_what_the_fused_function_cannot_see_falls_through(change, reason, monkeypatch):
    plain, fast = pair(peft_model(target_modules=["down_proj"]))
    for model in (plain, fast):
        change(model.base_model.model.model.layers[0].mlp.down_proj)
    (listed,) = reasons(fast)
    assert reason in listed
    assert reason not in str(accelerate(peft_model(target_modules=["down_proj"])))
    with counted(monkeypatch) as ranks:
        assert_same(plain, fast)
    assert len(ranks) == 2  # the answer's and the gradients' call of the other layer


def test_global_hooks_are_seen_by_every_module_they_are_seen_by_under_peft():
    from torch.nn.modules.module import register_module_forward_hook

    counts = []
    for model in pair(peft_model()):
        seen: list[str] = []
        handle = register_module_forward_hook(
            lambda module, args, output, seen=seen: seen.append(type(module).__name__)
        )
        answer(model)
        handle.remove()
        counts.append(len(seen))
    assert counts[0] == counts[1]


def test_float16_keeps_peft_s_wide_gradients(monkeypatch):
    plain, fast = pair(peft_model(dtype=torch.float16, target_modules=["q_proj"]))
    assert reasons(fast) == {"float16 gradients would underflow where PEFT's do not"}
    with counted(monkeypatch) as ranks, torch.no_grad():
        answer(fast)
    assert not ranks
    want, got = gradients(plain), gradients(fast)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_adapters_of_another_dtype_than_the_base():
    plain, fast = pair(peft_model())
    for model in (plain, fast):
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.data = tensor.data.to(torch.bfloat16).to(torch.float64)
    assert answer(fast).dtype is answer(plain).dtype is torch.float32
    assert all(g.dtype is torch.float64 for g in gradients(fast).values())
    assert_same(plain, fast)
