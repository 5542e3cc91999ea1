"""Default targets: the query and value projections of every architecture in the table that transformers can build."""

from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoraConfig
from lowrank.errors import TargetError
from lowrank.injection.architectures import QUERY_VALUE
from models import causal

BUILD = {  # what a default config lacks for a model to be built of it
    "ministral": {"head_dim": 64},
    "nemotron": {"num_key_value_heads": 8},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
}


def skeleton(model_type: str) -> nn.Module:
    """The model of the type's default config, on the meta device, of two layers where a config counts them."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(model_type, **BUILD.get(model_type, {}))
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        _shorten(part)
    with torch.device("meta"):
        return AutoModel.from_config(config)


def _shorten(config: Any) -> None:
    for name in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers", "n_layers", "n_layer"):
        if isinstance(getattr(config, name, None), int) and "longformer" not in config.model_type:
            setattr(config, name, 2)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]


@pytest.mark.parametrize("model_type", QUERY_VALUE)
def test_the_table_names_query_and_value_projections(model_type: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    plan = lowrank.plan(skeleton(model_type), LoraConfig(r=2))
    leaves = [entry.label.rpartition(".")[2] for entry in plan.entries]
    if leaves[0].endswith("[q,v]"):
        assert set(leaves) == {leaves[0]}
        return
    query, value = dict.fromkeys(sorted(leaves, key=lambda leaf: (not leaf.startswith("q"), leaf)))
    assert "q" in query
    assert "v" in value
    assert leaves.count(query) == leaves.count(value) > 0


def test_the_default_adapts_query_and_value_of_every_layer_and_nothing_else() -> None:
    plan = lowrank.inject(causal("llama"), LoraConfig(r=2))
    assert [entry.path for entry in plan.entries] == [
        f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")
    ]
    plan = lowrank.inject(causal("gpt2"), LoraConfig(r=2))
    assert [entry.label for entry in plan.entries] == [f"transformer.h.{i}.attn.c_attn[q,v]" for i in (0, 1)]


def test_deepseek_without_a_query_bottleneck_has_another_name() -> None:
    from test_fused_rows import DEEPSEEK

    model = causal("deepseek_v3", **{**DEEPSEEK, "q_lora_rank": None})
    plan = lowrank.plan(model, LoraConfig(r=2))
    assert {entry.label.rpartition(".")[2] for entry in plan.entries} == {"q_proj", "kv_b_proj[v]"}


def test_an_unknown_architecture_lists_its_linear_modules() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.out = nn.Linear(3, 3), nn.Linear(3, 3)
            self.table = nn.Embedding(3, 3)

    with pytest.raises(TargetError, match=r"projections of a Odd are not known; .* \(linear modules here: mix, out\)"):
        lowrank.inject(Odd(), LoraConfig(r=2))
    model = causal("llama")
    model.config.model_type = "llamma"
    with pytest.raises(TargetError, match="models of type 'llamma' are not known"):
        lowrank.inject(model, LoraConfig(r=2))
