"""Gradient checkpointing over a frozen base: gradients are there, and are those without it."""

import warnings
from contextlib import nullcontext

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import lowrank
from lowrank import LoraConfig
from lowrank.functional import lora_linear
from lowrank.kernels import pieces
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
        largest = float(wanted[parameter].abs().max())
        assert torch.allclose(gradient, wanted[parameter], rtol=1e-4, atol=1e-5 * largest), parameter


@pytest.mark.parametrize("use_peft", [False, True], ids=["injected", "accelerated"])
def test_a_recomputed_block_leaves_out_the_product_nobody_asks_for(
    monkeypatch: pytest.MonkeyPatch, use_peft: bool
) -> None:
    """The frozen model's recomputed block stops where the last tensor is kept, before down_proj's product; so do we."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = MODELS["llama"]()
    if use_peft:
        lowrank.peft.accelerate(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets)))
    else:
        lowrank.inject(model, LoraConfig(r=2, target_modules=targets))
    checkpoint(model.train(), reentrant=False)
    calls: list[int] = []
    base = pieces.base
    monkeypatch.setattr(pieces, "base", lambda *args: (calls.append(1), base(*args))[1])
    answer(model).square().sum().backward()
    layers = model.config.num_hidden_layers
    assert len(calls) == 7 * layers + 6 * layers


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_computed_is_the_same_under_saved_tensor_hooks(dropout: float) -> None:
    """Bit for bit, the answer and every gradient; and the answer is no view, so that the next layer may write to it."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 50, 8), torch.randn(6, 8), torch.randn(6)
    a, b = torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    found = []
    for watched in (False, True):
        seen = x.clone().requires_grad_()
        torch.manual_seed(1)
        with saved_tensors_hooks(lambda t: t, lambda t: t) if watched else nullcontext():
            h = lora_linear(seen, weight, bias, a, b, 1.7, dropout)
        assert not h._is_view()
        h.mul_(2)
        found.append([h.detach(), *torch.autograd.grad(h.square().sum(), (seen, a, b))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


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
