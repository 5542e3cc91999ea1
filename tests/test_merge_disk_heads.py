"""Tied heads that files do not store, family by family; what is said of weights that are missing or quantised."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank
from checkpoint_models import disturb
from lowrank import LoraConfig
from lowrank.analysis.inspection import inspect_adapter
from lowrank.errors import CheckpointError
from lowrank.merge.disk import merge_checkpoint
from merge_disk_models import linear_factors, write_adapter, write_base

K = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
G = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}
FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {  # class: (config, head, embedding)
    "GPTJForCausalLM": (G | {"rotary_dim": 4}, "lm_head", "wte"),
    "MambaForCausalLM": (K | {"state_size": 4}, "lm_head", "embeddings"),
    "ElectraForMaskedLM": (K | {"embedding_size": 16}, "generator_lm_head", "word_embeddings"),
    "AlbertForMaskedLM": (K | {"embedding_size": 16}, "predictions.decoder", "word_embeddings"),
    "ModernBertForMaskedLM": (K | {"pad_token_id": 0}, "decoder", "tok_embeddings"),
    "BioGptForCausalLM": (K | {"max_position_embeddings": 32}, "output_projection", "embed_tokens"),
    "CTRLLMHeadModel": (G | {"dff": 24}, "lm_head", "w"),
    "RoFormerForMaskedLM": (K | {"embedding_size": 16}, "cls.predictions.decoder", "word_embeddings"),
    "MPNetForMaskedLM": (K, "lm_head.decoder", "word_embeddings"),
    "GPTNeoXForCausalLM": (K | {"tie_word_embeddings": True}, "lm_head", "embed_in"),
}


def build(name: str) -> torch.nn.Module:
    import transformers

    stem = name.removesuffix("ForCausalLM").removesuffix("ForMaskedLM").removesuffix("LMHeadModel")
    config = getattr(transformers, f"{stem}Config")(**FAMILIES[name][0] | {"tie_word_embeddings": True})
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 7, 11, 2, 5]])).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", ["head", "embedding"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_tied_head_is_found_and_parted_as_in_memory(tmp_path: Path, name: str, side: str) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    target = FAMILIES[name][1 if side == "head" else 2]
    lowrank.inject(model, LoraConfig(r=2, lora_alpha=3, target_modules=[target]))
    disturb(model)
    lowrank.save_adapter(model, tmp_path / "adapter")
    wanted = logits(lowrank.merge_and_unload(model))
    before = logits(type(model).from_pretrained(tmp_path / "base").eval())
    assert float((wanted - before).abs().max()) > 1e-3
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", verify="full")
    assert torch.allclose(logits(type(model).from_pretrained(tmp_path / "merged").eval()), wanted, atol=1e-5)
    assert inspect_adapter(tmp_path / "adapter", tmp_path / "base").layers[0].base is not None


def test_a_head_whose_embedding_is_not_known_is_refused_in_true_words(tmp_path: Path) -> None:
    config = {"architectures": ["OddForCausalLM"], "tie_word_embeddings": True, "vocab_size": 8}
    base = write_base(tmp_path / "base", {"odd.table.weight": (8, 3)}, config)
    adapter = write_adapter(tmp_path / "adapter", linear_factors("odd_head", 8, 3))
    with pytest.raises(
        CheckpointError, match="odd_head is not stored in the base, where it may be one tensor with"
    ) as e:
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert "nearest" not in str(e.value)


def test_a_module_without_a_weight_is_not_its_own_nearest_name(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"layers.0.odd.bias": (6,), "layers.0.q_proj.weight": (6, 4)}, {})
    adapter = write_adapter(tmp_path / "adapter", linear_factors("layers.0.odd", 6, 4))
    with pytest.raises(CheckpointError, match=r"layers.0.odd has no weight in the base, only layers.0.odd.bias$"):
        merge_checkpoint(base, adapter, tmp_path / "out")


Q = "layers.0.q_proj"
STORED = {  # how programs store a quantised weight: the tensors that take its place, and what config.json says
    "gptq": ({f"{Q}.qweight": torch.zeros(1, 6, dtype=torch.int32)}, {"quant_method": "gptq"}),
    "awq": ({f"{Q}.qweight": torch.zeros(4, 1, dtype=torch.int32)}, {"quant_method": "awq"}),
    "GPTQ or AWQ": ({f"{Q}.qweight": torch.zeros(1, 6, dtype=torch.int32)}, None),
    "bitsandbytes": (
        {f"{Q}.weight": torch.zeros(12, 1, dtype=torch.uint8), f"{Q}.weight.absmax": torch.zeros(1)},
        None,
    ),
    "compressed-tensors": ({f"{Q}.weight_packed": torch.zeros(6, 1, dtype=torch.int32)}, None),
}


SENTENCES = {"bitsandbytes": "weight cannot be read: its part quant_state is missing"}


@pytest.mark.parametrize("method", STORED)
def test_a_quantised_base_is_said_to_be_one(tmp_path: Path, method: str) -> None:
    tensors, said = STORED[method]
    base = write_base(tmp_path / "base", {f"{Q}.weight": (6, 4), "layers.0.k_proj.weight": (6, 4)}, {})
    kept = {name: tensor for name, tensor in load_file(base / "model.safetensors").items() if not name.startswith(Q)}
    save_file(kept | tensors, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"quantization_config": said} if said else {}))
    adapter = write_adapter(tmp_path / "adapter", linear_factors(Q, 6, 4))
    for call in (lambda: merge_checkpoint(base, adapter, tmp_path / "out"), lambda: inspect_adapter(adapter, base)):
        with pytest.raises(
            CheckpointError, match=SENTENCES.get(method, rf"base is quantised \({method}.*give the model it")
        ):
            call()
    if method in SENTENCES:  # a damaged file, whatever the adapter changes
        return
    other = write_adapter(tmp_path / "other", linear_factors("layers.0.k_proj", 6, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_checkpoint(base, other, tmp_path / "out")  # a layer that was left as it is takes its change
