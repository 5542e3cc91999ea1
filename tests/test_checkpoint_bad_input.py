"""Files that are wrong get one clear sentence, and the model stays what it was."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank
from checkpoint_models import answer, bert, contents, convolutions, disturb, gpt2, is_plain, llama, snapshot
from lowrank import LoraConfig
from lowrank.checkpoint import load_loralib
from lowrank.errors import CheckpointError, ConfigError, LowrankError, LowrankWarning

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """A sound adapter of a small Llama."""
    folder = tmp_path_factory.mktemp("sound") / "adapter"
    model = llama()
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"]))
    lowrank.save_adapter(disturb(model), folder)
    return folder


@pytest.fixture
def adapter(original, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(original, tmp_path / "adapter")


def edit_config(adapter, **fields):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(adapter, change):
    path = adapter / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}  # load_file maps what is overwritten
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(adapter, match, make=llama, **options):
    """Loading raises one sentence that matches, and nothing has changed. Returns the sentence."""
    model = make()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=match) as caught:
        lowrank.load_adapter(model, adapter, **options)
    assert is_plain(model, before) and not lowrank.adapter_configs(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    message = str(caught.value)
    assert "\n" not in message and not message.endswith(".")
    return message


def test_no_such_folder(tmp_path):
    refused(tmp_path / "nowhere", "there is no folder .*nowhere")


def test_a_file_instead_of_a_folder(adapter):
    refused(adapter / "adapter_config.json", "is not a folder")


def test_a_folder_without_a_config(tmp_path, adapter):
    message = refused(tmp_path, "is no adapter: it has no adapter_config.json")
    assert "subfolders: adapter" in message


@pytest.mark.parametrize("text", ["", "{", "not json", "[1, 2]", '"text"', "\x00\x01", "{}"])
def test_a_config_that_is_none(adapter, text):
    (adapter / "adapter_config.json").write_text(text)
    refused(adapter, "adapter_config.json")


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": 0}, "r must be a whole number"),
        ({"r": -3}, "r must be a whole number"),
        ({"r": "three"}, "r must be a whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be a finite number"),
        ({"lora_alpha": "16"}, "lora_alpha must be a finite number"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": ["q_proj"]}, "adapter_config.json"),
        ({"rank_pattern": {"q_proj[": 3}}, "rank_pattern"),
        ({"target_modules": 3}, "target_modules"),
        ({"target_modules": "q_proj["}, "target_modules"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list"),
        ({"bias": "some"}, "bias must be"),
        ({"lora_bias": True}, r"missing .*lora_B.bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_tokens_delta"),
        ({"target_parameters": 3}, "target_parameters must be a name, a regex or a list of names, not 3"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is set"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"enable_lora": [True, False, True]}, "enable_lora is set"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
    ],
)
def test_a_config_that_cannot_be_meant_or_represented(adapter, fields, match):
    edit_config(adapter, **fields)
    refused(adapter, match)


def test_no_weights(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, "no adapter_model.safetensors")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 1500, -1])
def test_truncated_weights(adapter, keep):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(adapter, "adapter_model.safetensors: .*copy")


@pytest.mark.parametrize("garbage", [b"\x00" * 64, b"\xff" * 64, b"<html>404</html>", b"version https://git-lfs\n" * 9])
def test_garbage_weights(adapter, garbage):
    (adapter / "adapter_model.safetensors").write_bytes(garbage)
    refused(adapter, "adapter_model.safetensors: ")


def test_a_pickle_is_not_opened_unless_allowed_and_then_without_code(adapter, tmp_path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    refused(adapter, "allow_pickle=True")
    model = llama()
    lowrank.load_adapter(model, adapter, allow_pickle=True)
    torch.save({"key": Bomb(tmp_path / "exploded")}, adapter / "adapter_model.bin")
    refused(adapter, "adapter_model.bin is damaged, or more than a table of tensors", allow_pickle=True)
    assert not (tmp_path / "exploded").exists()
    torch.save([tensors], adapter / "adapter_model.bin")
    refused(adapter, "holds something else than a table of tensors", allow_pickle=True)
    (adapter / "adapter_model.bin").write_bytes(b"PK\x03\x04 half a zip")
    refused(adapter, "adapter_model.bin is damaged", allow_pickle=True)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_every_missing_unexpected_and_misshaped_tensor_is_listed_at_once(adapter):
    def spoil(tensors):
        tensors.pop(f"{Q0}.lora_B.weight")
        tensors[f"{Q0}.lora_magnitude_vector"] = torch.ones(16)
        tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"] = torch.ones(3, 15)
        tensors["base_model.model.model.layers.1.self_attn.v_prof.lora_A.weight"] = torch.ones(3, 16)
        tensors["base_model.model.model.norm.scale"] = torch.ones(16)
        tensors["base_model.model.lm_head.weight"] = torch.ones(31, 16)

    edit_tensors(adapter, spoil)
    message = refused(adapter, "does not fit this LlamaForCausalLM")
    for part in (
        f"missing {Q0}.lora_B.weight",
        f"unexpected {Q0}.lora_magnitude_vector",
        "layers.1.self_attn.v_proj.lora_A.weight has shape [3, 15], wanted [3, 16]",
        "no module model.layers.1.self_attn.v_prof (nearest: model.layers.1.self_attn.v_proj",
        "unexpected base_model.model.model.norm.scale (nearest: ",
        "base_model.model.lm_head.weight has shape [31, 16], wanted [32, 16]",
    ):
        assert part in message, message


def test_an_empty_a_non_finite_and_an_integer_tensor(adapter):
    def spoil(tensors):
        tensors[f"{Q0}.lora_A.weight"] = torch.zeros(0)
        tensors[f"{Q0}.lora_B.weight"][3, 1] = float("nan")
        tensors[f"{Q0.replace('q_proj', 'v_proj')}.lora_A.weight"] = torch.ones(3, 16, dtype=torch.int64)

    edit_tensors(adapter, spoil)
    message = refused(adapter, "is empty, of shape \\[0\\]: its shards were not gathered")
    assert "lora_B.weight holds values that are not finite" in message
    assert "torch.int64, no floating-point tensor" in message
    with pytest.raises(CheckpointError, match="is empty"):
        lowrank.read_adapter(adapter)


def test_a_declared_rank_that_is_not_the_tensors(adapter):
    edit_config(adapter, r=4)
    refused(adapter, r"lora_A.weight has shape \[3, 16\], wanted \[4, 16\]")
    with pytest.raises(CheckpointError, match=r"A \[3, 16\] and B \[16, 3\], and adapter_config.json says rank 4"):
        lowrank.read_adapter(adapter)


def test_two_adapters_in_one_file(adapter):
    edit_tensors(adapter, lambda t: t.update({f"{Q0}.lora_A.other.weight": torch.ones(3, 16)}))
    refused(adapter, "holds lora_A of model.layers.0.self_attn.q_proj twice")


def test_the_weights_of_a_model_are_no_adapter(adapter):
    save_file(llama().state_dict(), adapter / "adapter_model.safetensors")
    refused(adapter, "holds no LoRA factors")


@pytest.mark.parametrize("make", [bert, gpt2, convolutions])
def test_an_adapter_for_another_base(adapter, make):
    message = refused(adapter, "does not fit this", make=make)
    assert f"it was made for a LlamaForCausalLM, this is a {type(make()).__name__}" in message


def test_an_adapter_for_a_base_of_another_depth(adapter, tmp_path):
    message = refused(adapter, "missing base_model.model.model.layers.2.self_attn.q_proj", make=lambda: llama(3))
    assert "target_modules in adapter_config.json names model.layers.2.self_attn.v_proj too" in message
    refused(adapter, r"unexpected .*layers\.1.*no module", make=lambda: llama(1))
    edit_config(adapter, layers_to_transform=[0, 1])  # which says that it is meant so
    lowrank.load_adapter(llama(3), adapter)


def test_another_head_than_the_one_saved(tmp_path):
    model = bert()
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=["query"], modules_to_save=["classifier"]))
    lowrank.save_adapter(model, tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda tensors: tensors.pop("base_model.model.classifier.bias"))
    refused(tmp_path / "a", r"missing base_model.model.classifier.bias \(modules_to_save\)", make=bert)


def test_a_base_that_only_looks_the_same_is_a_warning(adapter):
    model = llama()
    model.config.rope_theta = 5.0
    model.config.num_key_value_groups = 9
    with pytest.warns(LowrankWarning, match="config differs"):
        report = lowrank.load_adapter(model, adapter)
    assert len(report.base_differences) == 1 and report.base_differences[0] in str(report)


def test_an_adapter_that_changes_nothing_is_reported(tmp_path):
    for options in ({}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}):
        model = llama()
        lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], **options))
        lowrank.save_adapter(model, tmp_path / "a")
        fresh = llama()
        with pytest.warns(LowrankWarning, match="changes nothing"):
            report = lowrank.load_adapter(fresh, tmp_path / "a")
        assert report.changes_nothing and "changes nothing" in str(report)
        torch.testing.assert_close(answer(fresh), answer(llama()), rtol=1e-4, atol=1e-5)


def test_a_moved_magnitude_or_copy_is_a_change(tmp_path):
    for options in ({"use_dora": True}, {"modules_to_save": ["norm"]}):
        model = llama()
        lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], **options))
        with torch.no_grad():
            moved = model.model.layers[1].self_attn.q_proj.factors("default").magnitude
            (model.model.norm.weight if moved is None else moved)[2] += 0.1
        lowrank.save_adapter(model, tmp_path / "a")
        assert not lowrank.load_adapter(llama(), tmp_path / "a").changes_nothing


def test_a_taken_or_impossible_name(adapter):
    model = llama()
    lowrank.load_adapter(model, adapter)
    with pytest.raises(ConfigError, match="already has an adapter 'default'"):
        lowrank.load_adapter(model, adapter)
    with pytest.raises(ConfigError, match="adapter_name"):
        lowrank.load_adapter(model, adapter, "a/b")


def test_a_failure_while_filling_in_puts_everything_back(adapter, monkeypatch):
    """Memory may run out after the checks: the adapters there were still answer, and trained ones still train."""
    from lowrank.checkpoint import load

    model = llama()
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, target_modules=["o_proj"]), "mine")
    disturb(model, "mine")
    before, expected = snapshot(model), answer(model)

    def fail(*arguments, **options):
        load_attach(*arguments, **options)
        raise MemoryError

    load_attach = load.attach
    monkeypatch.setattr(load, "attach", fail)
    with pytest.raises(MemoryError):
        lowrank.load_adapter(model, adapter)
    assert lowrank.active_adapters(model) == ("mine",) and torch.equal(answer(model), expected)
    assert model.state_dict().keys() == before.keys()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_mine" in name for name in trained)


def test_a_damaged_companion(adapter):
    for text in ("{", "[]", '{"format": 1}', '{"format": 1, "base": 3, "fused": {}, "start": []}'):
        (adapter / "lowrank.json").write_text(text)
        refused(adapter, "lowrank.json .*delete it")
    (adapter / "lowrank.json").write_text('{"format": 99}')
    refused(adapter, "it has format 99, this version reads up to 1")
    (adapter / "lowrank.json").unlink()
    lowrank.load_adapter(llama(), adapter)


def test_a_companion_that_went_stale_is_not_believed(tmp_path):
    """PEFT may train an adapter further and save it into the same folder; our parts are then no longer true."""
    model = gpt2()
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, target_modules=["c_attn[q,v]"]))
    lowrank.save_adapter(disturb(model), tmp_path / "a")

    def train(tensors):
        for tensor in tensors.values():
            tensor.add_(0.1)

    edit_tensors(tmp_path / "a", train)
    loaded, plain = gpt2(), gpt2()
    lowrank.load_adapter(loaded, tmp_path / "a")
    (tmp_path / "a" / "lowrank.json").unlink()
    lowrank.load_adapter(plain, tmp_path / "a")
    assert torch.equal(answer(loaded), answer(plain))


# Saving


def test_a_folder_in_use_for_something_else(tmp_path):
    model = llama()
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]))
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds something that is no adapter \(thesis.tex\)"):
        lowrank.save_adapter(model, tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}
    lowrank.save_adapter(model, tmp_path, beside={"thesis.tex"})
    assert (tmp_path / "thesis.tex").exists() and (tmp_path / "adapter_config.json").exists()
    with pytest.raises(CheckpointError, match=r"thesis.tex is a file"):
        lowrank.save_adapter(model, tmp_path / "thesis.tex")


def test_a_model_without_that_adapter(tmp_path):
    with pytest.raises(LowrankError, match="has no adapter"):
        lowrank.save_adapter(llama(), tmp_path / "a")
    model = llama()
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]))
    with pytest.raises(LowrankError, match="there is no adapter 'other'"):
        lowrank.save_adapter(model, tmp_path / "a", "other")
    assert not (tmp_path / "a").exists()


def test_tensors_that_must_not_be_saved(adapter):
    before = contents(adapter)
    for spoil, match in (
        (lambda p: p.data.fill_(float("inf")), "not finite"),
        (lambda p: setattr(p, "data", torch.zeros(0)), r"has shape \[0\]: gather the sharded parameters"),
    ):
        model = llama()
        lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]))
        spoil(model.model.layers[1].self_attn.q_proj.factors("default").a)
        with pytest.raises(CheckpointError, match=re.compile(f"layers.1.self_attn.q_proj.lora_A.*{match}")):
            lowrank.save_adapter(model, adapter)
        assert contents(adapter) == before


# loralib


def pair(layer, rows_of_a, rows_of_b):
    return {f"{layer}.lora_A": torch.ones(rows_of_a, 16), f"{layer}.lora_B": torch.ones(rows_of_b, 2)}


def test_loralib_files_that_are_none(tmp_path):
    path = tmp_path / "lora.bin"
    layer = "transformer.h.0.attn.c_attn"
    cases = [
        ({f"{layer}.weight": torch.ones(2, 2)}, "holds no LoRA factors"),
        ({f"{layer}.lora_A": torch.ones(2, 16)}, "wanted matrices lora_A and lora_B"),
        (pair(layer, 6, 32), "which is no stack of the 2 parts q, v"),
        (pair(layer, 4, 48), "lora_B has 48 rows, and q, v have 32"),
        (pair("transformer.h.0.nowhere", 2, 16), "no module transformer.h.0.nowhere"),
    ]
    for tensors, match in cases:
        torch.save(tensors, path)
        model = gpt2()
        before = snapshot(model)
        with pytest.raises(CheckpointError, match=match):
            load_loralib(model, path, alpha=4, allow_pickle=True)
        assert is_plain(model, before)
    with pytest.raises(CheckpointError, match="alpha must be the finite number"):
        load_loralib(gpt2(), path, alpha=float("nan"), allow_pickle=True)
    with pytest.raises(CheckpointError, match="there is no file"):
        load_loralib(gpt2(), tmp_path / "nowhere.bin", alpha=4, allow_pickle=True)
