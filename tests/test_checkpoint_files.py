"""What is in the files, byte for byte, and what other makers' files mean to us."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lowrank
from checkpoint_models import answer, contents, convolutions, disturb, gpt2, llama
from lowrank import LoraConfig
from lowrank.checkpoint import load_loralib
from lowrank.checkpoint.describe import describe, exact_alpha, exact_key, target_names
from lowrank.checkpoint.fingerprint import config_digest, fingerprint
from lowrank.checkpoint.keys import ROLES, full_key, low_rank_key, parse
from lowrank.checkpoint.layout import from_file, to_file, wanted_shapes
from lowrank.checkpoint.renaming import find_renaming
from lowrank.core.factors import LoraFactors
from lowrank.core.scaling import lora_scale
from lowrank.injection.fused import part_rows
from lowrank.injection.patterns import pattern_value


def save(make, folder, **options):
    """The adapted model whose adapter is now in `folder`."""
    model = make()
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, **options))
    disturb(model)
    lowrank.save_adapter(model, folder)
    return model


# Our files


def test_the_file_is_what_the_format_says(tmp_path):
    model = save(llama, tmp_path / "a", target_modules=["q_proj"])
    assert set(contents(tmp_path / "a")) == {"adapter_config.json", "adapter_model.safetensors", "lowrank.json"}
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert list(file.keys()) == [
            f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.weight" for i in (0, 1) for x in "AB"
        ]
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    factors = model.model.layers[1].self_attn.q_proj.factors("default")
    assert torch.equal(tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"], factors.a)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert list(config) == sorted(config)
    assert config["r"] == 3 and config["lora_alpha"] == 7 and type(config["lora_alpha"]) is int
    assert config["task_type"] == "CAUSAL_LM" and config["inference_mode"] and config["init_lora_weights"] is True


SAVED_TWICE = """
import sys
sys.path.insert(0, sys.argv[1])
from checkpoint_models import convolutions, disturb
import lowrank
model = convolutions()
lowrank.inject(model, lowrank.LoraConfig(r=2, lora_alpha=7, target_modules=["three", "one", "head", "two"],
    rank_pattern={"head": 3, "one": 1}, modules_to_save=["norm"], init_lora_weights="pissa"))
