"""Combining adapters of real models from their files: what comes out is what the sum of the merged models says."""

import json
import math

import pytest
import torch

import lowrank
from checkpoint_models import answer, bert, convolutions, disturb, gpt2, llama
from combination_oracle import truncated
from lowrank import LoraConfig
from lowrank.adapters.combine import combine_adapters
from lowrank.core.combination import METHODS, Options, Term
from lowrank.errors import CheckpointError, ConfigError, LowrankError, MergeError

FIRST = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]}
SECOND = {"r": 5, "lora_alpha": 2, "use_rslora": True, "target_modules": ["v_proj", "down_proj"]}
CASES = {
    "llama": (llama, FIRST, SECOND),
    "patterns": (
        llama,
        FIRST | {"rank_pattern": {"layers.1.self_attn.v_proj": 2}, "alpha_pattern": {"q_proj": 1.5}},
        SECOND | {"layers_to_transform": [1]},
    ),
    "embedding": (llama, FIRST | {"target_modules": ["embed_tokens", "q_proj"]}, SECOND),
    "gpt2": (gpt2, FIRST | {"target_modules": ["c_attn", "c_proj"]}, SECOND | {"target_modules": ["c_fc", "wte"]}),
    "fused": (gpt2, FIRST | {"target_modules": ["c_attn[q,v]"]}, SECOND | {"target_modules": ["c_attn[k]"]}),
    "conv": (
        convolutions,
        FIRST | {"target_modules": ["one", "two", "three"]},
        SECOND | {"target_modules": ["two", "head"]},
    ),
}


def make(build, folder, seed, **config):
    """An adapter of a fresh model with trained-looking values, saved."""
    model = build()
    lowrank.inject(model, LoraConfig(**config))
    disturb(model, seed=seed)
    lowrank.save_adapter(model, folder)
    return folder


def merged_state(build, folder):
    model = build().double()
    lowrank.load_adapter(model, folder)
    return lowrank.merge_and_unload(model).state_dict()


def expected_model(build, weighted):
    """W0 + Σ w·(W_i − W0) over every tensor of the model, in float64."""
    model = build().double()
    if hasattr(model, "lm_head"):  # an adapted table that is shared changes in one of its two places only
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = [(merged_state(build, folder), weight) for folder, weight in weighted]
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(base[name] + sum(weight * (state[name] - base[name]) for state, weight in states))
    return model


def by_peft(build, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(build().double(), folder, autocast_adapter_dtype=False).eval()


def by_us(build, folder):
    model = build().double()
    lowrank.load_adapter(model, folder)
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["linear", "cat"])
def test_the_sum_is_exact_and_peft_answers_alike(tmp_path, case, method):
    build, first, second = CASES[case]
    weighted = [
        (make(build, tmp_path / "one", 1, **first), 0.7),
        (make(build, tmp_path / "two", 2, **second), -0.4),
        (make(build, tmp_path / "three", 3, **first), 1.3),
    ]
    report = combine_adapters(weighted, tmp_path / "out", method=method)
    wanted = answer(expected_model(build, weighted).float())
    difference = (answer(by_us(build, tmp_path / "out").float()) - answer(build())).abs().max()
    assert difference > 0.05  # the adapters do something, or nothing is tested
    assert torch.allclose(answer(by_us(build, tmp_path / "out").float()), wanted, atol=2e-5)
    assert torch.allclose(answer(by_peft(build, tmp_path / "out").float()), wanted, atol=2e-5)
    assert report.kept == 1.0


def test_a_module_that_one_adapter_has_comes_from_that_one(tmp_path):
    weighted = [
        (make(llama, tmp_path / "one", 1, **FIRST), 0.5),
        (make(llama, tmp_path / "two", 2, **SECOND), 2.0),
    ]
    report = combine_adapters(weighted, tmp_path / "out", rank=4)
    ranks = {module.path: module.ranks for module in report.modules}
    assert ranks["model.layers.0.self_attn.q_proj"] == (3,)
    assert ranks["model.layers.0.self_attn.v_proj"] == (3, 5)
    assert ranks["model.layers.1.mlp.down_proj"] == (5,)
    assert {module.rank for module in report.modules} == {3, 4}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]


