"""Embeddings and heads that share a tensor: kept one where both sides change alike, two and said so where not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpoint_models import answer
from lowrank.errors import MergeError
from lowrank.merge.disk import merge_checkpoint
from merge_disk_models import (
    embedding_factors,
    linear_factors,
    load_base,
    merged_in_memory,
    pair,
    save_adapter,
    save_base,
    tensors_of,
    write_adapter,
    write_base,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "vocab_size": 8}
LLAVA = "LlavaForConditionalGeneration"
SHAPES = {EMBEDDING: (8, 3), "model.layers.0.self_attn.q_proj.weight": (3, 3)}


def tied_llama(**config: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    fields = LlamaConfig(**sizes, vocab_size=32, tie_word_embeddings=True, initializer_range=0.2, **config)
    return LlamaForCausalLM(fields).eval()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.filterwarnings("ignore:.*shares its weight")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_change_of_one_side_unties(target: str, tmp_path: Path) -> None:
    """As in memory: the target gets its own merged tensor, the partner keeps the base's; transformers loads both."""
    model = tied_llama()
    base = save_base(model, tmp_path / "base", torch.bfloat16)
    assert HEAD not in tensors_of(base)
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=[target, "q_proj"])
    report = merge_checkpoint(base, adapter, tmp_path / "out", verify="full")
    wanted = merged_in_memory(load_base(model, base), [adapter])
    found = tensors_of(tmp_path / "out")
    assert found.keys() == wanted.state_dict().keys()
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in found.items())
    assert not torch.equal(found[EMBEDDING], found[HEAD])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert any("config.json says so" in note for note in report.notes)
    loaded = load_base(model, tmp_path / "out")
    assert torch.equal(answer(loaded), answer(wanted))
    assert torch.equal(loaded.lm_head.weight, found[HEAD])


def test_an_adapter_that_leaves_both_alone_leaves_them_tied(tmp_path: Path) -> None:
    model = tied_llama()
    base = save_base(model, tmp_path / "base")
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert HEAD not in tensors_of(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_both_sides_changed_alike_stay_one(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SHAPES, LLAMA)
    a, b = pair(3, 8)
    factors = embedding_factors("model.embed_tokens", 8, 3)
    factors |= {"lm_head.lora_A.weight": b.t(), "lm_head.lora_B.weight": a.t()}
    adapter = write_adapter(tmp_path / "adapter", factors, target_modules=["embed_tokens", "lm_head"])
    report = merge_checkpoint(base, adapter, tmp_path / "out", verify="full")
    found = tensors_of(tmp_path / "out")
    assert found.keys() == SHAPES.keys()
    torch.testing.assert_close(found[EMBEDDING], tensors_of(base)[EMBEDDING] + 1.5 * (b @ a).t())
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    assert any("stay one tensor" in note for note in report.notes)


def test_both_sides_changed_differently_become_two(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SHAPES, LLAMA)
    factors = embedding_factors("model.embed_tokens", 8, 3) | linear_factors("lm_head", 8, 3, seed=5)
    adapter = write_adapter(tmp_path / "adapter", factors, target_modules=["embed_tokens", "lm_head"])
    merge_checkpoint(base, adapter, tmp_path / "out", verify="full")
    before, found = tensors_of(base)[EMBEDDING], tensors_of(tmp_path / "out")
    (a, b), (a2, b2) = pair(3, 8), pair(8, 3, seed=5)
    torch.testing.assert_close(found[EMBEDDING], before + 1.5 * (b @ a).t())
    torch.testing.assert_close(found[HEAD], before + 1.5 * b2 @ a2)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


@pytest.mark.parametrize("alike", [True, False])
def test_full_copies_of_both_sides(alike: bool, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SHAPES, LLAMA)
    copy = torch.randn(8, 3)
    other = copy if alike else torch.randn(8, 3)
    factors = {"model.embed_tokens.weight": copy, "lm_head.weight": other.clone()}
    factors |= linear_factors("model.layers.0.self_attn.q_proj", 3, 3)
    adapter = write_adapter(tmp_path / "adapter", factors, modules_to_save=["embed_tokens", "lm_head"])
    merge_checkpoint(base, adapter, tmp_path / "out", verify="full")
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found[EMBEDDING], copy)
    assert (HEAD in found) is not alike
    assert alike or torch.equal(found[HEAD], other)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is alike


