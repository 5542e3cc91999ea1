"""The same factors in a PEFT model and in ours: the same answers, gradients and merged weights."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lowrank
import reference
from layer_cases import move
from lowrank import LoraConfig
from lowrank.injection.adapters import lora_layers
from lowrank.layers.base import LoraLayer
from models import MODELS, answer, causal

pytestmark = pytest.mark.filterwarnings("ignore")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": "all-linear"}),
    "llama, rslora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "llama, patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r"1\.self_attn\.q_proj": 2},
            "alpha_pattern": {"v_proj": 9},
        },
    ),
    "llama, dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "llama, embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2, dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
    "bert": ("bert", {"target_modules": ["query", "value", "dense"]}),
    "bert, dora": ("bert", {"target_modules": ["query", "dense"], "use_dora": True, "use_rslora": True}),
    "t5": ("t5", {"target_modules": ["q", "v", "wo"]}),
    "vit": ("vit", {"target_modules": ["q_proj", "v_proj", "projection"]}),
    "convnet": ("convnet", {"target_modules": ["stem", "pointwise", "head"]}),
    "mixtral": ("mixtral", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
}
FIELDS = ("a", "b", "magnitude")


def ours(name: str, model: nn.Module, adapter: str = "default", **more: Any) -> nn.Module:
    """The model with our adapter, every trained tensor moved off its start."""
    options = {k: v for k, v in {**CASES[name][1], **more}.items() if k != "fan_in_fan_out"}
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=5, init_lora_weights="random", **options), adapter)
    move([layer.factors(adapter) for _, layer in lora_layers(model) if adapter in layer.adapter_names])
    return model


def theirs(name: str, model: nn.Module, adapter: str = "default") -> peft.PeftModel:
    """The model with PEFT's adapter of the same configuration."""
    return peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, **CASES[name][1]), adapter)


