"""target_modules and its companions mean what they mean in PEFT, and a pattern that means nothing is an error."""

from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoraConfig
from lowrank.errors import ConfigError, LowrankWarning, TargetError
from lowrank.injection.adapters import lora_layers
from models import MODELS, answer, causal
from snapshots import assert_same, snapshot

LISTS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.down_proj"]},
        {"target_modules": ["o_proj"], "layers_to_transform": 1},
        {"target_modules": ["o_proj", "up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        {"target_modules": r".*\.(0|1)\.self_attn\.[qk]_proj"},
        {"target_modules": r"model\.layers\.\d+\.mlp\..*_proj", "exclude_modules": r".*\.0\..*gate.*"},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["gate_proj", "o_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3, r"layers.1.self_attn.v_proj": 4}},
        {
            "target_modules": "all-linear",
            "rank_pattern": {r".*0\..*_proj": 5, "q_proj": 3},
            "alpha_pattern": {"[qk]_proj": 7, r"1\.mlp\.up_proj": 3.5},
        },
        {"target_modules": ["q_proj"], "rank_pattern": {"^model.layers.0.self_attn.q_proj": 6}, "use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    "gpt2": [
        {"target_modules": ["c_attn"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["c_proj"], "layers_to_transform": [1], "layers_pattern": ["h"]},
        {"target_modules": ["attn.c_proj", "wte"]},
    ],
    "bert": [
        {"target_modules": ["query", "value"], "layers_to_transform": 0},
        {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["word_embeddings", "key"]},
    ],
    "t5": [
        {"target_modules": ["q", "v"]},
        {"target_modules": r"decoder\..*EncDecAttention\.(q|v)"},
        {"target_modules": "all-linear"},
    ],
    "vit": [{"target_modules": "all-linear"}, {"target_modules": ["q_proj", "projection"]}],
    "mixtral": [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 9}},
    ],
    "convnet": [
        {"target_modules": ["stem", "depthwise", "head"], "rank_pattern": {"depthwise": 8}},
        {"target_modules": r".*wise", "rank_pattern": {"depthwise": 8}, "alpha_pattern": {"point.*": 3}},
    ],
}
ALIKE = [(name, i) for name, configs in LISTS.items() for i in range(len(configs))]


def in_peft(name: str, options: dict[str, Any]) -> dict[str, tuple[int, float]]:
    """{module: (rank, scale)} of the model that PEFT makes."""
    import peft
    from peft.tuners.lora import LoraLayer as PeftLayer

    task = {"bert": "SEQ_CLS"}.get(name)
    made = peft.get_peft_model(MODELS[name](), peft.LoraConfig(r=2, lora_alpha=5, task_type=task, **options))
    return {
        path.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for path, module in made.named_modules()
        if isinstance(module, PeftLayer)
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "which"), ALIKE)
def test_the_same_modules_ranks_and_scales_as_peft(name: str, which: int) -> None:
    options = LISTS[name][which]
    wanted = in_peft(name, options)
    if name == "vit" and options["target_modules"] == "all-linear":
        wanted.pop("classifier", None)  # PEFT knows a head only by its task type, and there is none for images
    if name == "mixtral":  # PEFT adds the router, and calls stacks of experts by what it wraps (test_expert_files)
        wanted = {path: value for path, value in wanted.items() if ".self_attn." in path}
    model = MODELS[name]()
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, **options))
    ours = {path: (f.rank, f.scale) for path, layer in lora_layers(model) for f in [layer.factors("default")]}
    ours = {path: value for path, value in ours.items() if ".experts." not in path}
    assert ours == {path: (rank, pytest.approx(scale)) for path, (rank, scale) in wanted.items()}
    assert ours


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a typo": ({"target_modules": ["q_porj"]}, r"'q_porj' matches no module \(nearest: .*q_proj"),
    "a typo beside a good name": ({"target_modules": ["v_proj", "k_prj"]}, r"'k_prj' matches no .*k_proj"),
    "a typo in a path": ({"target_modules": ["self_atn.q_proj"]}, r"nearest: self_attn\.q_proj"),
    "not the end of a path": ({"target_modules": ["self_attn.q"]}, "'self_attn.q' matches no module"),
    "a regex that matches nothing": ({"target_modules": "q_proj"}, r"'q_proj', a string, .* give a list: \['q_proj'\]"),
    "a typo in exclusions": ({"target_modules": ["q_proj"], "exclude_modules": ["v_pro"]}, r"exclude_modules: 'v_pro'"),
    "a dead exclusion": (
        {"target_modules": "all-linear", "exclude_modules": "nothing.*"},
        "exclude_modules: 'nothing",
    ),
    "everything excluded": ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "nothing is left"),
    "a layer that is not": ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}, "lies in layer 7"),
    "a layers_pattern that is not": (
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "blocks"},
        "no target lies in layer 0; .* without a number: set layers_pattern",
    ),
    "a typo in saved modules": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_hed"]}, "nearest: lm_head"),
    "a dead rank pattern": ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 3}}, "rank_pattern: 'v_proj'"),
    "a dead alpha pattern": ({"target_modules": ["q_proj"], "alpha_pattern": {"p_proj": 3}}, "nearest: q_proj"),
    "a norm": ({"target_modules": ["input_layernorm"]}, "a LlamaRMSNorm is none of Linear"),
    "a list of layers": ({"target_modules": r"model\.layers"}, "a ModuleList is none of"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_matches_nothing_is_an_error_and_changes_nothing(what: str) -> None:
    options, message = WRONG[what]
    model = MODELS["llama"]()
    before = snapshot(model)
    with pytest.raises(TargetError, match=message):
        lowrank.inject(model, LoraConfig(r=2, **options))
    assert_same(model, before)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"r": 0}, "r must be a whole number of at least 1, not 0"),
    "negative rank": ({"r": -3}, "not -3"),
    "rank that is no int": ({"r": 2.0}, r"not 2\.0"),
    "rank that is a bool": ({"r": True}, "not True"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, not nan"),
    "alpha inf": ({"lora_alpha": float("inf")}, "not inf"),
    "dropout 1": ({"lora_dropout": 1.0}, "probability from 0 to below 1"),
    "dropout below 0": ({"lora_dropout": -0.1}, "probability"),
    "bias": ({"bias": "some"}, 'bias must be "none", "all" or "lora_only"'),
    "init": ({"init_lora_weights": "gausian"}, "'gausian' is not known: choose one of gaussian, kaiming"),
    "no targets": ({"target_modules": []}, "target_modules is empty"),
    "saved as a string": ({"modules_to_save": "lm_head"}, "must be a list of names, not the string 'lm_head'"),
    "regex and layers": ({"target_modules": "all", "layers_to_transform": 1}, "a regex can name the layers itself"),
    "pattern without layers": ({"layers_pattern": "h"}, "means nothing without layers_to_transform"),
    "pattern rank": ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be a whole number"),
    "pattern alpha": ({"alpha_pattern": {"q": float("inf")}}, r"alpha_pattern\['q'\] must be a finite"),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_configs_that_cannot_be_meant(what: str) -> None:
    options, message = BAD_CONFIGS[what]
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**options)


