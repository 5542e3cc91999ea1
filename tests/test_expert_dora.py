"""DoRA on stacked experts: adapted ≡ merged ≡ the formula, in every family and by every implementation."""

from pathlib import Path

import pytest
import torch

import lowrank
from expert_models import EVERY_STACK, IMPLEMENTATIONS, answer, dense_answer, formed, mixture
from expert_models import adapted_by_dora as adapted
from lowrank import LoraConfig
from lowrank.injection.adapters import lora_layers
from lowrank.layers.expert_gains import ExpertGains
from lowrank.study.estimate.estimate import estimate
from lowrank.study.estimate.settings import EstimateSettings
from test_experts import CASES, nothing_formed  # noqa: F401  a fixture


@pytest.mark.parametrize(("family", "way"), CASES)
@pytest.mark.usefixtures("nothing_formed")
def test_adapted_is_the_formula_is_merged_and_so_are_the_gradients(family: str, way: str) -> None:
    model = adapted(mixture(family, way))
    factors = [p for _, layer in lora_layers(model) for p in layer.factors("default").trainable()]
    got, wanted = answer(model), dense_answer(model, formed(model))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(got)
    gradients = torch.autograd.grad((got * direction).sum(), factors)
    for one, other in zip(gradients, torch.autograd.grad((wanted * direction).sum(), factors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-6)
        assert other.abs().max() > 0
    with lowrank.merged(model):
        torch.testing.assert_close(answer(model), got, rtol=1e-4, atol=1e-5)
    lowrank.merge_and_unload(model)
    torch.testing.assert_close(answer(model), got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "way"), CASES)
@pytest.mark.usefixtures("nothing_formed")
def test_it_starts_at_the_base_and_unload_is_back_there(family: str, way: str) -> None:
    model = mixture(family, way).requires_grad_(False)  # Jamba's own bits hang on that
    before = answer(model)
    lowrank.inject(model, LoraConfig(**EVERY_STACK, use_dora=True, init_lora_weights="pissa"))
    torch.testing.assert_close(answer(model), before, rtol=1e-4, atol=1e-5)
    lowrank.delete_adapter(model, "default")
    lowrank.inject(model, LoraConfig(**EVERY_STACK, use_dora=True))
    assert torch.equal(answer(model), before)
    lowrank.unload(adapted(model, "two"))
    assert torch.equal(answer(model), before)


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
@pytest.mark.usefixtures("nothing_formed")
def test_it_adds_up_with_other_adapters_in_any_order_and_drops(way: str) -> None:
    model = mixture("gpt_oss", way)
    names = ("dora", "plain", "dora2")
    adapted(model, "dora", 1)
    adapted(model, "plain", 2, use_dora=False, r=2)
    adapted(model, "dora2", 3, r=1)
    for active in (names, names[::-1], names[1:], names[::2]):
        lowrank.set_active(model, active, trainable=active)
        wanted = dense_answer(model, formed(model, active))
        torch.testing.assert_close(answer(model), wanted, rtol=1e-4, atol=1e-5)
        factors = [p for _, s in lora_layers(model) for name in active for p in s.factors(name).trainable()]
        got = torch.autograd.grad(answer(model).square().sum(), factors)
        for one, other in zip(got, torch.autograd.grad(wanted.square().sum(), factors), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
def test_norms_are_computed_of_the_experts_that_have_tokens(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(mixture("mixtral", way, num_local_experts=16))
    asked: list[int] = []
    norms = ExpertGains._norms

    def noted(self: ExpertGains, expert: int) -> torch.Tensor:
        asked.append(expert)
        return norms(self, expert)

    monkeypatch.setattr(ExpertGains, "_norms", noted)
    answer(model)[:, :1].square().sum().backward()
    stacks = [stack for _, stack in lora_layers(model)]
    assert len(stacks) <= len(asked) < 16 * len(stacks)
    asked.clear()
    (stack := stacks[0]).experts(torch.randn(2, 32), torch.tensor([[3, 9], [9, 3]]), torch.rand(2, 2))
    assert sorted(asked) == [3, 3, 9, 9]
    magnitude = stack.factors("default").magnitude
    assert [not g.any() for g in magnitude.grad] == [not g.any() for g in stack.factors("default").b.grad]


@pytest.mark.parametrize("way", IMPLEMENTATIONS)
def test_autocast_checkpointing_and_a_half_precision_base(way: str) -> None:
    model = adapted(mixture("olmoe", way), r=2, lora_alpha=1).train()
    factors = [p for _, s in lora_layers(model) for p in s.factors("default").trainable()]
    wanted = answer(model)
    gradients = torch.autograd.grad(wanted.square().sum(), factors)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        answer(model).square().sum().backward()
        for factor, other in zip(factors, gradients, strict=True):
            torch.testing.assert_close(factor.grad, other, rtol=1e-5, atol=1e-6)
            factor.grad = None
    model.gradient_checkpointing_disable()
    with torch.autocast("cpu", torch.bfloat16):
        assert (answer(model).float() - wanted).norm() < 0.05 * wanted.norm()
    half = adapted(mixture("olmoe", way).bfloat16(), r=2, lora_alpha=1)
    before = answer(half).float()
    assert (before - wanted).norm() < 0.1 * wanted.norm()
    lowrank.merge_and_unload(half)
    assert (answer(half).float() - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"target_parameters": "experts.gate_up_proj[gate,up]"}])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_over_stacks_in_four_bits_it_answers_as_over_their_numbers(family: str, options: dict[str, object]) -> None:
    pytest.importorskip("bitsandbytes")
    from test_quantised_experts import held, numbers_of

    model = held(family)
    dense = adapted(numbers_of(model), **{"use_dora": False} | options)
    adapted(model, **{"use_dora": False} | options)
    both = [[p for _, layer in lora_layers(m) for p in layer.factors("default").trainable()] for m in (model, dense)]
    got, wanted = answer(model), answer(dense)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    found, right = (torch.autograd.grad(a.square().sum(), f) for a, f in zip((got, wanted), both, strict=True))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    lowrank.merge_and_unload(model)
    torch.testing.assert_close(answer(model), got, rtol=1e-4, atol=1e-5)


def test_estimate_rehearses_it(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    (model := mixture("mixtral")).save_pretrained(tmp_path)
    asked = {"model": str(tmp_path), "max_length": 16, "targets": "all-linear", "rank": 2, "quantise": "nf4"}
    found = estimate(EstimateSettings(**asked, dora=True))
    plan = lowrank.plan(model, LoraConfig(r=2, target_modules="all-linear", use_dora=True))
    assert found.trained == plan.trainable_parameters > estimate(EstimateSettings(**asked)).trained