def peft_tensors(module: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """PEFT's tensors of one layer under our field names."""
    if adapter in module.lora_embedding_A:
        found = {"a": module.lora_embedding_A[adapter], "b": module.lora_embedding_B[adapter]}
    else:
        found = {"a": module.lora_A[adapter].weight, "b": module.lora_B[adapter].weight}
    if adapter in module.lora_magnitude_vector:
        found["magnitude"] = module.lora_magnitude_vector[adapter].weight
    return found


def pairs(mine: nn.Module, other: peft.PeftModel) -> list[tuple[str, LoraLayer, nn.Module]]:
    """(path, our layer, PEFT's layer) of every adapted module; both adapt the same ones."""
    found = [(path, layer, other.base_model.model.get_submodule(path)) for path, layer in lora_layers(mine)]
    wrapped = [m for m in other.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(found) == len(wrapped)
    return found


@torch.no_grad()
def copy_factors(mine: nn.Module, other: peft.PeftModel, adapter: str = "default") -> None:
    """In place: PEFT's tensors take our values."""
    for path, layer, module in pairs(mine, other):
        factors = layer.factors(adapter)
        assert module.scaling[adapter] == pytest.approx(factors.scale), path
        for field, tensor in peft_tensors(module, adapter).items():
            tensor.copy_(getattr(factors, field).view_as(tensor))


def both(name: str) -> tuple[nn.Module, peft.PeftModel]:
    """Our model and PEFT's with equal bases and factors."""
    base = MODELS[CASES[name][0]]()
    mine, other = ours(name, base), theirs(name, copy.deepcopy(lowrank.unload(copy.deepcopy(base))))
    copy_factors(mine, other)
    return mine, other.eval()


@pytest.mark.parametrize("name", CASES)
def test_equal_answers(name: str) -> None:
    mine, other = both(name)
    with lowrank.disabled(mine):
        base = answer(mine)
    wanted = answer(other.base_model.model)
    assert (wanted - base).abs().max() > 1e-2
    assert torch.allclose(answer(mine), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_equal_gradients(name: str) -> None:
    mine, other = both(name)
    for model in (mine, other.base_model.model):
        answer(model).square().sum().backward()
    for path, layer, module in pairs(mine, other):
        for field, tensor in peft_tensors(module, "default").items():
            gradient = getattr(layer.factors("default"), field).grad.view_as(tensor)
            size = tensor.grad.abs().max()
            assert size > 0, f"{path}.{field}"
            assert (gradient - tensor.grad).abs().max() <= 1e-4 * size, f"{path}.{field}"


@pytest.mark.parametrize("name", CASES)
def test_equal_merged_weights(name: str) -> None:
    mine, other = both(name)
    wanted = other.merge_and_unload().state_dict()
    merged = lowrank.merge_and_unload(mine).state_dict()
    assert list(merged) == list(wanted)
    for key, tensor in merged.items():
        assert torch.allclose(tensor, wanted[key], rtol=1e-5, atol=1e-6), key


@pytest.mark.parametrize("name", ["llama", "gpt2", "convnet", "llama, embedding"])
def test_several_active_adapters_add_as_in_peft(name: str) -> None:
    base = MODELS[CASES[name][0]]()
    other = theirs(name, copy.deepcopy(base), "first")
    mine = ours(name, base, "first")
    copy_factors(mine, other, "first")
    mine = ours(name, mine, "second")
    other.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=5, **CASES[name][1]))
    copy_factors(mine, other, "second")
    lowrank.set_active(mine, ["first", "second"])
    other.base_model.set_adapter(["first", "second"])
    assert torch.allclose(answer(mine), answer(other.eval().base_model.model), rtol=1e-4, atol=1e-5)


def test_a_grouped_convolution_is_pefts_with_its_groups_written_out() -> None:
    """PEFT's A sees all channels; ours is PEFT's where every group sees its own channels only."""
    groups, rank = 8, 3
    base = MODELS["convnet"]()
    config = peft.LoraConfig(r=rank * groups, lora_alpha=5 * groups, target_modules=["depthwise"])
    other = peft.get_peft_model(copy.deepcopy(base), config).eval()
    lowrank.inject(base, LoraConfig(r=rank, lora_alpha=5, target_modules=["depthwise"], init_lora_weights="random"))
    (_, layer), *_ = lora_layers(base)
    factors, module = layer.factors("default"), other.base_model.model.depthwise
    with torch.no_grad():
        kernel = factors.a.view(rank, *layer.weight.shape[1:])
        spread = module.lora_A["default"].weight.zero_()  # (groups·r, in, *kernel)
        for group in range(groups):
            spread[group * rank : (group + 1) * rank, group : group + 1] = kernel
        module.lora_B["default"].weight.copy_(factors.b.view_as(module.lora_B["default"].weight))
    assert torch.allclose(answer(base), answer(other.base_model.model), rtol=1e-4, atol=1e-5)


def misrounded(model: nn.Module, wanted: dict[str, Tensor]) -> float:
    """The share of merged weights that are not the float64 sum rounded once."""
    state = model.state_dict()
    wrong = sum(int((state[key] != tensor).sum()) for key, tensor in wanted.items())
    return wrong / sum(tensor.numel() for tensor in wanted.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ours_rounds_once_where_pefts_safe_merge_rounds_twice(
    dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    """Merged half-precision weights that are not the float64 sum rounded once: ours < 0.1 %.

    PEFT's safe merge rounds the change before it adds it; its plain merge adds in float32 in place, as we do.
    """
    mine = ours("llama", causal("llama", hidden_size=64, intermediate_size=128).to(dtype))
    other = theirs("llama", lowrank.unload(copy.deepcopy(mine)))
    copy_factors(mine, other)
    wanted = {
        f"{path}.weight": reference.adapted_weight(layer, [layer.factors("default")]).to(dtype)
        for path, layer in lora_layers(mine)
    }
    shares = {
        "ours": misrounded(lowrank.merge_and_unload(mine), wanted),
        "peft": misrounded(copy.deepcopy(other).merge_and_unload(), wanted),
        "peft, safe_merge": misrounded(copy.deepcopy(other).merge_and_unload(safe_merge=True), wanted),
    }
    for way, share in shares.items():
        record_property(f"misrounded by {way} in {dtype}", share)
    assert shares["ours"] < 1e-3
    assert shares["ours"] < shares["peft, safe_merge"]