def test_every_fault_of_a_config_is_listed() -> None:
    with pytest.raises(ConfigError, match=r"r must be .*; lora_alpha must be .*; lora_dropout must be"):
        LoraConfig(r=0, lora_alpha=float("nan"), lora_dropout=2.0)


@pytest.mark.parametrize(
    "options",
    [{"target_modules": "(q_proj"}, {"target_modules": ["q_proj"], "rank_pattern": {"(q": 3}}],
    ids=["targets", "rank_pattern"],
)
def test_a_broken_regex_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is not a regular expression"):
        lowrank.plan(MODELS["llama"](), LoraConfig(r=2, **options))


def test_of_many_ranks_above_all_targets_three_are_named() -> None:
    model = nn.ModuleDict({f"layer{number}": nn.Linear(8, 9) for number in range(40)})
    with pytest.raises(ConfigError, match=r"r is above .* smaller: (layer\d+ \(r=9, 9×8\)(, )?){3} and 37 more$"):
        lowrank.plan(model, LoraConfig(r=9, target_modules="all-linear"))


def test_a_rank_above_some_targets_warns_and_above_all_is_an_error() -> None:
    model = nn.ModuleDict({"small": nn.Linear(3, 9), "large": nn.Linear(8, 9)})
    with pytest.warns(LowrankWarning, match=r"r is above min\(d, k\).* in small \(r=5, 9×3\)$"):
        lowrank.inject(model, LoraConfig(r=5, target_modules=["small", "large"]))
    model = nn.ModuleDict({"small": nn.Linear(3, 9), "large": nn.Linear(8, 9)})
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"r is above min.* of every target.*small.*large"):
        lowrank.inject(model, LoraConfig(r=9, target_modules=["small", "large"]))
    assert_same(model, before)


