"""Several adapters in one model: which answer, which train, what they own in full, and how they leave."""

import pytest
import torch
from torch import Tensor, nn

import lowrank
from layer_cases import move
from lowrank import LoraConfig
from lowrank.errors import ConfigError, LowrankError
from lowrank.injection.adapters import lora_layers, override_modules
from models import MODELS, answer
from snapshots import assert_same, same_bits, snapshot

TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "wte"],
    "bert": ["query", "value"],
    "t5": ["q", "v"],
    "vit": ["q_proj", "v_proj", "projection"],
    "mixtral": ["q_proj", "v_proj"],
    "convnet": ["stem", "depthwise", "head"],
}
HEADS = {"bert": ["classifier"], "vit": ["classifier"], "llama": ["lm_head"]}


def adapted(name: str, *adapters: str, **options: object) -> nn.Module:
    """The small model with adapters whose ΔW ≠ 0; the last one is active."""
    model = MODELS[name]()
    for i, adapter in enumerate(adapters):
        settings = {"target_modules": TARGETS[name], "init_lora_weights": "random", **options}
        lowrank.inject(model, LoraConfig(r=2 + i, lora_alpha=5 + i, **settings), adapter)
    return model


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.filterwarnings("ignore::lowrank.errors.LowrankWarning")
@pytest.mark.parametrize("name", MODELS)
def test_unload_undoes_inject_in_whole_models(name: str) -> None:
    model = MODELS[name]()
    before, base = snapshot(model), answer(model)
    options = {"modules_to_save": HEADS.get(name, ()), "bias": "all", "init_lora_weights": "random"}
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, target_modules=TARGETS[name], **options))
    move([layer.factors("default") for _, layer in lora_layers(model)])
    assert not torch.equal(answer(model), base)
    with lowrank.disabled(model):
        assert same_bits(answer(model), base)
    lowrank.unload(model)
    assert_same(model, before)
    assert same_bits(answer(model), base)


@pytest.mark.filterwarnings("ignore::lowrank.errors.LowrankWarning")
@pytest.mark.parametrize("name", MODELS)
def test_only_the_factors_train(name: str) -> None:
    model = adapted(name, "first")
    answer(model).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained(model)
    assert trained(model) == {f"{path}.lora_first.{factor}" for path, _ in lora_layers(model) for factor in ("a", "b")}


def test_changes_of_active_adapters_add() -> None:
    model = adapted("llama", "one", "two")
    with torch.no_grad():
        for _, layer in lora_layers(model):  # a single layer is linear in its adapters; freeze all but the last one
            for factors in layer.active_factors:
                factors.b *= 0
    layer = next(layer for path, layer in lora_layers(model) if path.endswith("1.self_attn.v_proj"))
    with torch.no_grad():
        for name in ("one", "two"):
            layer.factors(name).b.normal_()
    x = torch.randn(3, 16)
    answers: dict[tuple[str, ...], Tensor] = {}
    for names in ((), ("one",), ("two",), ("one", "two"), ("two", "one")):
        lowrank.set_active(model, names)
        assert lowrank.active_adapters(model) == names
        answers[names] = layer(x).detach()
    both = answers["one",] + answers["two",] - answers[()]
    assert torch.allclose(answers["one", "two"], both, atol=1e-6)
    assert torch.allclose(answers["two", "one"], both, atol=1e-6)
    assert not torch.allclose(answers["one",], answers["two",])


def test_the_newest_adapter_answers_and_trains_alone() -> None:
    model = adapted("llama", "one", "two")
    assert lowrank.active_adapters(model) == ("two",)
    assert trained(model) == {f"{path}.lora_two.{f}" for path, _ in lora_layers(model) for f in ("a", "b")}
    lowrank.set_active(model, ["one", "two"], trainable=["one"])
    assert trained(model) == {f"{path}.lora_one.{f}" for path, _ in lora_layers(model) for f in ("a", "b")}
    lowrank.set_active(model, ["two"])
    assert trained(model) == set()


def test_adapters_may_have_different_targets() -> None:
    model = MODELS["llama"]()
    base = answer(model)
    random = {"init_lora_weights": "random", "lora_alpha": 5}
    lowrank.inject(model, LoraConfig(r=2, target_modules=["q_proj"], **random), "queries")
    queries = answer(model)
    lowrank.inject(model, LoraConfig(r=3, target_modules=["down_proj"], **random), "mlp")
    lowrank.set_active(model, ["queries"])
    assert same_bits(answer(model), queries)
    lowrank.set_active(model, [])
    assert same_bits(answer(model), base)
    lowrank.delete_adapter(model, "mlp")
    lowrank.set_active(model, ["queries"])
    assert same_bits(answer(model), queries)
    assert {path.rpartition(".")[2] for path, _ in lora_layers(model)} == {"q_proj"}


def test_deleting_one_leaves_the_others_and_deleting_the_last_the_base() -> None:
    model = MODELS["bert"]()
    before, base = snapshot(model), answer(model)
    model = adapted("bert", "one")
    one = answer(model)
    lowrank.inject(
        model,
        LoraConfig(r=2, lora_alpha=5, target_modules=["query"], modules_to_save=["classifier"], bias="lora_only"),
        "two",
    )
    lowrank.delete_adapter(model, "two")
    assert lowrank.active_adapters(model) == ()
    lowrank.set_active(model, ["one"])
    assert same_bits(answer(model), one)
    lowrank.delete_adapter(model, "one")
    after = snapshot(model)
    assert list(after.state) == list(before.state)
    assert after.attributes == before.attributes
    assert same_bits(answer(model), base)
    with pytest.raises(LowrankError, match="has no adapter"):
        lowrank.delete_adapter(model, "one")


