"""Attention of packs row by row: the same losses and gradients as under transformers' own mask, or the mask stays."""

import pytest
import torch

from lowrank import LoraConfig, inject
from lowrank.data.batches import collate
from lowrank.data.packing import end_to_end
from lowrank.data.tokens import IGNORED, Example
from lowrank.train import row_attention
from lowrank.train.evaluation import Measure
from lowrank.train.head import find_head
from lowrank.train.losses import loss_of
from lowrank.train.metrics import FIGURES
from lowrank.train.preparing import prepare
from lowrank.train.row_attention import NAME, SHORT, attend_by_rows, is_widened
from lowrank.train.settings import TrainSettings
from test_padding import CPU, FAMILIES, build
from train_models import completion_rows, save_llama, write_jsonl


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


@pytest.mark.parametrize(
    ("maker", "avx512", "slow", "short", "long"),
    [
        ("AuthenticAMD", True, False, True, False),
        ("AuthenticAMD", False, True, True, True),
        ("GenuineIntel", True, False, False, False),
        ("", False, False, False, False),
    ],
)
def test_rows_of_half_precision_are_widened_where_it_was_measured(maker, avx512, slow, short, long, monkeypatch):
    for name, found in (("vendor", maker), ("has_avx512", avx512)):
        monkeypatch.setattr(row_attention, name, lambda found=found: found)
    monkeypatch.setattr(row_attention, "half_products_are_slow", lambda _: slow)
    for dtype in (torch.bfloat16, torch.float16):
        assert [is_widened(dtype, length) for length in (1, SHORT, SHORT + 1)] == [short, short, long]
    assert not is_widened(torch.float32, 1) and not is_widened(torch.float64, 1)


def test_what_a_row_in_half_precision_attends_in_hangs_on_its_own_length(monkeypatch):
    """One that is widened is that of float32, rounded once; one that is not is PyTorch's own; whatever lies beside."""
    monkeypatch.setattr(row_attention, "is_widened", lambda dtype, length: dtype is torch.bfloat16 and length < 10)
    model = build("llama").to(torch.bfloat16)
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 14 + 9, 8, generator=drawn).bfloat16().requires_grad_() for _ in range(3))
    positions = torch.cat([torch.arange(14), torch.arange(9)])[None]
    module = model.model.layers[0].self_attn
    said, _ = row_attention._attention(module, q, k, v, None, position_ids=positions, scaling=0.3)
    said.float().square().sum().backward()
    assert said.dtype is torch.bfloat16 and q.grad.dtype is torch.bfloat16
    for part, dtype in ((slice(0, 14), torch.bfloat16), (slice(14, 23), torch.float32)):
        own = [tensor.detach()[:, :, part].to(dtype).requires_grad_() for tensor in (q, k, v)]
        wanted = torch.nn.functional.scaled_dot_product_attention(*own, is_causal=True, scale=0.3).to(torch.bfloat16)
        assert torch.equal(said[:, part], wanted.transpose(1, 2))
        wanted.float().square().sum().backward()
        for tensor, alone in zip((q, k, v), own, strict=True):
            assert torch.equal(tensor.grad[:, :, part], alone.grad.to(torch.bfloat16))


def measured(model, flat):
    measure = Measure(lambda some: collate(some, 0, CPU, True), loss_of("text", None, None), FIGURES["text"], flat=flat)
    taken = measure.trained(rows(24, 9, 17))
    assert taken.inputs["input_ids"].shape == ((1, 50) if flat else (3, 24))
    model.zero_grad()
    loss = measure.loss(model, taken)
    loss.total.backward()
    return loss.total.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_rows_trained_end_to_end_give_the_loss_and_gradients_of_padded_ones():
    model = build("llama")
    inject(model, LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", init_lora_weights="random"))
    told, wanted = measured(model, flat=False)
    assert attend_by_rows(model, batch(), find_head(model))
    found, got = measured(model, flat=True)
    torch.testing.assert_close(found, told, rtol=1e-5, atol=1e-5)
    for path, tensor in wanted.items():
        torch.testing.assert_close(got[path], tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max()), msg=path)


def prepared(folder, **options):
    data = write_jsonl(folder / "rows.jsonl", completion_rows(8))
    told = {"model": str(save_llama(folder / "llama")), "data": str(data), "out": str(folder / "out"), "device": "cpu"}
    return prepare(TrainSettings.model_validate(told | options))


@pytest.mark.parametrize(
    ("options", "flat"), [({}, True), ({"micro_batch": 1}, False), ({"pack": True}, False)], ids=str
)
def test_a_training_lays_its_rows_end_to_end_where_it_gains(options, flat, tmp_path):
    found = prepared(tmp_path, **options)
    assert found.measure.flat == flat
    assert (found.loaded.model.config._attn_implementation == NAME) == (flat or "pack" in options)


def test_rows_that_would_see_each_other_stay_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr("lowrank.train.packing.apart", lambda *_: 0.5)
    found = prepared(tmp_path)
    assert not found.measure.flat and found.loaded.model.config._attn_implementation == "sdpa"
