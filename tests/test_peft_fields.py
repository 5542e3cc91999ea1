"""Every field of PEFT's LoraConfig is read and applied, refused by name, or known to change no answer."""

import dataclasses
import json

import pytest
import torch

import lowrank
from checkpoint_models import answer, disturb, llama
from lowrank import LoraConfig
from lowrank.checkpoint.config_file import UNREPRESENTABLE, USED, WITHOUT_EFFECT
from lowrank.errors import CheckpointError

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
    ours = [*USED, *WITHOUT_EFFECT, *UNREPRESENTABLE]
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
