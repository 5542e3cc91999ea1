"""Everything PEFT's API does still works on an accelerated model, with PEFT's answers and PEFT's files."""

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import accelerate_models as models
from accelerate_models import answer, assert_same, base_model, config, counted, pair, peft_model, stir
from lowrank.peft import accelerate, restore

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")


def two_adapters() -> nn.Module:
    """Adapters `default` and `second`, of unlike rank, scale and targets; `default` active."""
    model = peft_model()
    model.add_adapter("second", config(r=2, lora_alpha=7, target_modules=["q_proj", "v_proj", "down_proj"]))
    return stir(model)


def close(fast: nn.Module, plain: nn.Module, **inputs: object) -> None:
    torch.testing.assert_close(answer(fast, **inputs), answer(plain, **inputs), rtol=1e-4, atol=1e-5)


def test_set_adapter(monkeypatch):
    plain, fast = pair(two_adapters())
    first = answer(fast)
    for model in (plain, fast):
        model.set_adapter("second")
    assert_same(plain, fast)
    assert not torch.allclose(answer(fast), first, atol=1e-2)
    with counted(monkeypatch) as ranks:
        answer(fast)
    assert ranks == [2] * 6  # q, v and down in two blocks; the other layers have no such adapter


def test_add_adapter_after_accelerate():
    plain, fast = pair(peft_model(target_modules=["q_proj"]))
    for model in (plain, fast):
        torch.manual_seed(3)
        model.add_adapter("wider", config(target_modules=["q_proj", "up_proj"]))
        model.set_adapter("wider")
        stir(model)
    assert_same(plain, fast)
    assert len(accelerate(fast).fused) == 4  # the new up_proj layers too
    assert_same(plain, fast)


def test_delete_adapter():
    plain, fast = pair(two_adapters())
    for model in (plain, fast):
        model.set_adapter("second")
        model.delete_adapter("default")
    assert not any("default" in name for name in fast.state_dict())
    assert_same(plain, fast)


def test_disable_adapter(monkeypatch):
    plain, fast = pair(two_adapters())
    changed = answer(fast)
    with plain.disable_adapter(), fast.disable_adapter(), counted(monkeypatch) as ranks:
        assert torch.equal(answer(fast), answer(plain))
        assert not torch.allclose(answer(fast), changed, atol=1e-2)
        assert {layer.reason for layer in accelerate(fast).layers} == {"its adapters are disabled"}
    assert not ranks
    assert torch.equal(answer(fast), changed)


def test_merge_and_unmerge(monkeypatch):
    plain, fast = pair(two_adapters())
    before = answer(fast)
    for model in (plain, fast):
        model.merge_adapter()
    with counted(monkeypatch) as ranks:
        assert torch.equal(answer(fast), answer(plain))
        assert {layer.reason for layer in accelerate(fast).layers} == {"its adapters are merged"}
    assert not ranks
    for model in (plain, fast):
        model.unmerge_adapter()
    torch.testing.assert_close(answer(fast), before, rtol=1e-3, atol=1e-4)
    assert_same(plain, fast)


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload_gives_peft_s_bits(safe):
    plain, fast = pair(two_adapters())
    want = plain.merge_and_unload(safe_merge=safe).state_dict()
    merged = fast.merge_and_unload(safe_merge=safe)
    got = merged.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
    assert not any("lora" in type(module).__module__ for module in merged.modules())


def test_unload_gives_the_base_back():
    _, fast = pair(two_adapters())
    base = fast.unload().state_dict()
    original = base_model().state_dict()
    assert base.keys() == original.keys() and all(torch.equal(base[key], original[key]) for key in base)


def test_mixed_batch(monkeypatch):
    plain, fast = pair(two_adapters().eval())
    names = ["second", "__base__"]
    with counted(monkeypatch) as ranks, torch.no_grad():
        got = fast(input_ids=models.IDS, adapter_names=names).logits
        want = plain(input_ids=models.IDS, adapter_names=names).logits
    assert torch.equal(got, want) and not ranks
    assert not torch.allclose(got[0], answer(plain)[0], atol=1e-2)
    close(fast, plain)  # nothing stays behind


def test_weighted_combination():
    plain, fast = pair(peft_model())
    for model in (plain, fast):
        model.add_adapter("second", config(r=models.RANK))
        torch.manual_seed(5)
        stir(model)
        model.add_weighted_adapter(["default", "second"], [0.7, 0.4], "both", combination_type="cat")
        model.set_adapter("both")
    assert_same(plain, fast)


def test_state_dict_and_saved_files_are_peft_s(tmp_path: Path):
    plain, fast = pair(two_adapters())
    want, got = plain.state_dict(), fast.state_dict()
    assert list(want) == list(got) and all(torch.equal(want[key], got[key]) for key in want)
    of_adapter = peft.get_peft_model_state_dict(plain), peft.get_peft_model_state_dict(fast)
    assert list(of_adapter[0]) == list(of_adapter[1])
    for model, folder in ((plain, "plain"), (fast, "fast")):
        model.save_pretrained(tmp_path / folder)
    files = sorted(p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain").rglob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        assert (tmp_path / "fast" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_from_pretrained_and_load_adapter(tmp_path: Path, monkeypatch):
    plain, fast = pair(two_adapters())
    fast.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    assert len(accelerate(loaded).fused) == 14
    loaded.load_adapter(tmp_path / "second", "second", is_trainable=True)
    for name in ("default", "second"):
        for model in (plain, loaded):
            model.set_adapter(name)
        with counted(monkeypatch) as ranks:
            close(loaded, plain)
        assert ranks


def test_set_peft_model_state_dict_is_seen_at_once():
    plain, fast = pair(peft_model())
    other = {key: torch.randn_like(tensor) / 5 for key, tensor in peft.get_peft_model_state_dict(plain).items()}
    for model in (plain, fast):
        peft.set_peft_model_state_dict(model, other)
    assert_same(plain, fast)


def test_hotswap(tmp_path: Path):
    from peft.utils.hotswap import hotswap_adapter

    plain, fast = pair(peft_model())
    torch.manual_seed(8)
    stir(peft_model()).save_pretrained(tmp_path)
    for model in (plain, fast):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    assert_same(plain, fast)


def test_adapters_of_transformers_own_integration(monkeypatch):
    """model.add_adapter of transformers makes no PeftModel; its layers are PEFT's all the same."""
    model = base_model()
    model.add_adapter(config(target_modules=["q_proj", "up_proj"]))
    plain, fast = pair(stir(model))
    with counted(monkeypatch) as ranks:
        close(fast, plain)
    assert len(ranks) == 4
    for m in (plain, fast):
        m.disable_adapters()
    assert torch.equal(answer(fast), answer(plain))


def test_generate():
    plain, fast = pair(two_adapters().eval())
    prompt = {"input_ids": models.IDS, "attention_mask": torch.ones_like(models.IDS)}
    want = plain.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(fast.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0), want)


def test_training_goes_on_after_restore():
    plain, fast = pair(two_adapters())
    for model in (plain, fast):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for step in range(4):
            if model is fast and step == 2:
                restore(fast)
            optimizer.zero_grad()
            model(input_ids=models.IDS, labels=models.IDS).loss.backward()
            optimizer.step()
    assert_same(plain, fast)


def test_an_accelerated_model_prints_as_pefts_does():
    model = peft_model()
    printed = repr(model)
    accelerate(model)
    assert repr(model) == printed and "lora.Linear(" in printed
    restore(model)
    assert repr(model) == printed