@pytest.mark.parametrize(
    ("bias", "wanted"),
    [
        ("none", set()),
        ("lora_only", {"query.bias", "value.bias"}),
        ("all", {"query.bias", "value.bias", "key.bias", "dense.bias", "LayerNorm.bias", "classifier.bias"}),
    ],
)
def test_biases_are_trained_as_asked_and_given_back(bias: str, wanted: set[str]) -> None:
    model = MODELS["bert"]()
    before, base = snapshot(model), answer(model)
    plan = lowrank.inject(model, LoraConfig(r=2, target_modules=["query", "value"], bias=bias))
    assert {n.split(".")[-2] + "." + n.split(".")[-1] for n in trained(model) if "lora_" not in n} == wanted
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.trainable_parameters
    assert same_bits(answer(model), base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5
    moved = answer(model)
    assert not torch.equal(moved, base)
    with lowrank.disabled(model):
        assert same_bits(answer(model), base)
    assert same_bits(answer(model), moved)
    lowrank.unload(model)
    assert_same(model, before)


def test_saved_modules_belong_to_their_adapter() -> None:
    model = MODELS["bert"]()
    before = snapshot(model)
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    lowrank.inject(model, config, "one")
    lowrank.inject(model, config, "two")
    assert [path for path, _ in override_modules(model, "one")] == ["classifier"]
    original = before.state["classifier.weight"]
    with torch.no_grad():
        model.classifier.weight += 1
    lowrank.set_active(model, ["one"], trainable=["one"])
    assert same_bits(model.classifier.weight.detach(), original)
    assert {"classifier.weight", "classifier.bias"} <= trained(model)
    answer(model).sum().backward()
    assert model.classifier.weight.grad is not None
    lowrank.set_active(model, ["two"])
    assert same_bits(model.classifier.weight.detach(), original + 1)
    with pytest.raises(LowrankError, match="one and two each bring a full copy of classifier, and only one"):
        lowrank.set_active(model, ["one", "two"])
    assert lowrank.active_adapters(model) == ("two",)
    lowrank.unload(model)
    assert_same(model, before)


def test_merging_keeps_the_saved_modules_and_biases_for_good() -> None:
    model = MODELS["bert"]()
    before = snapshot(model)
    options = {"modules_to_save": ["classifier"], "bias": "lora_only", "init_lora_weights": "random"}
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, target_modules=["query", "value"], **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    moved = answer(model)
    with lowrank.merged(model):
        assert torch.allclose(answer(model), moved, atol=1e-5)
    assert same_bits(answer(model), moved)
    lowrank.merge_and_unload(model)
    assert torch.allclose(answer(model), moved, atol=1e-5)
    after = snapshot(model)
    assert list(after.state) == list(before.state)
    for aspect in ("classes", "grads", "attributes", "hooks"):
        assert getattr(after, aspect) == getattr(before, aspect)
    changed = {name for name in after.state if not same_bits(after.state[name], before.state[name])}
    assert {".".join(name.split(".")[-2:]) for name in changed} == {
        "classifier.weight",
        "classifier.bias",
        "query.weight",
        "query.bias",
        "value.weight",
        "value.bias",
    }


def test_injecting_twice_under_one_name_is_an_error_and_changes_nothing() -> None:
    model = adapted("llama", "one")
    before = snapshot(model)
    with pytest.raises(ConfigError, match="already has an adapter 'one': choose another adapter_name"):
        lowrank.inject(model, LoraConfig(r=2, target_modules=["o_proj"]), "one")
    assert_same(model, before)


@pytest.mark.parametrize("name", ["", "a b", "../up", "a/b", "x" * 65, "café"])
def test_adapter_names_that_could_not_be_a_folder_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="adapter_name="):
        lowrank.inject(MODELS["llama"](), LoraConfig(r=2), name)


def test_wrong_calls_of_set_active_change_nothing() -> None:
    model = adapted("llama", "one", "two")
    before = snapshot(model)
    for names, trainable, message in (
        (["three"], [], "no adapter 'three' in this model: it has 'one', 'two'"),
        (["one", "one"], [], "named twice"),
        (["one"], ["two"], "two cannot be trained without being active"),
    ):
        with pytest.raises(LowrankError, match=message):
            lowrank.set_active(model, names, trainable)
    assert_same(model, before)
    with pytest.raises(LowrankError, match="has no adapter"):
        lowrank.set_active(MODELS["llama"](), [])


def test_new_factors_follow_train_and_eval_of_their_layer() -> None:
    model = MODELS["llama"]().train()
    lowrank.inject(model, LoraConfig(r=2))
    assert all(module.training for module in model.modules())


def test_moving_the_model_moves_the_factors() -> None:
    model = adapted("bert", "one", modules_to_save=["classifier"]).to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_the_model_keeps_its_class_and_can_generate() -> None:
    from transformers import LlamaForCausalLM

    model = adapted("llama", "one")
    assert type(model) is LlamaForCausalLM
    ids = torch.tensor([[5, 9, 3]])
    adapted_ids = model.generate(ids, max_new_tokens=4, do_sample=False)
    lowrank.merge_and_unload(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), adapted_ids)


def test_hooks_see_the_adapted_answer() -> None:
    model = adapted("llama", "one")
    seen: list[Tensor] = []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    answer(model)
    x = torch.randn(2, 16)
    assert torch.equal(layer(x), seen[-1])
    assert not torch.equal(seen[-1], nn.functional.linear(x, layer.weight))