def test_odd_ranks_of_orthogonal_are_refused_before_anything_changes() -> None:
    model = MODELS["llama"]()
    before = snapshot(model)
    options = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}}
    with pytest.raises(ConfigError, match="needs an even rank, not 3: choose r = 4"):
        lowrank.inject(model, LoraConfig(r=2, init_lora_weights="orthogonal", **options))
    assert_same(model, before)


def test_a_second_adapter_sees_the_base_only() -> None:
    """Patterns never match what the first adapter added, and the plan counts the base's parameters."""
    model = MODELS["llama"]()
    options = {"r": 2, "target_modules": r".*", "exclude_modules": r"(?!.*q_proj$).*"}
    first = lowrank.inject(model, LoraConfig(**options), "first")
    second = lowrank.inject(model, LoraConfig(**options), "second")
    assert first == second
    assert [path for path, _ in lora_layers(model)] == [entry.path for entry in first.entries]


def test_the_output_head_of_nested_attention_is_a_linear_layer_like_others() -> None:
    """nn.MultiheadAttention reads out_proj.weight and never calls out_proj: test_weights_read.py has its answers."""
    model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True)
    plan = lowrank.inject(model, LoraConfig(r=2, target_modules="all-linear"))
    assert [entry.path for entry in plan.entries] == ["self_attn.out_proj", "linear1", "linear2"]


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "max_norm": (nn.Embedding(5, 3, max_norm=1.0), "max_norm rewrites the table"),
    "int8": (nn.Linear(3, 3), "its weight is torch.int8, a stored form that is not known here: register_reader"),
    "float8_e4m3fn": (
        nn.Linear(3, 3),
        "its weight is torch.float8_e4m3fn, which holds a scaled copy at best: load the",
    ),
    "complex64": (nn.Linear(3, 3), "its weight is torch.complex64, and changes are real"),
    "weight_norm": (
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        "no parameter of its own: a parametrisation",
    ),
    "orthogonal": (nn.utils.parametrizations.orthogonal(nn.Conv1d(3, 3, 1)), "no parameter of its own: a parametrisat"),
    "spectral_norm, by hooks": (nn.utils.spectral_norm(nn.Linear(3, 3)), "no parameter of its own: a parametrisation"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_layers_without_a_constant_floating_weight_are_refused(what: str) -> None:
    layer, message = REFUSED[what]
    if isinstance(dtype := getattr(torch, what, None), torch.dtype):
        layer.weight = nn.Parameter(torch.ones(3, 3).to(dtype), requires_grad=False)
    model = nn.ModuleDict({"layer": layer})
    with pytest.raises(TargetError, match=message):
        lowrank.inject(model, LoraConfig(r=2, target_modules=["layer"]))


ROUTERS = {
    "phimoe": {"num_key_value_heads": 2, "num_local_experts": 2},
    "llama4_text": {
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_local_experts": 2,
        "intermediate_size_mlp": 24,
        "interleave_moe_layer_step": 1,
    },
}


@pytest.mark.parametrize("model_type", ROUTERS)
def test_routers_that_are_linear_by_class_only_are_left_out_and_refused(model_type: str) -> None:
    model = causal(model_type, **ROUTERS[model_type])
    plan = lowrank.inject(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights="random"))
    assert {"q_proj", "o_proj"} <= {entry.path.rpartition(".")[2] for entry in plan.entries}
    assert torch.isfinite(answer(model)).all()
    with pytest.raises(TargetError, match=r"Router does not answer W0·x \+ bias"):
        lowrank.inject(model, LoraConfig(r=2, target_modules=["router"]), "second")


def test_a_forward_patched_on_the_instance_is_refused() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(3, 3)})
    model["layer"].forward = lambda x: x
    before = snapshot(model)
    with pytest.raises(TargetError, match="layer: its forward is replaced on the instance"):
        lowrank.inject(model, LoraConfig(r=2, target_modules=["layer"]))
    assert_same(model, before)


def test_the_plan_prints_every_target_and_the_sum() -> None:
    model = MODELS["llama"]()
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    plan = lowrank.plan(model, config)
    text = str(plan)
    assert "model.layers.0.self_attn.q_proj  linear      16×16" in text
    assert "in full: lm_head" in text
    assert text.splitlines()[-1] == plan.summary()
    lowrank.inject(model, config)
    assert plan.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
