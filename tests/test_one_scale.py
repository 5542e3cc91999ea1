"""An adapter's config is true for those who read one `r` and one `lora_alpha` of it and no patterns."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import lowrank
from checkpoint_models import answer, contents, disturb, gpt2, llama
from lowrank import LoraConfig
from lowrank.adapters.combine import combine_adapters
from lowrank.adapters.proposal import adapter_spectra, propose
from lowrank.adapters.resize import resize_adapter
from lowrank.checkpoint.keys import A, B, parse
from lowrank.checkpoint.one_scale import common_scale, folded
from lowrank.injection.adapters import lora_layers

MIXED_RANKS = {"rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 5}}
CASES = {
    "uniform": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "rslora": (llama, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "ranks": (llama, {"target_modules": ["q_proj", "v_proj"], **MIXED_RANKS}),
    "rslora and ranks": (llama, {"target_modules": ["q_proj", "v_proj"], **MIXED_RANKS, "use_rslora": True}),
    "alphas": (llama, {"target_modules": ["q_proj", "up_proj"], "alpha_pattern": {"up_proj": 2, "0.mlp.up_proj": -5}}),
    "pissa": (llama, {"target_modules": ["q_proj", "v_proj"], **MIXED_RANKS, "init_lora_weights": "pissa"}),
    "parts": (gpt2, {"target_modules": ["c_attn[q,v]", "c_fc"], "use_rslora": True}),
}
SAME_RANK = ("uniform", "rslora", "alphas")


def make(case, folder, **options):
    build, config = CASES[case]
    model = build()
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, **config))
    disturb(model)
    lowrank.save_adapter(model, folder, **options)
    return build, model


def by_vllm_before_0_32(config, _rank):
    """lora/peft_helper.py: one factor for the whole adapter, from three fields of its config."""
    r, alpha = config["r"], config["lora_alpha"]
    return alpha / math.sqrt(r) if config["use_rslora"] else alpha / r


def by_llama_cpps_converter(config, rank):
    """convert_lora_to_gguf.py takes lora_alpha alone, and the loader divides it by the rank of the tensor."""
    return config["lora_alpha"] / rank


@torch.no_grad()
def read_by(scaling, build, folder):
    """The base with W0 + s·B·A in every adapted module, s as `scaling` finds it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        pairs.setdefault(parse(key).path, {})[parse(key).role] = tensor.double()
    model = build().double()
    for path, pair in pairs.items():
        weight = model.get_submodule(path).weight
        delta = scaling(config, pair[A].shape[0]) * pair[B] @ pair[A]
        weight += delta if isinstance(model.get_submodule(path), nn.Linear) else delta.t()
    return model


