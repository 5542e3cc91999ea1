"""Modules that are replaced, resized or wrapped after injection: carried over, or an error, never lost in silence."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank
import models
from layer_cases import chain
from lowrank import LoraConfig
from lowrank.errors import CheckpointError, LowrankError, LowrankWarning
from lowrank.injection.presence import has_changed
from lowrank.injection.state import require_state
from snapshots import assert_same, same_bits, snapshot

LONGER, SHORTER = models.VOCABULARY + 8, models.VOCABULARY - 1
HEADS = {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "init_lora_weights": "random"}
FULL = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"], "init_lora_weights": "random"}


def llama(**settings: object) -> nn.Module:
    model = models.causal("llama")
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=5, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def resize(model: nn.Module, rows: int) -> None:
    model.resize_token_embeddings(rows, mean_resizing=False)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=models.IDS).logits


@pytest.mark.parametrize("rows", [LONGER, SHORTER])
@pytest.mark.parametrize("settings", [HEADS, FULL, HEADS | {"bias": "all"}], ids=["low rank", "full", "biases"])
def test_resized_embeddings_and_heads_keep_their_adapters(
    settings: dict[str, object], rows: int, tmp_path: Path
) -> None:
    model = llama(**settings)
    kept = min(rows, models.VOCABULARY)
    before = logits(model)[..., :kept]
    with lowrank.disabled(model):
        base = logits(model)[..., :kept]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    resize(model, rows)
    with pytest.warns(
        LowrankWarning, match=f"lm_head: resized to {rows} rows after injection; the adapters are carried"
    ):
        after = logits(model)
    close = {"rtol": 1e-5, "atol": 1e-6}  # a head of another size is another product: not every library sums it alike
    torch.testing.assert_close(after[..., :kept], before, **close)
    assert after.shape[-1] == rows
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    with lowrank.disabled(model):
        torch.testing.assert_close(logits(model)[..., :kept], base, **close)
    model(input_ids=torch.tensor([[rows - 1, 3]]), labels=torch.tensor([[3, rows - 1]])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    lowrank.save_adapter(model, tmp_path / "adapter")
    twin = models.causal("llama")
    resize(twin, rows)
    twin.load_state_dict(lowrank.unload(copy.deepcopy(model)).state_dict())
    lowrank.load_adapter(twin, tmp_path / "adapter")
    torch.testing.assert_close(logits(twin), after, **close)
    torch.testing.assert_close(logits(lowrank.merge_and_unload(model)), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("notice", [lowrank.merge_and_unload, lambda m: lowrank.set_active(m, ["default"])])
def test_merging_and_switching_notice_a_resize_too(notice) -> None:
    model = llama(**HEADS)
    wanted = logits(model)
    resize(model, LONGER)
    with pytest.warns(LowrankWarning, match="resized to"):
        notice(model)
    torch.testing.assert_close(logits(model)[..., : models.VOCABULARY], wanted, rtol=1e-4, atol=1e-5)


def test_saving_notices_a_resize(tmp_path: Path) -> None:
    model = llama(**FULL)
    resize(model, LONGER)
    with pytest.warns(LowrankWarning, match="resized to"):
        lowrank.save_adapter(model, tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    full = {key: tensor.shape[0] for key, tensor in found.items() if "lora" not in key}
    assert set(full.values()) == {LONGER} and len(full) == 2


@pytest.mark.parametrize(
    "act",
    [
        logits,
        lowrank.merge_and_unload,
        lambda m: lowrank.set_active(m, []),
        lambda m: lowrank.merged(m).__enter__(),
        lambda m: lowrank.save_adapter(m, "never written"),
        lambda m: lowrank.inject(m, LoraConfig(r=2), "second"),
    ],
)
@pytest.mark.parametrize("settings", [HEADS, FULL], ids=["low rank", "full"])
def test_a_replaced_module_is_an_error_until_it_is_back(settings: dict[str, object], act) -> None:
    model = llama(**settings)
    before, wanted, head = snapshot(model), logits(model), model.lm_head
    model.lm_head = nn.Linear(16, models.VOCABULARY, bias=False)
    with pytest.raises(
        LowrankError, match=r"lm_head is another Linear now, with other weights; put them back, or delete"
    ):
        act(model)
    model.lm_head = head
    assert_same(model, before)
    assert same_bits(logits(model), wanted)


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (lambda m: setattr(m.layers[0].mlp, "up_proj", nn.Identity()), "up_proj is now a Identity"),
        (lambda m: setattr(m.layers[0].mlp, "up_proj", nn.Linear(16, 5)), "up_proj is another Linear now"),
        (lambda m: setattr(m.layers[0].mlp, "up_proj", nn.Linear(5, 24)), "up_proj has another weight"),
        (lambda m: m.layers.__delitem__(1), r"layers\.1\.mlp\.up_proj was removed"),
    ],
)
def test_what_replaces_a_module_is_named(put, message: str, tmp_path: Path) -> None:
    model = llama(target_modules=["up_proj"])
    put(model.model)
    with pytest.raises(LowrankError, match=message):
        lowrank.save_adapter(model, tmp_path / "adapter")
    lowrank.unload(model)
    assert not any("lora" in name for name in model.state_dict())


def test_a_copy_in_a_modules_place_is_that_module() -> None:
    model = llama(target_modules=["up_proj"])
    wanted = logits(model)
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[0].mlp)
    assert same_bits(logits(model), wanted)
    lowrank.set_active(model, [])
    lowrank.unload(model)
    assert not any("lora" in name for name in model.state_dict())


def test_a_wrapped_module_works_and_is_not_saved_under_another_name(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model, x = chain("one")
    wanted, plain = model(x), model.second
    model.second = Wrapper(plain)
    assert has_changed(model, require_state(model))
    assert same_bits(model(x), wanted)
    assert not has_changed(model, require_state(model))  # not looked for at every forward
    with pytest.raises(
        CheckpointError, match=r"put into second, but is not found there now \(it is in second\.inner\)"
    ):
        lowrank.save_adapter(model, tmp_path / "adapter", "one")
    model.second = plain
    lowrank.save_adapter(model, tmp_path / "adapter", "one")


def test_dora_of_a_resized_head_starts_new_rows_at_their_own_norm() -> None:
    model = llama(target_modules=["lm_head"], use_dora=True)
    before = logits(model)
    resize(model, LONGER)
    with pytest.warns(LowrankWarning, match="resized"):
        after = logits(model)
    torch.testing.assert_close(after[..., : models.VOCABULARY], before, rtol=1e-5, atol=1e-6)
    with lowrank.disabled(model):
        new = logits(model)[..., models.VOCABULARY :]
    torch.testing.assert_close(after[..., models.VOCABULARY :], new, rtol=1e-4, atol=1e-5)
