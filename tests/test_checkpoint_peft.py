"""PEFT reads what we save and we read what PEFT saves, with the same answers: real PEFT is the oracle."""

import json

import pytest
import torch
from safetensors.torch import load_file

import lowrank
from checkpoint_models import (
    answer,
    bert,
    contents,
    convolutions,
    disturb,
    disturb_peft,
    gpt2,
    llama,
    mixtral,
    silence,
    t5,
    vit,
)
from lowrank import LoraConfig

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CASES = {
    "llama": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "llama-all-linear": (llama, {"target_modules": "all-linear"}),
    "llama-one-layer": (llama, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "llama-regex": (llama, {"target_modules": r"model\.layers\.0\.self_attn\.[qk]_proj"}),
    "llama-rslora": (llama, {"target_modules": ["q_proj", "o_proj"], "use_rslora": True}),
    "llama-patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 5},
            "alpha_pattern": {"v_proj": 4, "layers.0.mlp.up_proj": 3.5},
        },
    ),
    "llama-rslora-patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": True,
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"1.self_attn.q_proj": 5},
        },
    ),
    "llama-dora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "llama-embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama-saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "mixtral": (mixtral, {"target_modules": ["q_proj", "v_proj"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2-dora": (gpt2, {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "gpt2-lora-only": (gpt2, {"target_modules": ["c_fc"], "bias": "lora_only", "fan_in_fan_out": True}),
    "bert": (bert, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "bert-no-head": (bert, {"target_modules": ["query"]}),
    "bert-bias-all": (bert, {"target_modules": ["query", "output.dense"], "bias": "all"}),
    "bert-lora-only": (bert, {"target_modules": ["key"], "bias": "lora_only", "modules_to_save": ["pooler"]}),
    "bert-embedding": (bert, {"target_modules": ["word_embeddings", "position_embeddings"]}),
    "t5": (t5, {"target_modules": ["q", "v", "wo"]}),
    "vit": (vit, {"target_modules": ["projection", "query", "v_proj", "q_proj"], "modules_to_save": ["classifier"]}),
    "conv": (convolutions, {"target_modules": ["one", "three", "head"], "modules_to_save": ["norm"]}),
}


def configs(case):
    """The model's maker, our config and PEFT's for one case; alpha is never r."""
    import peft

    make, options = CASES[case]
    if make is vit:  # transformers has renamed its projections once
        names = {name.rpartition(".")[2] for name, _ in make().named_modules()}
        options = options | {"target_modules": [name for name in options["target_modules"] if name in names]}
    ours = {key: value for key, value in options.items() if key != "fan_in_fan_out"}
    shared = {"r": 3, "lora_alpha": 7}
    return make, LoraConfig(**shared, **ours), peft.LoraConfig(**shared, **options, init_lora_weights=False)


@pytest.mark.parametrize("case", CASES)
def test_peft_gives_our_answers(case, tmp_path):
    from peft import PeftModel

    make, ours, _ = configs(case)
    model = make()
    lowrank.inject(model, ours)
    disturb(model)
    lowrank.save_adapter(model, tmp_path / "a")
    with silence():
        theirs = PeftModel.from_pretrained(make(), tmp_path / "a").eval()
    torch.testing.assert_close(answer(theirs), answer(model), **CLOSE)
    assert not torch.allclose(answer(make()), answer(model), atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_we_give_pefts_answers(case, tmp_path):
    from peft import get_peft_model

    make, _, config = configs(case)
    torch.manual_seed(3)
    theirs = disturb_peft(get_peft_model(make(), config)).eval()
    theirs.save_pretrained(tmp_path / "a")
    model = make()
    with silence():
        report = lowrank.load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(answer(model), answer(theirs), **CLOSE)
    assert not torch.allclose(answer(make()), answer(model), atol=1e-3)
    assert report.unknown_fields == () and report.renamed is None and not report.changes_nothing


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saved_goes_through_us_unchanged(case, tmp_path):
    """Every tensor PEFT wrote is in our file, under the same key and with the same bits, and PEFT takes it back.

    Where modules differ in scale, that is so for `scales="own"`; tests/test_one_scale.py has the other way.
    """
    from peft import PeftModel, get_peft_model

    make, _, config = configs(case)
    torch.manual_seed(3)
    theirs = disturb_peft(get_peft_model(make(), config)).eval()
    theirs.save_pretrained(tmp_path / "a")
    model = make()
    lowrank.load_adapter(model, tmp_path / "a")
    lowrank.save_adapter(model, tmp_path / "b", scales="own")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    tables = {key for key in before if key.endswith("base_layer.weight")}  # PEFT's copies of the base's own tables
    assert before.keys() - tables == after.keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    with silence():
        again = PeftModel.from_pretrained(make(), tmp_path / "b").eval()
    torch.testing.assert_close(answer(again), answer(theirs), **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_load_after_save_is_the_identity(case, tmp_path):
    make, ours, _ = configs(case)
    model = make()
    lowrank.inject(model, ours)
    disturb(model)
    lowrank.save_adapter(model, tmp_path / "a", scales="own")
    loaded = make()
    lowrank.load_adapter(loaded, tmp_path / "a")
    assert torch.equal(answer(loaded), answer(model))
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    lowrank.save_adapter(loaded, tmp_path / "b", scales="own")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora"])
@pytest.mark.parametrize("selectors", [["c_attn[q,v]"], ["c_attn[k]", "c_fc"]])
def test_parts_and_starts_are_padded_for_peft_and_come_back_as_they_were(selectors, init, rslora, tmp_path):
    from peft import PeftModel

    model = gpt2()
    config = LoraConfig(r=3, lora_alpha=7, target_modules=selectors, init_lora_weights=init, use_rslora=rslora)
    lowrank.inject(model, config)
    torch.testing.assert_close(answer(model), answer(gpt2()), rtol=0, atol=0)
    disturb(model)
    lowrank.save_adapter(model, tmp_path / "a")
    with silence():
        theirs = PeftModel.from_pretrained(gpt2(), tmp_path / "a").eval()
    torch.testing.assert_close(answer(theirs), answer(model), **CLOSE)

    loaded = gpt2()
    lowrank.load_adapter(loaded, tmp_path / "a")
    state = loaded.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert lowrank.adapter_configs(loaded)["default"].r == 3
    assert torch.equal(answer(loaded), answer(model))

    (tmp_path / "a" / "lowrank.json").unlink()
    plain = gpt2()
    lowrank.load_adapter(plain, tmp_path / "a")
    torch.testing.assert_close(answer(plain), answer(model), **CLOSE)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pefts_unconverted_pissa_loads_onto_the_base_it_never_saw(init, tmp_path):
    """PEFT saves such an adapter for a base from which it took the start off; we load it onto the base as it is."""
    import peft

    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"], init_lora_weights=init)
    theirs = disturb_peft(peft.get_peft_model(llama(), config)).eval()
    theirs.save_pretrained(tmp_path / "a")
    model = llama()
    report = lowrank.load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(answer(model), answer(theirs), rtol=1e-4, atol=1e-5)
    assert any(init in note for note in report.notes)
    lowrank.save_adapter(model, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "b").eval()
    torch.testing.assert_close(answer(again), answer(theirs), rtol=1e-4, atol=1e-5)


def test_a_grouped_convolution_goes_to_peft_and_back(tmp_path):
    from peft import PeftModel

    model = convolutions()
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=7, target_modules=["two", "one"]))
    disturb(model)
    lowrank.save_adapter(model, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert tensors["base_model.model.two.lora_A.weight"].shape == (6, 6, 3, 3)
    assert tensors["base_model.model.two.lora_B.weight"].shape == (9, 2, 1, 1)
    theirs = PeftModel.from_pretrained(convolutions(), tmp_path / "a").eval()
    torch.testing.assert_close(answer(theirs), answer(model), **CLOSE)
    loaded = convolutions()
    lowrank.load_adapter(loaded, tmp_path / "a")
    assert torch.equal(answer(loaded), answer(model))


def test_a_grouped_convolution_of_peft_loads_only_where_it_keeps_its_groups_apart(tmp_path):
    import peft

    config = peft.LoraConfig(r=6, lora_alpha=7, target_modules=["two"], init_lora_weights=False)
    theirs = peft.get_peft_model(convolutions(), config).eval()
    theirs.save_pretrained(tmp_path / "mixed")
    with pytest.raises(lowrank.LowrankError, match=r"two.lora_A mixes the channels of the convolution's 3 groups"):
        lowrank.load_adapter(convolutions(), tmp_path / "mixed")

    kernel = theirs.base_model.model.two.lora_A["default"].weight
    with torch.no_grad():
        kernel.mul_(torch.block_diag(*[torch.ones(2, 2)] * 3)[:, :, None, None])  # each group its own A
    theirs.save_pretrained(tmp_path / "apart")
    model = convolutions()
    lowrank.load_adapter(model, tmp_path / "apart")
    torch.testing.assert_close(answer(model), answer(theirs), **CLOSE)
    lowrank.save_adapter(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(convolutions(), tmp_path / "again").eval()
    torch.testing.assert_close(answer(again), answer(theirs), **CLOSE)


def test_targets_are_exactly_the_adapted_modules(tmp_path):
    """`lin` would also end `inner.lin`: PEFT must adapt one and not the other, each at its own scale."""
    from peft import PeftModel
    from torch import nn

    def make():
        torch.manual_seed(0)
        inner = nn.Sequential()
        inner.add_module("lin", nn.Linear(6, 6))
        model = nn.Sequential()
        model.add_module("lin", nn.Linear(6, 6))
        model.add_module("inner", inner)
        return model

    x = torch.randn(4, 6)
    for targets, alphas in ((["inner.lin"], {}), (["lin"], {"^lin": 3}), ("lin", {})):
        model = make()
        lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, target_modules=targets, alpha_pattern=alphas))
        disturb(model)
        lowrank.save_adapter(model, tmp_path / "a")
        theirs = PeftModel.from_pretrained(make(), tmp_path / "a").eval()
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-6)
        adapted = {path for path, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
        assert adapted == {path for path, module in model.named_modules() if hasattr(module, "adapter_names")}


def test_the_table_of_a_resized_embedding_comes_along(tmp_path):
    """PEFT saves the base table beside an adapted embedding; where it is another one than ours, it counts."""
    import peft

    theirs = llama()
    with torch.no_grad():
        theirs.get_input_embeddings().weight[5:].add_(1.0)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["embed_tokens"], init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "a")
    model = llama()
    lowrank.load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(answer(model), answer(theirs), **CLOSE)
    merged = lowrank.merge_and_unload(model)
    torch.testing.assert_close(answer(merged), answer(theirs), rtol=1e-4, atol=1e-5)


def test_several_adapters_are_saved_one_by_one(tmp_path):
    from peft import PeftModel

    model = llama()
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]), "one")
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "o_proj"]), "two")
    for name in ("one", "two"):
        disturb(model, name)
        lowrank.save_adapter(model, tmp_path / name, name)
        lowrank.set_active(model, [name])
        theirs = PeftModel.from_pretrained(llama(), tmp_path / name).eval()
        torch.testing.assert_close(answer(theirs), answer(model), **CLOSE)
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]


def test_auto_model_and_config_of_peft_find_their_way(tmp_path):
    from peft import PeftConfig

    model = bert()
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=["query"], modules_to_save=["classifier"]))
    lowrank.save_adapter(model, tmp_path / "head")
    assert PeftConfig.from_pretrained(tmp_path / "head").task_type == "SEQ_CLS"
    model = bert()
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=["query"]))
    lowrank.save_adapter(model, tmp_path / "bare")
    config = PeftConfig.from_pretrained(tmp_path / "bare")
    assert config.task_type is None  # PEFT would demand the head's tensors, which are not in the file
    assert config.auto_mapping["base_model_class"] == "BertForSequenceClassification"