def test_compressed_to_a_rank_every_module_is_the_best_one_and_the_report_is_true(tmp_path):
    weighted = [
        (make(llama, tmp_path / "one", 1, **FIRST), 0.5),
        (make(llama, tmp_path / "two", 2, **FIRST), 2.0),
    ]
    report = combine_adapters(weighted, tmp_path / "out", rank=2)
    whole, result, base = expected_model(llama, weighted), by_us(llama, tmp_path / "out"), llama().double()
    result = lowrank.merge_and_unload(result).requires_grad_(False)
    whole.requires_grad_(False)
    for module in report.modules:
        wanted, got, start = (m.get_submodule(module.path).weight for m in (whole, result, base))
        best = truncated(wanted - start, 2)
        assert torch.allclose(got - start, best, atol=1e-6)
        kept = float(best.square().sum() / (wanted - start).square().sum())
        assert module.kept == pytest.approx(kept, abs=1e-6)
        assert kept < 0.999
    energies = [(module.norm**2, module.kept) for module in report.modules]
    assert report.kept == pytest.approx(sum(n * k for n, k in energies) / sum(n for n, _ in energies))


@pytest.mark.parametrize("method", ["svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_every_method_gives_a_folder_that_peft_loads(tmp_path, method):
    weighted = [
        (make(llama, tmp_path / "one", 1, **FIRST), 0.5),
        (make(llama, tmp_path / "two", 2, **SECOND), 2.0),
    ]
    density = None if method == "svd" else 0.4
    combine_adapters(weighted, tmp_path / "out", method=method, density=density, seed=3)
    combine_adapters(weighted, tmp_path / "again", method=method, density=density, seed=3)
    ours = answer(by_us(llama, tmp_path / "out"))
    assert torch.allclose(ours, answer(by_peft(llama, tmp_path / "out")), atol=1e-9)
    for name in ("adapter_model.safetensors", "adapter_config.json", "lowrank.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_adapters_that_peft_saved_combine_too(tmp_path):
    import peft

    weighted = []
    for number, config in enumerate([FIRST, SECOND]):
        model = peft.get_peft_model(llama(), peft.LoraConfig(**config, init_lora_weights=False))
        model.save_pretrained(tmp_path / str(number))
        weighted.append((tmp_path / str(number), 0.8 - number))
    combine_adapters(weighted, tmp_path / "out")
    wanted = answer(expected_model(llama, weighted).float())
    assert torch.allclose(answer(by_peft(llama, tmp_path / "out").float()), wanted, atol=2e-5)


def test_tensors_in_full_are_averaged(tmp_path):
    config = {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": ["query"],
        "modules_to_save": ["classifier"],
        "bias": "lora_only",
    }
    weighted = [(make(bert, tmp_path / "one", 1, **config), 0.25), (make(bert, tmp_path / "two", 2, **config), 0.75)]
    combine_adapters(weighted, tmp_path / "out")
    wanted = answer(expected_model(bert, weighted).float())
    assert torch.allclose(answer(by_us(bert, tmp_path / "out").float()), wanted, atol=2e-5)
    assert torch.allclose(answer(by_peft(bert, tmp_path / "out").float()), wanted, atol=2e-5)
    with pytest.raises(MergeError, match="weights that sum to 1"):
        combine_adapters([(tmp_path / "one", 1.0), (tmp_path / "two", 1.0)], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_one_adapter_alone_can_be_weighted(tmp_path):
    weighted = [(make(llama, tmp_path / "one", 1, **SECOND), -1.5)]
    combine_adapters(weighted, tmp_path / "out")
    wanted = answer(expected_model(llama, weighted).float())
    assert torch.allclose(answer(by_us(llama, tmp_path / "out").float()), wanted, atol=2e-5)


def test_the_result_says_where_it_belongs(tmp_path):
    weighted = [(make(llama, tmp_path / str(n), n, **FIRST), 1.0) for n in range(2)]
    report = combine_adapters(weighted, tmp_path / "out", rank=3)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
    assert "LlamaForCausalLM" in (tmp_path / "out" / "lowrank.json").read_text()
    assert "4 modules at rank 3" in str(report)
    assert f"{report.kept:.4%} of the energy" in str(report)


def test_wrong_calls_are_one_sentence_and_leave_nothing(tmp_path):
    one = make(llama, tmp_path / "one", 1, **FIRST)
    calls = {
        "no adapter is given": {"adapters": []},
        "choose one of linear": {"method": "sum"},
        "rank must be a whole number": {"rank": 0},
        "leave rank out": {"method": "cat", "rank": 3},
        "needs a density": {"method": "ties"},
        "takes no density": {"density": 0.5},
        "share above 0": {"method": "ties", "density": 1.5},
        "must be a finite number other than 0": {"adapters": [(one, math.nan)]},
        "is the adapter .* itself": {"out": one},
        "there is no folder": {"adapters": [(tmp_path / "nowhere", 1.0)]},
    }
    for message, call in calls.items():
        arguments = {"adapters": [(one, 1.0)], "out": tmp_path / "out"} | call
        with pytest.raises(LowrankError, match=message) as caught:
            combine_adapters(arguments.pop("adapters"), arguments.pop("out"), **arguments)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, ConfigError | CheckpointError)
        assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_belong_together_are_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    def wider():
        return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=24, num_hidden_layers=2, vocab_size=32))

    one = make(llama, tmp_path / "one", 1, **FIRST)
    other = make(wider, tmp_path / "wider", 1, **FIRST)
    with pytest.raises(MergeError, match="has another shape in each adapter"):
        combine_adapters([(one, 1.0), (other, 1.0)], tmp_path / "out")
    dora = make(llama, tmp_path / "dora", 1, **FIRST, use_dora=True)
    with pytest.raises(MergeError, match="DoRA"):
        combine_adapters([(one, 1.0), (dora, 1.0)], tmp_path / "out")
    biased = make(bert, tmp_path / "biased", 1, r=2, target_modules=["query"], bias="lora_only")
    plain = make(bert, tmp_path / "plain", 1, r=2, target_modules=["query"])
    with pytest.raises(MergeError, match="bias"):
        combine_adapters([(biased, 0.5), (plain, 0.5)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_a_moved_base_is_refused(tmp_path):
    import peft

    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "pissa")
    with pytest.raises(CheckpointError, match="trained from pissa on a base that this changed"):
        combine_adapters([(tmp_path / "pissa", 1.0)], tmp_path / "out")


@pytest.mark.parametrize("method", ["svd", "ties", "magnitude_prune", "linear"])
def test_how_the_methods_relate_to_pefts(method):
    """PEFT's methods on ΔW are ours where its second scale is 1 and the weights are equal; its linear is not."""
    import peft
    from torch import nn

    model = nn.Sequential()
    model.add_module("layer", nn.Linear(12, 10, bias=False))
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["layer"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name="one")
    wrapped.add_adapter("two", config)
    theirs = method if method in ("svd", "linear") else f"{method}_svd"
    wrapped.add_weighted_adapter(["one", "two"], [0.7, 0.7], "sum", combination_type=theirs, density=0.5, svd_rank=10)
    layer = wrapped.base_model.model.layer
    pairs = [(layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()) for name in ("one", "two")]
    ours = METHODS[method]([Term(a, b, 0.7) for a, b in pairs], Options(rank=10, density=0.5))
    delta = layer.get_delta_weight("sum").detach()
    apart = float((delta - ours.b @ ours.a).norm() / delta.norm())
    if method == "linear":  # its cross terms B_1·A_2 and B_2·A_1
        (a1, b1), (a2, b2) = pairs
        assert torch.allclose(delta, 0.7 * (b1 + b2) @ (a1 + a2), atol=1e-5)
        assert apart > 0.3
    else:
        assert apart < 1e-5