lowrank.save_adapter(disturb(model), sys.argv[2])
"""


def test_the_same_model_gives_the_same_bytes_whatever_the_order_of_sets(tmp_path):
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", SAVED_TWICE, os.path.dirname(__file__), str(tmp_path / seed)]
        subprocess.run(command, check=True, env=environment)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_another_adapter_leaves_nothing_of_the_old_one(tmp_path):
    save(gpt2, tmp_path / "a", target_modules=["c_attn[q]"], modules_to_save=["ln_f"])
    save(gpt2, tmp_path / "a", target_modules=["c_fc"])
    save(gpt2, tmp_path / "b", target_modules=["c_fc"])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_readme_beside_an_adapter_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    save(llama, tmp_path, target_modules=["q_proj"])
    save(llama, tmp_path, target_modules=["v_proj"])
    assert contents(tmp_path)["README.md"] == b"mine"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["v_proj"]


def test_the_dtype_of_the_factors_is_kept(tmp_path):
    model = save(llama, tmp_path / "a", target_modules=["q_proj"])
    for layer in model.model.layers:
        layer.self_attn.q_proj.factors("default").bfloat16()
    lowrank.save_adapter(model, tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    loaded = llama()
    lowrank.load_adapter(loaded, tmp_path / "b")
    factors = loaded.model.layers[0].self_attn.q_proj.factors("default")
    assert factors.a.dtype == torch.float32 and torch.equal(factors.a.bfloat16(), next(iter(tensors.values())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_load_after_save_is_the_identity_on_any_base(dtype, tmp_path):
    def make():
        return llama().to(dtype)

    model = save(make, tmp_path / "a", target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"])
    loaded = make()
    lowrank.load_adapter(loaded, tmp_path / "a", trainable=True)
    state = loaded.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert torch.equal(answer(loaded), answer(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}


def test_a_loaded_adapter_is_active_alone_and_rests_unless_asked(tmp_path):
    save(llama, tmp_path / "a", target_modules=["q_proj"])
    model = llama()
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=3, target_modules=["o_proj"]), "mine")
    lowrank.load_adapter(model, tmp_path / "a", "theirs")
    assert lowrank.active_adapters(model) == ("theirs",)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    config = lowrank.adapter_configs(model)["theirs"]
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 7, ("q_proj",))
    lowrank.unload(model)
    assert torch.equal(answer(model), answer(llama()))


def test_a_compiled_model_is_saved_as_itself(tmp_path):
    model = save(llama, tmp_path / "a", target_modules=["q_proj"])
    lowrank.save_adapter(torch.compile(model), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_reading_needs_no_model(tmp_path):
    model = save(
        convolutions,
        tmp_path / "a",
        target_modules=["one", "two", "head"],
        alpha_pattern={"two": 2},
        rank_pattern={"one": 2},
    )
    lowrank.save_adapter(model, tmp_path / "a", scales="own")
    files = lowrank.read_adapter(tmp_path / "a")
    assert list(files.low_rank) == ["head", "one", "two"]
    assert files.companion.base is not None and files.companion.base.shapes["two"] == [9, 2, 3, 3]
    for path in files.low_rank:
        layer = model.get_submodule(path)
        expected, got = layer.factors("default"), files.factors(path, tuple(layer.weight.shape))
        assert torch.equal(got.a, expected.a) and torch.equal(got.b, expected.b) and got.scale == expected.scale


def test_merging_from_files_is_merging_in_memory(tmp_path):
    """What `AdapterFiles.factors` gives is what a layer merges, to the bit, for every layout."""
    from lowrank.core.merging import merge_weight, prepare
    from lowrank.injection.adapters import lora_layers

    cases = [
        (gpt2, {"target_modules": ["c_attn[q,v]", "c_fc"], "init_lora_weights": "pissa"}),
        (convolutions, {"target_modules": ["one", "two", "three"]}),
        (llama, {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True}),
        (llama, {"target_modules": ["up_proj"], "use_dora": True}),
    ]
    for number, (make, options) in enumerate(cases):
        model = save(make, tmp_path / str(number), **options)
        files = lowrank.read_adapter(tmp_path / str(number))
        for path, layer in lora_layers(model):
            weight = layer.stored(layer.weight.detach())
            factors = files.factors(path, tuple(layer.weight.shape))
            merged = merge_weight(weight, [prepare(factors, weight, transposed=layer.transposed)])
            assert torch.equal(merged.view_as(layer.weight), layer.merged_weight(("default",)))


# Other makers' files


OLD_CONFIG = {  # what PEFT 0.3 wrote
    "base_model_name_or_path": "somewhere/llama",
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": 7,
    "lora_dropout": 0.05,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 3,
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
}


@pytest.mark.parametrize(
    "changes, unknown",
    [
        ({}, ()),
        ({"layers_pattern": [], "layers_to_transform": None, "rank_pattern": {}, "alpha_pattern": {}}, ()),
        ({"target_modules": r".*\.q_proj"}, ()),
        ({"target_modules": "q_proj", "layers_to_transform": [0, 1]}, ()),
        ({"target_modules": ["names", "of", "long", "ago"]}, ()),
        ({"target_modules": None}, ()),
        ({"fan_in_fan_out": True}, ()),
        ({"peft_version": "0.18.2.dev0@UNKNOWN", "lora_bias": False, "exclude_modules": None}, ()),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "loftq_config": {}, "megatron_config": None}, ()),
        ({"init_lora_weights": "mica"}, ()),
        ({"runtime_config": {"ephemeral_gpu_offload": False}, "future": {"x": 1}}, ("future", "runtime_config")),
        ({"modules_to_save": ["classifier", "score"]}, ()),
        ({"lora_alpha": 7.0}, ()),
    ],
)
def test_configs_of_many_years(changes, unknown, tmp_path):
    model = save(llama, tmp_path / "a", target_modules=["q_proj"])
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(OLD_CONFIG | changes))
    (tmp_path / "a" / "lowrank.json").unlink()
    loaded = llama()
    report = lowrank.load_adapter(loaded, tmp_path / "a")
    assert torch.equal(answer(loaded), answer(model))
    assert report.unknown_fields == unknown and all(field in str(report) for field in unknown)


def rename(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = {change(key): tensor.clone() for key, tensor in load_file(path).items()}  # it maps what is overwritten
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace("base_model.model.model.", "base_model.model."),
        lambda key: key.replace("base_model.model.model.", "base_model.model.model.language_model."),
        lambda key: key.replace("base_model.model.model.", "model.text_model.encoder."),
        lambda key: key.replace(".weight", ".default.weight"),
    ],
)
def test_leading_parts_that_differ_are_exchanged_and_reported(change, tmp_path):
    model = save(llama, tmp_path / "a", target_modules=["q_proj", "down_proj"])
    rename(tmp_path / "a", change)
    loaded = llama()
    report = lowrank.load_adapter(loaded, tmp_path / "a")
    assert torch.equal(answer(loaded), answer(model))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert (report.renamed is not None) == (parse(change(key)).path != parse(key).path)


def test_an_adapter_of_the_body_goes_onto_the_whole_and_back(tmp_path):
    model = save(llama, tmp_path / "whole", target_modules=["q_proj"])
    body = llama().model
    with pytest.warns(lowrank.LowrankWarning, match="made for a LlamaForCausalLM, this is a LlamaModel"):
        report = lowrank.load_adapter(body, tmp_path / "whole")
    assert report.renamed == "model. → (nothing)"
    lowrank.save_adapter(body, tmp_path / "body")
    again = llama()
    with pytest.warns(lowrank.LowrankWarning, match="made for a LlamaModel"):
        lowrank.load_adapter(again, tmp_path / "body")
    assert torch.equal(answer(again), answer(model))


def test_names_that_could_mean_two_places_are_not_guessed():
    model = ["encoder.0.q", "encoder.1.q", "decoder.0.q", "decoder.1.q"]
    assert find_renaming(["0.q", "1.q"], model)("0.q") == "0.q"
    assert find_renaming(["old.encoder.0.q"], model)("old.encoder.0.q") == "encoder.0.q"
    assert find_renaming(["encoder.2.q"], model)("encoder.2.q") == "encoder.2.q"
    assert find_renaming(["encoder.0.q", "other.q"], model)("other.q") == "other.q"


def test_a_merged_linear_of_loralib_is_the_parts_it_says(tmp_path):
    """The oracle multiplies out B_i·A_i and puts it on the rows of part i of GPT-2's c_attn."""
    torch.manual_seed(5)
    tensors = {}
    for layer in (0, 1):
        tensors[f"transformer.h.{layer}.attn.c_attn.lora_A"] = torch.randn(4, 16)
        tensors[f"transformer.h.{layer}.attn.c_attn.lora_B"] = torch.randn(32, 2)
        tensors[f"transformer.h.{layer}.mlp.c_fc.lora_A"] = torch.randn(2, 16)
        tensors[f"transformer.h.{layer}.mlp.c_fc.lora_B"] = torch.randn(64, 2)
        tensors[f"transformer.h.{layer}.mlp.c_fc.bias"] = torch.randn(64)
    tensors["transformer.wte.lora_A"], tensors["transformer.wte.lora_B"] = torch.randn(3, 32), torch.randn(16, 3)
    torch.save(tensors, tmp_path / "lora.bin")

    model, dense = gpt2(), gpt2()
    report = load_loralib(model, tmp_path / "lora.bin", alpha=5, allow_pickle=True)
    assert len(report.modules) == 5
    with torch.no_grad():
        for layer, block in enumerate(dense.transformer.h):
            a = tensors[f"transformer.h.{layer}.attn.c_attn.lora_A"]
            b = tensors[f"transformer.h.{layer}.attn.c_attn.lora_B"]
            block.attn.c_attn.weight[:, 0:16] += 5 / 2 * (b[:16] @ a[:2]).t()
            block.attn.c_attn.weight[:, 32:48] += 5 / 2 * (b[16:] @ a[2:]).t()
            a, b = (tensors[f"transformer.h.{layer}.mlp.c_fc.lora_{x}"] for x in "AB")
            block.mlp.c_fc.weight += 5 / 2 * (b @ a).t()
            block.mlp.c_fc.bias.copy_(tensors[f"transformer.h.{layer}.mlp.c_fc.bias"])
        table = tensors["transformer.wte.lora_B"] @ tensors["transformer.wte.lora_A"]
        untied = dense.transformer.wte.weight + 5 / 3 * table.t()
        dense.transformer.wte.weight = torch.nn.Parameter(untied)  # the head keeps the table it shared
    torch.testing.assert_close(answer(model), answer(dense), rtol=1e-4, atol=1e-3)

    lowrank.save_adapter(model, tmp_path / "a", scales="own")
    again = gpt2()
    lowrank.load_adapter(again, tmp_path / "a")
    assert torch.equal(answer(again), answer(model))
    parts = again.transformer.h[0].attn.c_attn.factors("default").parts
    assert parts == part_rows("transformer.h.0.attn.c_attn", 48, ("q", "v"), again.config)
    assert "transformer.h.0.attn.c_attn[q,v]" in lowrank.adapter_configs(again)["default"].target_modules


