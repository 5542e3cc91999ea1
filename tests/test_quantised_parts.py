"""Parts of a fused projection and patterns of rank and alpha over a quantised base: those over the dequantised one."""

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoraConfig
from lowrank.injection.adapters import lora_layers
from models import IDS, causal
from quantised_models import SCHEMES, oracle, quantise

CONFIG = {
    "r": 3,
    "lora_alpha": 5,
    "target_modules": ["qkv_proj[q,v]", "o_proj", "down_proj"],
    "rank_pattern": {"down_proj": 2},
    "alpha_pattern": {"layers.1.self_attn.o_proj": 7},
}


def both(scheme: str) -> tuple[nn.Module, nn.Module]:
    """(a small quantised Phi-3, the same with plain layers that hold its dequantised matrices), adapted alike."""
    model = quantise(causal("phi3", hidden_size=64, intermediate_size=128), scheme)
    twin = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if hasattr(layer, "compute_dtype") or type(layer).__name__ == "Linear8bitLt":
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight = nn.Parameter(oracle(layer).clone(), requires_grad=False)
            twin.set_submodule(path, plain)
    for one in (model, twin):
        torch.manual_seed(3)
        lowrank.inject(one, LoraConfig(**CONFIG))
        for _, layer in lora_layers(one):
            for tensor in layer.factors("default").trainable():
                tensor.data += 0.1 * torch.randn_like(tensor)
    return model, twin


@pytest.mark.parametrize("scheme", SCHEMES)
def test_parts_and_patterns_are_those_of_the_dequantised_model(scheme, tmp_path):
    model, twin = both(scheme)
    factors = {path: layer.factors("default") for path, layer in lora_layers(model)}
    first, second = (f"model.layers.{i}" for i in (0, 1))
    assert [len(factors[f"{first}.{name}"].parts) for name in ("self_attn.qkv_proj", "mlp.down_proj")] == [2, 0]
    assert (factors[f"{first}.mlp.down_proj"].rank, factors[f"{first}.self_attn.o_proj"].rank) == (2, 3)
    assert [factors[f"{at}.self_attn.o_proj"].scale for at in (first, second)] == pytest.approx([5 / 3, 7 / 3])
    answers = []
    for one in (model, twin):
        logits = one(IDS).logits
        logits.sin().sum().backward()
        answers.append([logits.detach(), *(p.grad for p in one.parameters() if p.requires_grad)])
    for got, wanted in zip(*answers, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))  # of its size
    lowrank.save_adapter(model, tmp_path)
    lowrank.merge_and_unload(model)
    lowrank.merge_and_unload(twin)
    plain = dict(twin.named_parameters())
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.named_parameters())
    again, _ = both(scheme)
    lowrank.unload(again)
    lowrank.load_adapter(again, tmp_path)
    torch.testing.assert_close(again(IDS).logits, answers[0][0], rtol=1e-5, atol=1e-6)
