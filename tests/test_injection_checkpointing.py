"""Gradient checkpointing over a frozen base: gradients are there, and are those without it."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LoraConfig
from models import MODELS, answer
from snapshots import assert_same, snapshot

TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "bert": ["query", "value"],
    "t5": ["q", "v"],
    "vit": ["q_proj", "v_proj"],
    "mixtral": ["q_proj", "v_proj"],
}


def adapted(name: str) -> nn.Module:
    model = MODELS[name]()
    config = LoraConfig(r=2, lora_alpha=5, target_modules=TARGETS[name], init_lora_weights="random")
    lowrank.inject(model, config)
    return model.train()


def checkpoint(model: nn.Module, reentrant: bool) -> None:
    """Switch it on, without the hook that recent releases of transformers bring themselves."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.disable_input_require_grads()


def factor_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    torch.manual_seed(1)
    answer(model).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_checkpointed_gradients_are_there_and_equal(name: str, reentrant: bool) -> None:
    model = adapted(name)
    for module in model.modules():  # so that a recomputed forward is the same one
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if hasattr(model.config, "attention_probs_dropout_prob"):
        for module in model.modules():
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
    wanted = factor_gradients(model)
    assert all(gradient is not None for gradient in wanted.values())
    checkpoint(model, reentrant)
    for parameter, gradient in factor_gradients(model).items():
        assert gradient is not None, parameter
        assert torch.allclose(gradient, wanted[parameter], rtol=1e-4, atol=1e-6), parameter


def test_checkpointing_enabled_before_injection() -> None:
    model = MODELS["llama"]()
    checkpoint(model, reentrant=True)
    lowrank.inject(model, LoraConfig(r=2))
    assert all(gradient is not None for gradient in factor_gradients(model.train()).values())


def test_without_checkpointing_the_embeddings_stay_out_of_the_graph() -> None:
    """The hook costs the lowest layer an input gradient, so it acts only while the model checkpoints."""
    model = adapted("llama")
    seen: list[bool] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    answer(model)
    checkpoint(model, reentrant=True)
    answer(model)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        answer(model)
    assert seen == [False, True, False]


def test_unload_takes_the_hooks_away_and_a_second_adapter_adds_none() -> None:
    model = MODELS["t5"]()
    before = snapshot(model)
    lowrank.inject(model, LoraConfig(r=2), "one")
    hooks = snapshot(model).hooks
    lowrank.inject(model, LoraConfig(r=2), "two")
    assert {p: n for p, n in snapshot(model).hooks.items() if "lora_" not in p} == {
        p: n for p, n in hooks.items() if "lora_" not in p
    }
    lowrank.unload(model)
    assert_same(model, before)