def test_the_fingerprint_of_a_base_is_of_what_lasts():
    model, same, other = llama(), llama(), llama()
    same.config._name_or_path, same.config.use_cache = "elsewhere", False
    same.to(torch.bfloat16)
    other.config.rms_norm_eps = 0.5
    assert fingerprint(model) == fingerprint(same) != fingerprint(other)
    assert fingerprint(model).differences(fingerprint(other)) != []
    assert config_digest(None) is None and config_digest({"a": object()}) == config_digest({"a": object()})


# Laws

words = st.text("abq_01", min_size=1, max_size=3)
paths = st.lists(words, min_size=1, max_size=4).map(".".join)
ranks, alphas = st.integers(1, 64), st.floats(0.01, 300, allow_nan=False)


@given(paths, st.sampled_from(ROLES), words, st.booleans())
def test_keys_mean_what_they_were_made_for(path, role, name, adapted):
    key = parse(low_rank_key(path, role))
    assert (key.path, key.role) == (path, role)
    key = parse(full_key(path, name, adapted=adapted))
    assert (key.path, key.role, key.name, key.of_base) == (path, None, name, adapted)


@given(st.dictionaries(paths, st.tuples(ranks, alphas), min_size=1, max_size=6), st.booleans())
def test_a_described_config_gives_every_module_its_rank_and_its_very_scale(modules, rslora):
    """Read as PEFT reads it: the first key that is a regex for the end of the path."""
    wanted = {path: (rank, lora_scale(alpha, rank, rslora)) for path, (rank, alpha) in modules.items()}
    config = describe(wanted, rslora)
    for path, (rank, scale) in wanted.items():
        got = pattern_value(path, config.rank_pattern, config.r, "rank_pattern")
        alpha = pattern_value(path, config.alpha_pattern, config.lora_alpha, "alpha_pattern")
        assert got == rank
        assert math.isclose(lora_scale(alpha, got, rslora), scale, rel_tol=1e-15)


