"""Which path computes which layer is said, and said truly."""

import gc
import json
import weakref
from functools import partial

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoraConfig, inject
from lowrank.cli import main
from lowrank.injection.paths import execution_paths, shared_inputs
from lowrank.kernels import together
from lowrank.kernels.shared_input import SharedInput


class Shifted(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


def block(linear=nn.Linear):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (linear(6, 6) for _ in range(4))

        def forward(self, x):
            return self.o(self.q(x) * self.k(x) + self.v(x))

    torch.manual_seed(0)
    return Block()


def calls(monkeypatch, run):
    """How often the fused function is called while `run()`."""
    counted = []
    original = together.projection
    monkeypatch.setattr("lowrank.layers.linear.projection", lambda *a: (counted.append(1), original(*a))[1])
    run()
    return len(counted)


@pytest.mark.parametrize(
    ("config", "linear", "reason"),
    [
        ({}, nn.Linear, None),
        ({}, Shifted, "a forward of its own"),
        ({"use_dora": True}, Shifted, "a forward of its own"),
        ({"use_dora": True}, nn.Linear, None),
        ({"use_dora": True}, partial(nn.Linear, bias=False), None),
        ({"use_dora": True, "init_lora_weights": "pissa"}, nn.Linear, None),
        ({"init_lora_weights": "pissa"}, nn.Linear, None),
    ],
)
def test_what_is_said_is_what_happens(monkeypatch, config, linear, reason):
    model = block(linear)
    plan = lowrank.inject(model, LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", **config))
    paths = execution_paths(model)
    assert len(paths) == 4
    assert all(p.reason is None if reason is None else reason in p.reason for p in paths)
    assert bool(plan.plain_paths) == bool(reason) and (not reason or reason in str(plan))
    assert calls(monkeypatch, lambda: model(torch.randn(2, 6))) == (0 if reason else 4)


def test_dora_beside_another_adapter_is_computed_one_by_one():
    model = block()
    lowrank.inject(model, LoraConfig(r=2, target_modules=["q"], use_dora=True), "a")
    lowrank.inject(model, LoraConfig(r=2, target_modules=["q"]), "b")
    lowrank.set_active(model, ("a", "b"))
    assert "not another adapter's change" in execution_paths(model)[0].reason
    lowrank.set_active(model, ("a",))
    assert execution_paths(model)[0].reason is None


def test_adapters_that_differ_in_dropout_are_computed_one_by_one():
    model = block()
    for name, dropout in (("a", 0.0), ("b", 0.5)):
        lowrank.inject(model, LoraConfig(r=2, target_modules=["q"], lora_dropout=dropout), name)
    lowrank.set_active(model, ("a", "b"))
    assert "differ in dropout" in execution_paths(model)[0].reason


def test_shared_inputs_are_found_by_watching_the_calls():
    model = block()
    lowrank.inject(model, LoraConfig(r=2, target_modules="all-linear"))
    assert shared_inputs(model, lambda: model(torch.randn(2, 6))) == [("q", "k", "v")]
    assert not any(m._forward_pre_hooks for m in model.children())  # the model itself has a hook of injection's


def test_unloading_leaves_no_attribute_behind():
    model = block()
    before = [set(m.__dict__) for m in model.modules()]
    lowrank.inject(model, LoraConfig(r=2, target_modules="all-linear"))
    lowrank.unload(model)
    assert [set(m.__dict__) for m in model.modules()] == before


def test_doctor_describes_a_model_from_its_config_alone(tmp_path, capsys):
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    assert main(["doctor", "--model", str(tmp_path), "--targets", "all-linear", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"modules": ["q_proj", "k_proj", "v_proj"], "times": 2} in told["model"]["sharing"]
    assert sum(layer["count"] for layer in told["model"]["layers"]) == 14
    assert told["machine"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # a wheel may not tell its build
    assert main(["doctor", "--model", str(tmp_path), "--targets", "q_porj"]) == 2
    assert "nearest: q_proj" in capsys.readouterr().err


class Saved:
    """A tensor that autograd keeps, in a box that can be watched."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_is_kept_once_the_answer_is_gone(backward):
    """Not for the garbage collector to find: a circle through autograd's graph is one that it does not see through."""
    model = block()
    inject(model, LoraConfig(r=2, target_modules=["q", "k", "v", "o"]))
    kept = []

    def pack(tensor):
        kept.append(weakref.ref(box := Saved(tensor)))
        return box

    gc.collect()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            for _ in range(3):
                x = torch.randn(4, 6, requires_grad=True)
                y = model(x.sin())
                if backward:
                    y.sum().backward()
        assert len(kept) >= 12
        assert any(box() is not None for box in kept) != backward
        del x, y
        assert not any(box() is not None for box in kept)
        assert not any(isinstance(found, SharedInput) for found in gc.get_objects())
    finally:
        gc.enable()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_model_without_numbers_can_be_passed_through_again_and_again(dropout):
    """On the meta device, as one counts operations: before and after the projections know each other."""
    model = block().to("meta")
    inject(model, LoraConfig(r=2, target_modules=["q", "k", "v", "o"], lora_dropout=dropout))
    x = torch.empty(2, 40, 6, device="meta", requires_grad=True)
    for _ in range(3):
        model(x * 1).sum().backward()
    assert x.grad.shape == x.shape and x.grad.is_meta
