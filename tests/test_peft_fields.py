"""Every field of PEFT's LoraConfig is read and applied, refused by name, or known to change no answer."""

import dataclasses
import json

import pytest
import torch

import lowrank
from checkpoint_models import answer, bert, convolutions, disturb, gpt2, llama
from lowrank import LoraConfig
from lowrank.checkpoint.config_file import READ, UNREPRESENTABLE, USED, WITHOUT_EFFECT
from lowrank.errors import CheckpointError
from merge_disk_models import assert_same_bits, load_base, save_base

peft = pytest.importorskip("peft")

NEVER_WRITTEN = {"runtime_config"}  # PEFT takes it out before it writes the file
OF_OLD_VERSIONS = {"merge_weights", "enable_lora"}  # PEFT 0.2's
SET = {  # a value that PEFT may write for every field that is not applied, since its own default is no value
    "layer_replication": [[0, 2], [1, 2]],
    "alora_invocation_tokens": [5, 9],
    "megatron_config": {"hidden_size": 16},
    "enable_lora": [True, False, True],
}


def written(folder, **fields):
    """The adapter's folder, with `fields` in its config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def tied():
    """A small Llama whose head is its table."""
    model = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


@pytest.fixture
def adapter(tmp_path):
    """A sound adapter of a small Llama."""
    model = llama()
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"]))
    lowrank.save_adapter(disturb(model), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_no_field_of_peft_is_unknown():
    theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)} - NEVER_WRITTEN
    ours = [*USED, *READ, *WITHOUT_EFFECT, *UNREPRESENTABLE]
    assert len(ours) == len(set(ours)), "a field is in two of the tables"
    assert theirs - set(ours) == set(), "decide what these fields of PEFT's LoraConfig mean here"
    assert set(ours) - theirs == OF_OLD_VERSIONS, "these fields are PEFT's no more"


@pytest.mark.parametrize("field", UNREPRESENTABLE)
def test_a_field_that_cannot_be_represented_is_refused_by_name(adapter, field):
    model = llama()
    before = answer(model)
    with pytest.raises(CheckpointError, match=f"{field} is set: ") as caught:
        lowrank.load_adapter(model, written(adapter, **{field: SET.get(field, True)}))
    assert "\n" not in str(caught.value)
    assert torch.equal(answer(model), before)
    with pytest.raises(CheckpointError, match=field):
        lowrank.read_adapter(adapter)


@pytest.mark.parametrize("field", sorted(set(WITHOUT_EFFECT) - {"peft_type"}))
def test_a_field_without_effect_changes_no_answer(adapter, field):
    plain, other = llama(), llama()
    lowrank.load_adapter(plain, adapter)
    lowrank.load_adapter(other, written(adapter, **{field: {"some": "words"}}))
    assert torch.equal(answer(plain), answer(other))


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=["table", "table in full", "head"],
)
def test_ensured_ties_are_all_in_the_file(tmp_path, targets):
    """`ensure_weight_tying` needs no reading: PEFT writes what it tied to a table as the head's own tensors."""
    theirs = peft.get_peft_model(
        tied(), peft.LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, ensure_weight_tying=True, **targets)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tied()
    lowrank.load_adapter(ours, tmp_path / "theirs")
    assert torch.allclose(answer(ours), answer(theirs), atol=1e-5)
    assert not torch.allclose(answer(ours), answer(tied()), atol=1e-3)


def biased(make, **config):
    """PEFT's own adapter whose B has biases."""
    options = {"r": 3, "lora_alpha": 7, "init_lora_weights": False, "lora_bias": True} | config
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter += torch.randn_like(parameter)
    return theirs


@pytest.mark.parametrize(
    "make, targets", [(gpt2, ["c_attn"]), (bert, ["query", "value"]), (convolutions, ["one", "head"])]
)
def test_the_bias_of_b_goes_into_the_layers(tmp_path, make, targets):
    theirs = biased(make, target_modules=targets, rank_pattern={targets[-1]: 2}, fan_in_fan_out=make is gpt2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = make()
    base = answer(ours)
    lowrank.load_adapter(ours, tmp_path / "theirs")
    assert torch.allclose(answer(ours), answer(theirs), atol=1e-5)
    assert not torch.allclose(answer(ours), base, atol=1e-2)
    with lowrank.disabled(ours):
        assert torch.equal(answer(ours), base)
    lowrank.save_adapter(ours, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert torch.allclose(answer(read), answer(theirs), atol=1e-5)
    base = save_base(make(), tmp_path / "base")
    lowrank.merge_checkpoint(base, tmp_path / "theirs", tmp_path / "out", verify="full")
    merged = load_base(make(), tmp_path / "out")
    assert_same_bits(dict(merged.state_dict()), dict(lowrank.merge_and_unload(ours).state_dict()))
    with pytest.raises(CheckpointError, match="biases of B"):
        lowrank.resize_adapter(tmp_path / "theirs", tmp_path / "resized", rank=2)


def test_a_bias_of_b_without_a_bias_to_add_it_to_is_refused(tmp_path):
    biased(llama, target_modules=["q_proj"]).save_pretrained(tmp_path / "theirs")
    model = llama()
    before = answer(model)
    with pytest.raises(CheckpointError, match="q_proj has none to add it to"):
        lowrank.load_adapter(model, tmp_path / "theirs")
    assert torch.equal(answer(model), before)
    base = save_base(llama(), tmp_path / "base")
    with pytest.raises(CheckpointError, match="no such bias to add it to"):
        lowrank.merge_checkpoint(base, tmp_path / "theirs", tmp_path / "out")