def assert_same(got, wanted):
    torch.testing.assert_close(answer(got), answer(wanted.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_who_ignores_the_patterns_computes_our_change(case, tmp_path):
    build, model = make(case, tmp_path / "a")
    assert_same(read_by(by_vllm_before_0_32, build, tmp_path / "a"), model)
    assert (answer(build()) - answer(model)).abs().max() > 0.05
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    ranks = {layer.factors("default").effective_rank for _, layer in lora_layers(model)}
    assert config["r"] == max(ranks), "vLLM holds r alone against its max_lora_rank"


@pytest.mark.parametrize("case", SAME_RANK)
def test_so_does_who_divides_by_the_rank_of_the_tensor_where_ranks_are_equal(case, tmp_path):
    build, model = make(case, tmp_path / "a")
    assert_same(read_by(by_llama_cpps_converter, build, tmp_path / "a"), model)


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_it_by_the_patterns(case, tmp_path):
    from peft import PeftModel

    build, model = make(case, tmp_path / "a")
    theirs = PeftModel.from_pretrained(build(), tmp_path / "a").eval()
    torch.testing.assert_close(answer(theirs), answer(model), rtol=1e-5, atol=1e-5)


def test_so_do_adapters_made_of_adapters(tmp_path):
    for number, case in enumerate(("ranks", "rslora and ranks", "alphas")):
        make(case, tmp_path / str(number))
    parts = [(tmp_path / str(number), weight) for number, weight in enumerate((0.7, -0.4, 1.3))]
    combine_adapters(parts, tmp_path / "combined")
    resize_adapter(tmp_path / "1", tmp_path / "resized", energy=0.9)
    wanted = {"combined": llama(), "resized": llama()}
    for name, model in wanted.items():
        lowrank.load_adapter(model, tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["rank_pattern"], "with one rank for all there is nothing to test"
        assert_same(read_by(by_vllm_before_0_32, llama, tmp_path / name), model)


def test_so_does_an_adapter_of_proposed_ranks(tmp_path):
    make("alphas", tmp_path / "in")
    ranks = propose(adapter_spectra(tmp_path / "in"), rank=2).config()
    assert ranks.rank_pattern
    model = llama()
    lowrank.inject(model, LoraConfig(**ranks._asdict(), target_modules=["q_proj", "up_proj"]))
    disturb(model)
    lowrank.save_adapter(model, tmp_path / "out")
    assert_same(read_by(by_vllm_before_0_32, llama, tmp_path / "out"), model)


def test_without_folding_it_would_not(tmp_path):
    build, model = make("alphas", tmp_path / "a", scales="own")
    read = read_by(by_vllm_before_0_32, build, tmp_path / "a")
    assert (answer(read) - answer(model.double())).abs().max() > 0.1


@pytest.mark.parametrize("case", CASES)
def test_loading_gives_every_module_its_own_scale_back(case, tmp_path):
    """The B of a module whose scale is not the common one may differ in the last bit, once; then nothing moves."""
    build, model = make(case, tmp_path / "a")
    loaded = build()
    lowrank.load_adapter(loaded, tmp_path / "a")
    for (_, ours), (path, back) in zip(lora_layers(model), lora_layers(loaded), strict=True):
        wanted, got = ours.factors("default"), back.factors("default")
        assert got.scale == wanted.scale, path
        assert torch.equal(got.a, wanted.a)
        torch.testing.assert_close(got.b, wanted.b, rtol=2**-23, atol=0)
    lowrank.save_adapter(loaded, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    again = build()
    lowrank.load_adapter(again, tmp_path / "b")
    state = again.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in loaded.state_dict().items())


def test_powers_of_two_are_folded_and_unfolded_bit_for_bit(tmp_path):
    model = llama()
    alphas = {"v_proj": 28, "0.self_attn.q_proj": -3.5}
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"], alpha_pattern=alphas))
    disturb(model)
    lowrank.save_adapter(model, tmp_path / "a")
    assert not json.loads((tmp_path / "a" / "adapter_config.json").read_text())["alpha_pattern"]
    loaded = llama()
    lowrank.load_adapter(loaded, tmp_path / "a")
    state = loaded.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


def test_an_alpha_changed_by_hand_counts_though_the_scale_was_remembered(tmp_path):
    build, model = make("alphas", tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"], "alpha_pattern": {}}))
    loaded = build()
    lowrank.load_adapter(loaded, tmp_path / "a")
    for (_, ours), (_, back) in zip(lora_layers(model), lora_layers(loaded), strict=True):
        a, b = back.factors("default").effective()
        wanted_a, wanted_b = ours.factors("default").effective()
        doubled = 2 * ours.factors("default").scale * wanted_b @ wanted_a
        torch.testing.assert_close(back.factors("default").scale * b @ a, doubled)


@pytest.mark.parametrize("scale", [0.0, math.inf, math.nan, 5e-324])
def test_a_remembered_scale_that_cannot_be_is_not_believed(scale, tmp_path):
    build, model = make("alphas", tmp_path / "a")
    path = tmp_path / "a" / "lowrank.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"scales": dict.fromkeys(content["scales"], scale)}))
    loaded = build()
    lowrank.load_adapter(loaded, tmp_path / "a")
    torch.testing.assert_close(answer(loaded), answer(model))


@given(st.floats(1e-3, 1e3), st.integers(-8, 8), st.integers(1, 64))
def test_a_power_of_two_is_found_behind_a_rounded_alpha(scale, exponent, rank):
    b = torch.randn(5, 3, dtype=torch.float64)
    written = scale * rank / rank
    assert torch.equal(folded(b, math.ldexp(scale, exponent), written), b * 2.0**exponent)


def test_the_common_scale_leaves_most_modules_exact():
    assert common_scale([3.0, 3.0, 5.0, 10.0, 20.0]) == 5.0
    assert common_scale([2.0, -7.0, -7.0]) == -7.0
    assert common_scale([0.0, 0.0]) == 0.0
    assert common_scale([0.0, 0.0, 3.0]) == 3.0