@given(ranks, st.integers(1, 512), st.booleans())
def test_whole_alphas_stay_whole(rank, alpha, rslora):
    found = exact_alpha(lora_scale(alpha, rank, rslora), rank, rslora)
    assert found == alpha and isinstance(found, int)


@given(st.sets(paths, min_size=1, max_size=8), st.data())
def test_target_names_mean_exactly_the_adapted(every, data):
    adapted = data.draw(st.sets(st.sampled_from(sorted(every)), min_size=1))
    names = target_names(adapted, every)
    if isinstance(names, str):
        found = {path for path in every if re.fullmatch(names, path)}
    else:
        found = {path for path in every if any(path == name or path.endswith("." + name) for name in names)}
    assert found == adapted
    assert {path for path in every if re.match(rf"(.*\.)?({exact_key(min(adapted), every)})$", path)} == {min(adapted)}


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["linear", "conv1d-linear", "embedding", "conv"]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_a_layout_and_back_is_the_identity(kind, rank, width, kernel, groups):
    groups = groups if kind == "conv" else 1
    weight = (2 * groups, width, *kernel) if kind == "conv" else (4, width)
    d, k = (weight[1], weight[0]) if kind in ("conv1d-linear", "embedding") else (weight[0], math.prod(weight[1:]))
    a, b = torch.randn(rank, k), torch.randn(d, rank)
    stored = to_file(kind, a, b, weight, groups)
    assert tuple(tuple(t.shape) for t in stored) == wanted_shapes(kind, weight, rank * groups, groups)
    again = from_file(kind, *stored, weight)
    assert torch.equal(again[0], a) and torch.equal(again[1], b)


def test_groups_with_an_a_each_are_stacked():
    """The change as a kernel, group by group, is the oracle."""
    torch.manual_seed(0)
    own = torch.randn(3, 2, 4, 5)  # 3 groups, rank 2 each, 4 channels, kernel 5
    a = torch.zeros(6, 12, 5)
    for g in range(3):
        a[2 * g : 2 * g + 2, 4 * g : 4 * g + 4] = own[g]
    b = torch.randn(9, 2, 1)
    flat_a, flat_b = from_file("conv", a, b, (9, 4, 5))
    change = (flat_b @ flat_a).view(9, 4, 5)
    for row in range(9):
        torch.testing.assert_close(change[row], torch.einsum("r,rck->ck", b[row, :, 0], own[row // 3]))
    assert LoraFactors(flat_a, flat_b, 1.0).rank == 6


def test_a_head_that_peft_would_take_along_is_in_the_file(tmp_path):
    """PEFT matches `modules_to_save` by any ending: `classifier` takes DistilBERT's pre_classifier too."""
    from peft import PeftModel
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    def make():
        torch.manual_seed(0)
        config = DistilBertConfig(dim=16, hidden_dim=24, n_layers=1, n_heads=4, vocab_size=32)
        return DistilBertForSequenceClassification(config).eval()

    model = save(make, tmp_path / "a", target_modules=["q_lin"], modules_to_save=["classifier"])
    theirs = PeftModel.from_pretrained(make(), tmp_path / "a").eval()
    torch.testing.assert_close(answer(theirs), answer(model), rtol=1e-5, atol=1e-5)
