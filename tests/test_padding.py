"""Rows of a causal model padded on the right need no mask: tried on the model, with the same loss and gradients."""

import pytest
import torch
from torch import nn

from lowrank import LoraConfig, inject
from lowrank.data.batches import collate
from lowrank.data.tokens import IGNORED, Example
from lowrank.train.loss import Loss
from lowrank.train.losses import loss_of
from lowrank.train.padding import sees_padding, unsuspected
from models import config

CPU = torch.device("cpu")
ROWS = [Example(list(range(3, 3 + n)), [IGNORED] * 2 + list(range(5, 3 + n))) for n in (24, 9, 17)]
FAMILIES = {
    "llama": {},
    "gpt2": {},
    "mistral": {"sliding_window": 4, "num_key_value_heads": 2},
    "gemma": {"num_key_value_heads": 2, "head_dim": 4},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "falcon": {"alibi": False},
    "gpt_neox": {},
    "mixtral": {},
}


def build(name, attention="sdpa"):
    import transformers

    torch.manual_seed(0)
    made = config(name, **FAMILIES.get(name, {}))
    return transformers.AutoModelForCausalLM.from_config(made, attn_implementation=attention).eval()


def gradients(model, masked):
    batch = collate(ROWS, 0, CPU, True, masked)
    assert ("attention_mask" in batch.inputs) == masked
    model.zero_grad()
    loss: Loss = loss_of("text", None, None)(model, batch)
    loss.total.backward()
    return loss.total.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_needs_no_mask_gives_the_same_loss_and_gradients_without(name):
    """Longer than what is tried, and than the windows of those that have some."""
    model = build(name)
    if name == "llama":
        assert not sees_padding(model)
    if sees_padding(model):
        pytest.skip("keeps its mask")
    inject(model, LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", init_lora_weights="random"))
    (told, with_mask), (untold, without) = gradients(model, True), gradients(model, False)
    torch.testing.assert_close(untold, told, rtol=1e-5, atol=1e-5)
    assert with_mask.keys() == without.keys() and len(without) > 4
    for path, wanted in with_mask.items():
        torch.testing.assert_close(without[path], wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()), msg=path)


def test_a_model_that_sees_both_ways_keeps_its_mask():
    import transformers

    torch.manual_seed(0)
    model = transformers.BertForMaskedLM._from_config(config("bert"), attn_implementation="sdpa")
    assert sees_padding(model)


def test_what_is_not_known_keeps_its_mask():
    assert sees_padding(nn.Linear(2, 2))
    assert sees_padding(build("llama", "eager"))
    broken = build("llama")
    broken.forward = None
    assert sees_padding(broken)


def test_it_leaves_the_model_as_it_was():
    model = build("llama").train()
    sees_padding(model)
    assert model.training


def test_transformers_does_not_warn_of_the_padding(caplog):
    model = build("gpt2")
    assert model.config.pad_token_id == 0 and unsuspected(model) == 1
    batch = collate(ROWS, unsuspected(model), CPU, True, masked=False)
    model(**batch.inputs)
    assert "attention_mask" not in caplog.text
