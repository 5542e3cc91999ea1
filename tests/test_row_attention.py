"""Attention of packs row by row: the same losses and gradients as under transformers' own mask, or the mask stays."""

import pytest
import torch

from lowrank import LoraConfig, inject
from lowrank.data.batches import collate
from lowrank.data.packing import end_to_end
from lowrank.data.tokens import IGNORED, Example
from lowrank.train.head import find_head
from lowrank.train.losses import loss_of
from lowrank.train.row_attention import NAME, attend_by_rows
from test_padding import CPU, FAMILIES, build


def rows(*lengths):
    return [Example(list(range(3, 3 + n)), [IGNORED, *range(4, 3 + n)]) for n in lengths]


PACKS = [end_to_end(rows(9, 1, 14)), end_to_end(rows(5, 12)), end_to_end(rows(20))]


def batch():
    return collate(PACKS, 0, CPU, True)


def gradients(model):
    model.zero_grad()
    loss = loss_of("text", None, None)(model, batch())
    loss.total.backward()
    return loss.total.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_by_rows_the_loss_and_the_gradients_are_the_same(name, monkeypatch):
    model = build(name)
    inject(model, LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", init_lora_weights="random"))
    told, wanted = gradients(model)
    if not attend_by_rows(model, batch(), find_head(model)):
        assert name != "llama" and model.config._attn_implementation == "sdpa"
        return
    assert model.config._attn_implementation == NAME
    longest = []
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **o: (longest.append(q.shape[2]), plain(q, k, v, **o))[1],
    )
    found, got = gradients(model)
    assert longest and max(longest) == 20
    torch.testing.assert_close(found, told, rtol=1e-5, atol=1e-5)
    for path, tensor in wanted.items():
        torch.testing.assert_close(got[path], tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max()), msg=path)


def test_rows_that_are_not_packed_and_answers_go_on_as_before():
    model = build("llama").eval()
    ids = torch.tensor([[5, 9, 3, 17, 30, 4], [8, 8, 21, 11, 0, 0]])
    mask = (ids > 0).long()
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits[mask == 1], model(ids).logits
        said = model.generate(ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert attend_by_rows(model, batch(), find_head(model))
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask == 1], wanted[0])
        torch.testing.assert_close(model(ids).logits, wanted[1])
        assert torch.equal(model.generate(ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None), said)


def test_windows_keep_the_mask():
    model = build("mistral")
    assert not attend_by_rows(model, batch(), find_head(model))


def test_a_model_whose_attention_is_not_told_where_rows_begin_keeps_its_mask(monkeypatch):
    model = build("llama")
    for layer in model.model.layers:
        inner = layer.self_attn.forward
        monkeypatch.setattr(
            layer.self_attn, "forward", lambda *a, inner=inner, position_ids=None, **kw: inner(*a, **kw)
        )
    assert not attend_by_rows(model, batch(), find_head(model))
    assert model.config._attn_implementation == "sdpa"
