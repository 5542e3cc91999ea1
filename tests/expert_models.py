"""Tiny mixtures of experts with random weights, adapters for them, and the dense models that they have to equal."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import lowrank
from families import IDS, SMALL, shrink
from lowrank import LoraConfig
from lowrank.injection.adapters import lora_layers

FAMILIES: dict[str, dict[str, Any]] = {  # model types, and what their configs need to be small
    "mixtral": {},
    "qwen3_moe": {"decoder_sparse_step": 1},
    "olmoe": {},
    "deepseek_v3": {"head_dim": 4, "num_key_value_heads": 4},
    "glm4_moe": {},
    "qwen3_next": {},
    "granitemoe": {},
    "jamba": {"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_conv": 2},
    "gpt_oss": {},
    "llama4_text": {"no_rope_layers": [1, 0], "moe_layers": [0, 1], "interleave_moe_layer_step": 1},
    "nemotron_h": {"layers_block_type": ["attention", "moe"], "num_hidden_layers": 2, "moe_latent_size": None},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2, "global_head_dim": 8, "num_kv_shared_layers": 0},
}
VARIED = {  # configs whose layers differ, which cannot be made small field by field
    "gemma4_text": {
        field: SMALL[field]
        for field in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "vocab_size_per_layer_input", "hidden_size_per_layer_input",
            "num_experts", "moe_intermediate_size", "max_position_embeddings", "pad_token_id",
        )
    },
}  # fmt: skip
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def mixture(model_type: str, implementation: str = "grouped_mm", **options: Any) -> nn.Module:
    """A tiny causal model of the type, of which every token meets two experts of four."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    if model_type in VARIED:
        config = AutoConfig.for_model(model_type, **VARIED[model_type] | FAMILIES[model_type] | options)
    else:
        config = shrink(AutoConfig.for_model(model_type))
        fields = {name: value for name, value in config.to_dict().items() if name not in ("layer_types", "model_type")}
        config = type(config)(**fields | FAMILIES[model_type] | options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if model_type != "llama4_text":  # it has one way
        model.set_experts_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 3:
                parameter += 0.1 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def answer(model: nn.Module) -> Tensor:
    """The model's scores for a fixed input."""
    return model(input_ids=IDS).logits


EVERY_STACK = {"target_modules": (), "target_parameters": r".*\.experts\.\w+", "r": 3, "lora_alpha": 5}


def adapted(model: nn.Module, name: str = "default", seed: int = 1, **options: Any) -> nn.Module:
    """In place: an adapter on every stack, with factors that are not zero."""
    lowrank.inject(model, LoraConfig(**EVERY_STACK | options), name)
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            for factor in layer.factors(name).trainable():
                factor.normal_(std=0.4)
    return model


def adapted_by_dora(model: nn.Module, name: str = "default", seed: int = 1, **options: Any) -> nn.Module:
    """`adapted` with a magnitude for every row of every expert, so that the gains are well away from 1."""
    adapted(model, name, seed, **{"use_dora": True} | options)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            if name in layer.adapter_names and (magnitude := layer.factors(name).magnitude) is not None:
                magnitude.abs_().add_(0.3)
    return model


def formed(model: nn.Module, adapters: tuple[str, ...] = ("default",)) -> dict[str, Tensor]:
    """{parameter: W0 + Σ s·B·A} of every stack, expert by expert, differentiable in the factors."""
    weights = {}
    for path, stack in lora_layers(model):
        experts = []
        for expert, matrix in enumerate(stack.base_weight.detach()):
            for name in adapters:
                factors = stack.factors(name)
                change = factors.scale * factors.b[expert] @ factors.a[expert]
                if factors.magnitude is not None:  # DoRA, its norm held constant
                    base = stack.base_weight.detach()[expert]
                    tuned = (base.t() if stack.transposed else base) + change
                    gain = factors.magnitude[expert] / tuned.detach().norm(dim=1)
                    change = gain.unsqueeze(1) * tuned - (base.t() if stack.transposed else base)
                matrix = matrix + (change.t() if stack.transposed else change)
            experts.append(matrix)
        weights[path] = torch.stack(experts)
    return weights


def dense_answer(model: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
    """What the base answers with `weights` in the place of its own."""
    with lowrank.disabled(model):
        return torch.func.functional_call(model, dict(weights), kwargs={"input_ids": IDS}).logits
