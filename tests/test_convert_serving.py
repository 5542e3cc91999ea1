"""Adapters of experts as vLLM and SGLang read them: keys and shapes of their loaders, and the same ΔW, also to us.

Their rules are read off their sources (September 2026) and kept here as slow, obvious readers; neither program is run.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank
from expert_models import adapted, answer, mixture
from lowrank.injection.adapters import lora_layers

LEAVES = {"mixtral": ("w1", "w3", "w2"), "phimoe": ("w1", "w3", "w2")}  # of others: gate, up, down


def written(family: str, folder: Path, **options: Any) -> nn.Module:
    """The base as a folder, and an adapter of all experts and of lm_head, of other ranks and scales."""
    model = mixture(family)
    model.save_pretrained(folder / "base")
    adapted(model, **{"target_modules": ["lm_head"], "rank_pattern": {"down_proj": 2}} | options)
    lowrank.save_adapter(model, folder / "adapter")
    return model


def changes(model: nn.Module) -> dict[str, Tensor]:
    """{stack: ΔW of every expert, (E, d, k)}."""
    found = {}
    for path, stack in lora_layers(model):
        factors = stack.factors("default")
        found[path] = (factors.scale * factors.b @ factors.a).detach()
    return found


def as_server(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """({module: ΔW by r and lora_alpha alone}, the config) of an adapter of matrices."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    names = {key.split(".lora_")[0] for key in tensors}
    assert set(tensors) == {f"{name}.lora_{role}.weight" for name in names for role in "AB"}
    found = {
        name.removeprefix("base_model.model."): scale
        * tensors[f"{name}.lora_B.weight"]
        @ tensors[f"{name}.lora_A.weight"]
        for name in names
    }
    return found, config


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "jamba", "nemotron_h"])
@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_experts_one_by_one_have_the_same_change_in_the_servers_words(family: str, server: str, tmp_path: Path) -> None:
    model = written(family, tmp_path)
    lowrank.convert_adapter(tmp_path / "adapter", tmp_path / "out", to=server, model=tmp_path / "base")
    got, config = as_server(tmp_path / "out")
    gate, up, down = LEAVES.get(family, ("gate_proj", "up_proj", "down_proj")) if server == "vllm" else (
        "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    count = 0
    for path, change in changes(model).items():
        if path == "lm_head":
            torch.testing.assert_close(got["lm_head"], change)
            continue
        root, _, leaf = path.rpartition(".")
        if server == "vllm":  # the names of checkpoints, which vLLM's modules have
            root = root.replace(".mlp.", ".block_sparse_moe.") if family == "mixtral" else root
            root = root.replace("model.", "backbone.") if family == "nemotron_h" else root
        words = {"gate_up_proj": (gate, up), "up_proj": (up,), "down_proj": (down,)}[leaf]
        for expert, matrix in enumerate(change):
            for word, rows in zip(words, matrix.chunk(len(words)), strict=True):
                torch.testing.assert_close(got[f"{root}.{expert}.{word}"], rows)
                count += 1
    assert len(got) == count + 1
    assert all(any(name.endswith(word) for word in config["target_modules"]) for name in got)
    assert not any("shared_experts.up_proj".endswith(word) for word in config["target_modules"])
    if server == "sglang":
        tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert {t.shape[0 if ".lora_A." in key else 1] for key, t in tensors.items()} == {config["r"]} == {3}
        assert "rank_pattern" not in config or not config["rank_pattern"]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "nemotron_h"])
def test_our_own_reader_answers_with_what_vllm_is_given(family: str, tmp_path: Path) -> None:
    model = written(family, tmp_path)
    lowrank.convert_adapter(tmp_path / "adapter", tmp_path / "out", to="vllm", model=tmp_path / "base")
    other = mixture(family)
    lowrank.load_adapter(other, tmp_path / "out")
    torch.testing.assert_close(answer(other), answer(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stacks", [r"\w+", "gate_up_proj", "down_proj"])
def test_classes_that_vllm_reads_as_stacks_get_both_of_them(stacks: str, tmp_path: Path) -> None:
    model = written("gpt_oss", tmp_path, target_parameters=rf".*\.experts\.{stacks}", rank_pattern={})
    report = lowrank.convert_adapter(tmp_path / "adapter", tmp_path / "out", to="vllm", model=tmp_path / "base")
    assert "both of every layer, as vLLM's GptOssForCausalLM" in str(report)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    wanted = changes(model)
    for layer in range(2):
        root = f"model.layers.{layer}.mlp.experts"
        for name, key in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
            a, b = (tensors.pop(f"base_model.model.{root}{key}.lora_{role}.weight") for role in "AB")
            a, b = a.reshape(4, -1, a.shape[1]), b.reshape(b.shape[0], -1, 4).permute(2, 0, 1)
            change = config["lora_alpha"] / config["r"] * b @ a
            torch.testing.assert_close(change, wanted.get(f"{root}.{name}", torch.zeros_like(change)))
    assert set(tensors) == {f"base_model.model.lm_head.lora_{role}.weight" for role in "AB"}
    other = mixture("gpt_oss")
    lowrank.load_adapter(other, tmp_path / "out")
    torch.testing.assert_close(answer(other), answer(model), rtol=1e-4, atol=1e-5)


def test_what_a_server_does_not_read_is_refused_and_nothing_written(tmp_path: Path) -> None:
    written("granitemoe", tmp_path)
    for to, model, message in (
        ("vllm", None, "vLLM reads experts in a layout that depends on the base: give it as --model"),
        ("sglang", None, "SGLang reads experts in a layout that depends on the base"),
        ("vllm", "base", r"experts.(gate_up|down)_proj: transformers' table .* has no names .* which vLLM reads"),
        ("sglang", "base", r"has no names for this model's single experts, which SGLang reads: merge"),
    ):
        with pytest.raises(lowrank.LowrankError, match=message):
            lowrank.convert_adapter(
                tmp_path / "adapter", tmp_path / "out", to=to, model=None if model is None else tmp_path / model
            )
        assert not (tmp_path / "out").exists()


def test_an_adapter_without_experts_is_peft_at_one_rank(tmp_path: Path) -> None:
    model = mixture("qwen3_moe")
    adapted(model, target_modules=["q_proj", "v_proj"], target_parameters=None, rank_pattern={"v_proj": 1})
    lowrank.save_adapter(model, tmp_path / "adapter")
    for server in ("vllm", "sglang"):
        lowrank.convert_adapter(tmp_path / "adapter", tmp_path / server, to=server)
        got, config = as_server(tmp_path / server)
        assert got.keys() == changes(model).keys() and config["r"] == 3
        for path, change in changes(model).items():
            torch.testing.assert_close(got[path], change)
