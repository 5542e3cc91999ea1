"""Embeddings and heads that share a weight: adapting one leaves the other, and a merged model survives saving."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoraConfig, LowrankWarning
from lowrank.errors import TargetError
from models import answer, build, causal
from snapshots import assert_same, same_bits, snapshot

T5 = {"d_kv": 4, "d_ff": 24, "num_decoder_layers": 2, "decoder_start_token_id": 0}
SWITCH = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2}
BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "decoder_start_token_id": 2,
}
STACKS = ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]
TIED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (lambda: causal("llama", tie_word_embeddings=True), ["embed_tokens", "lm_head"]),
    "gpt2": (lambda: causal("gpt2"), ["wte", "lm_head"]),
    "gemma3": (lambda: causal("gemma3_text", num_key_value_heads=2, head_dim=4), ["embed_tokens", "lm_head"]),
    "bert": (lambda: build("AutoModelForMaskedLM", "bert"), ["word_embeddings", "predictions.decoder"]),
    "t5": (lambda: build("AutoModelForSeq2SeqLM", "t5"), STACKS),
    "umt5": (lambda: build("AutoModelForSeq2SeqLM", "umt5", **T5), STACKS),
    "switch": (lambda: build("AutoModelForSeq2SeqLM", "switch_transformers", **T5, **SWITCH), STACKS),
    "bart": (lambda: build("AutoModelForSeq2SeqLM", "bart", **BART), STACKS),
}
ONE_OR_ALL = [(name, i) for name, (_, targets) in TIED.items() for i in range(len(targets) + 1)]


def inject(model: nn.Module, targets: list[str], **options: object) -> None:
    config = LoraConfig(r=2, lora_alpha=5, target_modules=targets, init_lora_weights="random", **options)
    with pytest.warns(LowrankWarning, match=r"only the targets change, and merging will\s+untie them"):
        lowrank.inject(model, config)


def reloaded(model: nn.Module, folder: Path) -> nn.Module:
    """The model after a way through files."""
    model.save_pretrained(folder)
    with warnings.catch_warnings(action="ignore"):
        return type(model).from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize(("name", "which"), ONE_OR_ALL)
def test_a_merged_tied_model_answers_the_same_before_and_after_files(name: str, which: int, tmp_path: Path) -> None:
    make, targets = TIED[name]
    model, wanted = make(), targets[which : which + 1] or targets
    flags = {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}
    base = answer(model)
    inject(model, wanted)
    adapted = answer(model)
    assert (adapted - base).abs().max() > 1e-3
    lowrank.merge_and_unload(model)
    assert torch.allclose(answer(model), adapted, atol=1e-5)
    assert {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)} == flags
    assert torch.allclose(answer(reloaded(model, tmp_path)), adapted, atol=1e-5)


@pytest.mark.parametrize("name", TIED)
def test_adapting_one_owner_leaves_the_others(name: str) -> None:
    make, targets = TIED[name]
    model = make()
    modules = dict(model.named_modules())
    paths = {target: next(p for p in modules if p == target or p.endswith("." + target)) for target in targets}
    table = modules[paths[targets[0]]].weight.detach().clone()
    inject(model, targets[:1])
    for target in targets:
        assert same_bits(modules[paths[target]].weight.detach(), table)
    lowrank.merge_and_unload(model)
    assert not same_bits(modules[paths[targets[0]]].weight.detach(), table)
    for target in targets[1:]:
        assert same_bits(modules[paths[target]].weight.detach(), table)


@pytest.mark.parametrize("name", TIED)
def test_unloading_leaves_them_tied(name: str, tmp_path: Path) -> None:
    make, targets = TIED[name]
    model = make()
    base = answer(model)
    before = snapshot(model)
    inject(model, targets)
    with lowrank.merged(model):
        assert not same_bits(answer(model), base)
    lowrank.unload(model)
    assert_same(model, before)
    assert same_bits(answer(model), base)
    assert same_bits(answer(reloaded(model, tmp_path)), base)


def test_a_saved_head_of_a_tied_model_is_parted_too(tmp_path: Path) -> None:
    model = causal("llama", tie_word_embeddings=True)
    lowrank.inject(model, LoraConfig(r=2, modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.lm_head.weight += 0.5
    adapted = answer(model)
    lowrank.merge_and_unload(model)
    assert same_bits(answer(model), adapted)
    assert not model.config.tie_word_embeddings
    assert torch.allclose(answer(reloaded(model, tmp_path)), adapted, atol=1e-6)


def test_ties_stay_where_the_merge_did_not_touch_them(tmp_path: Path) -> None:
    """Merging one adapter while another one's copy of the head is in place: the base itself is still tied."""
    model = causal("llama", tie_word_embeddings=True)
    base = model.lm_head.weight
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=5, init_lora_weights="random"), "first")
    lowrank.inject(model, LoraConfig(r=2, modules_to_save=["lm_head"]), "second")
    with torch.no_grad():
        model.lm_head.weight += 0.5
    lowrank.merge_and_unload(model, adapters=["first"])
    assert lowrank.active_adapters(model) == ("second",)
    assert model.lm_head.weight is not base
    lowrank.unload(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight is base
    assert model.config.tie_word_embeddings
    assert torch.allclose(answer(reloaded(model, tmp_path)), answer(model), atol=1e-6)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_table_that_is_never_called_is_refused(name: str) -> None:
    model = TIED[name][0]()
    before = snapshot(model)
    with pytest.raises(TargetError, match="shared: it is never called"):
        lowrank.inject(model, LoraConfig(r=2, target_modules=["shared", "lm_head"]))
    assert_same(model, before)