def test_a_full_copy_of_one_side(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SHAPES, LLAMA)
    copy = torch.randn(8, 3) + 1
    factors = {"lm_head.weight": copy} | linear_factors("model.layers.0.self_attn.q_proj", 3, 3)
    adapter = write_adapter(tmp_path / "adapter", factors, modules_to_save=["lm_head"])
    merge_checkpoint(base, adapter, tmp_path / "out", verify="full")
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found[HEAD], copy) and torch.equal(found[EMBEDDING], tensors_of(base)[EMBEDDING])
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("architecture", "config", "embedding", "head"),
    [
        ("GPT2LMHeadModel", {}, "wte", "lm_head"),
        ("GPT2LMHeadModel", {}, "transformer.wte", "lm_head"),
        (
            LLAVA,
            {"text_config": {}},
            "language_model.model.embed_tokens",
            "language_model.lm_head",
        ),
        (LLAVA, {"text_config": {}}, "model.language_model.embed_tokens", "lm_head"),
        ("BertForMaskedLM", {}, "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
        ("GPTNeoXForCausalLM", {"tie_word_embeddings": True}, "gpt_neox.embed_in", "embed_out"),
    ],
)
def test_families_and_their_heads(
    architecture: str, config: dict[str, Any], embedding: str, head: str, tmp_path: Path
) -> None:
    """Files that store no head tie it, whether config.json says so or is silent."""
    base = write_base(tmp_path / "base", {f"{embedding}.weight": (8, 3)}, {"architectures": [architecture], **config})
    adapter = write_adapter(tmp_path / "adapter", embedding_factors(embedding, 8, 3), target_modules=["x"])
    merge_checkpoint(base, adapter, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found[f"{head}.weight"], tensors_of(base)[f"{embedding}.weight"])
    said = config_of(tmp_path / "out")
    assert said["tie_word_embeddings"] is False
    assert said.get("text_config", {"tie_word_embeddings": False})["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    "config", [{"architectures": ["LlamaForSequenceClassification"]}, {"architectures": ["LlamaModel"]}, {}, None]
)
def test_without_a_head_there_is_nothing_to_untie(config: dict[str, Any] | None, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SHAPES, config)
    adapter = write_adapter(tmp_path / "adapter", embedding_factors("model.embed_tokens", 8, 3))
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == SHAPES.keys()


def test_a_stored_head_that_config_calls_tied(tmp_path: Path) -> None:
    """Both in the file and said to be one: after a change of one, config.json must not tie them again."""
    base = write_base(tmp_path / "base", SHAPES | {HEAD: (8, 3)}, LLAMA)
    adapter = write_adapter(tmp_path / "adapter", embedding_factors("model.embed_tokens", 8, 3))
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert torch.equal(tensors_of(tmp_path / "out")[HEAD], tensors_of(base)[HEAD])


def test_an_encoder_decoder_is_refused_with_the_way_out(tmp_path: Path) -> None:
    config = {"architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True}
    base = write_base(tmp_path / "base", {"model.decoder.embed_tokens.weight": (8, 3)}, config)
    adapter = write_adapter(tmp_path / "adapter", embedding_factors("model.decoder.embed_tokens", 8, 3))
    with pytest.raises(MergeError, match="merge_and_unload"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_table_of_unknown_name_that_is_said_to_be_tied_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"net.table.weight": (8, 3)}, LLAMA)
    adapter = write_adapter(tmp_path / "adapter", embedding_factors("net.table", 8, 3))
    with pytest.raises(MergeError, match="whose name the files do not tell"):
        merge_checkpoint(base, adapter, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:.*shares its weight")
def test_shards_and_dtype_of_an_untied_head(tmp_path: Path) -> None:
    """The new tensor goes into the embedding's file, the index lists it, and its dtype is the result's."""
    model = tied_llama()
    base = save_base(model, tmp_path / "base", torch.bfloat16, shard="2KB")
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["embed_tokens"])
    merge_checkpoint(base, adapter, tmp_path / "out", dtype="float32", verify="full")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"][HEAD] == index["weight_map"][EMBEDDING]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())
    reference = merged_in_memory(load_base(model, base, torch.float32), [adapter])
    assert torch.equal(answer(load_base(model, tmp_path / "out")), answer(reference))
