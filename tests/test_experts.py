"""Stacked experts: adapted ≡ merged ≡ the formula, in every family and by every implementation, and nothing formed."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import lowrank
from expert_models import EVERY_STACK, FAMILIES, IDS, IMPLEMENTATIONS, adapted, answer, dense_answer, formed, mixture
from lowrank import LoraConfig
from lowrank.injection.adapters import lora_layers
from lowrank.layers.stack import LoraStack
from lowrank.layers.stack_as_read import StackAsRead

CASES = [(family, way) for family in FAMILIES for way in IMPLEMENTATIONS if family != "llama4_text"]
CASES.append(("llama4_text", "its own"))


@pytest.fixture
def nothing_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """W0 + ΔW of a stack, or of an expert, is formed by nobody."""

    def refuse(*_: object) -> None:
        raise AssertionError("W0 + ΔW was formed")

    monkeypatch.setattr(LoraStack, "adapted_weight", refuse)
    monkeypatch.setattr(LoraStack, "adapted_expert", refuse)


@pytest.mark.parametrize(("family", "way"), CASES)
@pytest.mark.usefixtures("nothing_formed")
def test_adapted_is_the_formula_is_merged_and_so_are_the_gradients(family: str, way: str) -> None:
    model = adapted(mixture(family, way))
    factors = [p for _, layer in lora_layers(model) for p in layer.factors("default").trainable()]
    got, wanted = answer(model), dense_answer(model, formed(model))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    with lowrank.disabled(model):
        assert (answer(model) - got).abs().max() > 0.01
    direction = torch.randn_like(got)
    gradients = torch.autograd.grad((got * direction).sum(), factors)
    for one, other in zip(gradients, torch.autograd.grad((wanted * direction).sum(), factors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-6)
        assert other.abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(answer(model), got, rtol=1e-4, atol=1e-5)
    with lowrank.merged(model):
        torch.testing.assert_close(answer(model), got, rtol=1e-4, atol=1e-5)
    lowrank.merge_and_unload(model)
    torch.testing.assert_close(answer(model), got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "way"), CASES)
def test_the_base_is_back_bit_for_bit(family: str, way: str) -> None:
    model = mixture(family, way).requires_grad_(False)  # Jamba's own bits hang on that
    before, plain = answer(model), {name: type(module) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lowrank.inject(model, LoraConfig(**EVERY_STACK))
    assert torch.equal(answer(model), before)
    lowrank.delete_adapter(model, "default")
    adapted(model)
    with lowrank.disabled(model):
        assert torch.equal(answer(model), before)
    with lowrank.merged(model):
        pass
    lowrank.unload(model)
    assert torch.equal(answer(model), before)
    assert {name: type(module) for name, module in model.named_modules()} == plain
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert list(model.state_dict()) == list(state)


def test_an_expert_without_tokens_has_zero_gradients_and_the_others_have_not() -> None:
    model = adapted(mixture("mixtral", num_local_experts=16))
    answer(model)[:, :1].square().sum().backward()
    for _, stack in lora_layers(model):
        factors = stack.factors("default")
        still = [not g.any() for g in factors.a.grad]
        assert any(still) and not all(still)
        assert still == [not g.any() for g in factors.b.grad]


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
@pytest.mark.usefixtures("nothing_formed")
def test_two_adapters_add_up_and_each_is_itself_alone(way: str) -> None:
    model = adapted(adapted(mixture("qwen3_moe", way)), "v2.1", 2, r=2, use_rslora=True, lora_dropout=0.5)
    alone = answer(model)
    torch.testing.assert_close(alone, dense_answer(model, formed(model, ("v2.1",))), rtol=1e-4, atol=1e-5)
    lowrank.set_active(model, ["default", "v2.1"], trainable=["default", "v2.1"])
    wanted = dense_answer(model, formed(model, ("default", "v2.1")))
    torch.testing.assert_close(answer(model), wanted, rtol=1e-4, atol=1e-5)
    factors = [p for _, s in lora_layers(model) for name in s.adapter_names for p in s.factors(name).trainable()]
    got = torch.autograd.grad(answer(model).square().sum(), factors)
    for one, other in zip(got, torch.autograd.grad(wanted.square().sum(), factors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    lowrank.merge_and_unload(model, ["default"])
    torch.testing.assert_close(answer(model), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
@pytest.mark.usefixtures("nothing_formed")
def test_dropout_drops_in_training_alone_and_leaves_the_mean(way: str) -> None:
    model = adapted(mixture("mixtral", way, num_hidden_layers=1), target_parameters=["down_proj"], lora_dropout=0.5)
    experts = model.model.layers[0].mlp.experts
    routed = torch.randn(5, 32), torch.tensor([[0, 1], [2, 1], [0, 2], [1, 0], [2, 0]]), torch.rand(5, 2)
    with torch.no_grad():
        still = experts(*routed)
        assert torch.equal(experts(*routed), still)
        model.train()
        drawn = torch.stack([experts(*routed) for _ in range(400)])
    assert drawn.std(0).min() > 0
    assert (drawn.mean(0) - still).norm() < 0.2 * still.norm() < drawn.std(0).norm()
    answer(model).square().sum().backward()
    assert all(f.grad.any() for _, s in lora_layers(model) for f in s.factors("default").trainable())


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
def test_checkpointing_gives_the_same_gradients(way: str) -> None:
    model = adapted(mixture("olmoe", way)).train()
    factors = [p for _, s in lora_layers(model) for p in s.factors("default").trainable()]
    wanted = torch.autograd.grad(answer(model).square().sum(), factors)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        answer(model).square().sum().backward()
        for factor, other in zip(factors, wanted, strict=True):
            torch.testing.assert_close(factor.grad, other, rtol=1e-5, atol=1e-6)
            factor.grad = None


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
@pytest.mark.usefixtures("nothing_formed")
def test_autocast_and_a_half_precision_base_are_near_the_same(way: str) -> None:
    model = adapted(mixture("mixtral", way), r=2, lora_alpha=1)
    wanted = answer(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = answer(model)
        got.float().square().sum().backward()
    assert all(f.grad.dtype is torch.float32 for _, s in lora_layers(model) for f in s.factors("default").trainable())
    assert (got.float() - wanted).norm() < 0.05 * wanted.norm()
    half = adapted(mixture("mixtral", way).bfloat16(), r=2, lora_alpha=1)
    assert all(f.dtype is torch.float32 for _, s in lora_layers(half) for f in s.factors("default").trainable())
    assert (answer(half).float() - wanted).norm() < 0.1 * wanted.norm()
    answer(half).float().square().sum().backward()
    before = answer(half)
    lowrank.merge_and_unload(half)
    assert (answer(half).float() - before.float()).norm() < 0.05 * before.float().norm()


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
def test_nothing_that_stood_for_a_stack_outlives_the_step(way: str) -> None:
    model = adapted(mixture("mixtral", way))
    gc.collect()
    gc.disable()
    try:
        answer(model).sum().backward()
        assert not [thing for thing in gc.get_objects() if type(thing) is StackAsRead]
    finally:
        gc.enable()


def test_copies_and_pickles_are_whole_and_their_own() -> None:
    model = adapted(mixture("gpt_oss"))
    wanted = answer(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(answer(other), wanted)
        lowrank.merge_and_unload(other)
        assert torch.equal(answer(model), wanted)
    with lowrank.merged(model):
        other = copy.deepcopy(model)
    assert torch.equal(answer(other), wanted)
    lowrank.unload(other)
    with lowrank.disabled(model):
        assert torch.equal(answer(other), answer(model))


def test_torch_func_and_a_forward_that_only_reads_get_the_formed_weight() -> None:
    model = adapted(mixture("mixtral"))
    wanted = answer(model)
    torch.testing.assert_close(torch.func.functional_call(model, {}, kwargs={"input_ids": IDS}).logits, wanted)
    experts = model.model.layers[0].mlp.experts

    class Reader(nn.Module):
        def forward(self) -> torch.Tensor:
            return experts.down_proj.sum(0)

    weight = formed(model)["model.layers.0.mlp.experts.down_proj"]
    torch.testing.assert_close(Reader()(), weight.sum(0))
    assert experts.down_proj is experts._parameters["down_proj"]


def test_the_plan_counts_experts_and_leaves_them_out_where_asked() -> None:
    model = mixture("mixtral")
    chosen = {"r": 4, "expert_rank": 2, "rank_pattern": {"0.*up_proj": 3}}
    plan = lowrank.inject(model, LoraConfig(target_modules="all-linear", **chosen))
    ranks = {entry.path: entry.rank for entry in plan.entries}
    assert ranks["model.layers.0.mlp.experts.gate_up_proj"] == 3
    assert ranks["model.layers.1.mlp.experts.gate_up_proj"] == ranks["model.layers.1.mlp.experts.down_proj"] == 2
    assert ranks["model.layers.1.self_attn.q_proj"] == 4
    assert plan.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "experts: 4 stacks of 4 experts" in str(plan) and "expert stack" not in plan.left_out
    for options in ({"exclude_modules": ["experts"]}, {"exclude_modules": r".*experts.*"}, {"target_parameters": ()}):
        with pytest.warns(lowrank.errors.LowrankWarning, match="leaves out 4 expert stacks"):
            plan = lowrank.inject(mixture("mixtral"), LoraConfig(target_modules="all-linear", **options))
        assert not plan.stacks and "4 expert stacks" in plan.left_out
    with pytest.warns(lowrank.errors.LowrankWarning, match="leaves out 2 expert stacks"):
        plan = lowrank.inject(
            mixture("mixtral"), LoraConfig(target_modules="all-linear", target_parameters=["down_proj"])
        )
    assert [entry.path for entry in plan.stacks] == [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]
    plan = lowrank.inject(model := mixture("mixtral"), LoraConfig(target_modules="all-linear", use_dora=True))
    assert len(plan.stacks) == 4
    assert plan.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


WRONG = {
    "a name that is no parameter": ({"target_parameters": ["experts.gate_proj"]}, "nearest: experts.gate_up_proj"),
    "a regex that is none": ({"target_parameters": "down_proj"}, "regular expression for a whole path"),
    "a vector": ({"target_parameters": ["input_layernorm.weight"]}, "MixtralRMSNorm"),
    "a router": ({"target_parameters": ["gate.weight"]}, "MixtralTopKRouter"),
    "a module for a parameter": ({"target_modules": ["mlp.experts"]}, r"target_parameters \(gate_up_proj, down_proj\)"),
    "a parameter for a module": ({"target_modules": ["down_proj"]}, "name it in target_parameters"),
    "a rank above every side": ({"target_parameters": ["down_proj"], "r": 99}, "r is above min"),
    "no rank": ({"target_parameters": ["down_proj"], "expert_rank": 0}, "expert_rank must be a whole number"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_meant_is_said_and_changes_nothing(what: str) -> None:
    options, message = WRONG[what]
    model = mixture("mixtral")
    before = answer(model)
    with pytest.raises(lowrank.LowrankError, match=message):
        lowrank.inject(model, LoraConfig(**{"target_modules": (), "r": 2} | options))
    assert torch.equal(answer(model), before) and not any("lora" in name for name, _ in model.named_modules())


def test_a_parameter_called_weight_means_its_layer() -> None:
    model = mixture("mixtral")
    plan = lowrank.inject(model, LoraConfig(target_modules=(), target_parameters=["q_proj.weight"], r=2))
    assert [entry.path for entry in plan.entries] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_a_compiled_model_answers_the_same(way: str) -> None:
    model = adapted(mixture("mixtral", way))
    wanted = answer(model)
    with torch.no_grad():
        torch.testing.assert_close(answer(torch.compile(model, backend="eager")), wanted, rtol=1e-4, atol=1e-5)
