"""Factors of stacked experts in another order than PEFT's, and files without all experts: asked for, or refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank
from expert_models import adapted, answer, mixture

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def by_expert(folder: Path, experts: int = 4) -> None:
    """In place: every stack's B (d, r·E) with the rank varying fastest, as some tools wrote it, and their mark."""
    tensors = load_file(folder / WEIGHTS)
    for key, tensor in tensors.items():
        if "experts" in key and "lora_B" in key:
            tensors[key] = tensor.unflatten(1, (-1, experts)).mT.flatten(1).contiguous()
    save_file(tensors, folder / WEIGHTS)
    change_config(folder, auto_mapping={"unsloth_fixed": True})


def change_config(folder: Path, **fields: object) -> None:
    """In place: other fields in adapter_config.json."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_the_other_packing_is_read_where_it_is_said(family: str, tmp_path: Path) -> None:
    model = adapted(mixture(family), target_modules=["lm_head"])
    lowrank.save_adapter(model, tmp_path / "peft")
    lowrank.save_adapter(model, tmp_path / "theirs")
    by_expert(tmp_path / "theirs")
    lowrank.convert_adapter(tmp_path / "theirs", tmp_path / "ours", experts_packed="by-expert")
    assert all(
        torch.equal(tensor, load_file(tmp_path / "peft" / WEIGHTS)[key])
        for key, tensor in load_file(tmp_path / "ours" / WEIGHTS).items()
    )
    other = mixture(family)
    lowrank.load_adapter(other, tmp_path / "ours")
    torch.testing.assert_close(answer(other), answer(model), rtol=1e-4, atol=1e-5)
    lowrank.convert_adapter(tmp_path / "theirs", tmp_path / "wrong", experts_packed="by-rank")
    scrambled = mixture(family)
    lowrank.load_adapter(scrambled, tmp_path / "wrong")
    assert not torch.allclose(answer(scrambled), answer(model), rtol=1e-2, atol=1e-2)


def test_what_files_do_not_tell_is_asked_and_never_guessed(tmp_path: Path) -> None:
    model = mixture("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    lowrank.save_adapter(adapted(model), tmp_path / "theirs")
    by_expert(tmp_path / "theirs")
    asked = r"packed B of stacked experts in two ways .*--experts-packed by-rank.* or `by-expert`"
    plain = mixture("qwen3_moe")
    for use in (
        lambda: lowrank.load_adapter(plain, tmp_path / "theirs"),
        lambda: lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "theirs", tmp_path / "out"),
        lambda: lowrank.resize_adapter(tmp_path / "theirs", tmp_path / "out", rank=1),
        lambda: lowrank.convert_adapter(tmp_path / "theirs", tmp_path / "out", to="vllm", model=tmp_path / "base"),
    ):
        with pytest.raises(lowrank.LowrankError, match=asked):
            use()
    assert not (tmp_path / "out").exists() and not any("lora" in name for name, _ in plain.named_modules())


def test_one_rank_an_expert_has_one_packing(tmp_path: Path) -> None:
    lowrank.save_adapter(adapted(mixture("qwen3_moe"), r=1), tmp_path / "theirs")
    change_config(tmp_path / "theirs", auto_mapping={"unsloth_fixed": True})
    lowrank.load_adapter(mixture("qwen3_moe"), tmp_path / "theirs")


def test_a_packing_of_what_has_none_is_a_wrong_call(tmp_path: Path) -> None:
    model = adapted(mixture("qwen3_moe"), target_modules=["q_proj"], target_parameters=None)
    lowrank.save_adapter(model, tmp_path / "dense")
    with pytest.raises(lowrank.LowrankError, match="has no stacked experts: leave experts_packed out"):
        lowrank.convert_adapter(tmp_path / "dense", tmp_path / "out", experts_packed="by-rank")
    with pytest.raises(lowrank.LowrankError, match='must be "by-rank" or "by-expert", not \'unsloth\''):
        lowrank.convert_adapter(tmp_path / "dense", tmp_path / "out", experts_packed="unsloth")
    assert not (tmp_path / "out").exists()


def test_files_with_half_the_experts_are_refused_by_name(tmp_path: Path) -> None:
    model = mixture("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    lowrank.save_adapter(adapted(model), tmp_path / "adapter")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    kept = {name: tensor for name, tensor in weights.items() if ".experts.2.up_proj" not in name}
    save_file(kept, tmp_path / "half" / "model.safetensors")
    with pytest.raises(lowrank.LowrankError, match=r"the base has no such experts, but .* not all of them"):
        lowrank.merge_checkpoint(tmp_path / "half", tmp_path / "adapter", tmp_path / "out")
    factors = load_file(tmp_path / "adapter" / WEIGHTS)
    halves = {
        key: (t[: t.shape[0] // 2] if ".lora_A." in key else t[:, : t.shape[1] // 2]).contiguous()
        for key, t in factors.items()
    }
    save_file(halves, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(lowrank.LowrankError, match=r"has A \[6, 32\] .* 4 experts of 32×32 at rank 3 want \[12, 32\]"):
        lowrank.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(lowrank.LowrankError, match=r"lora_A.weight has shape \[6, 32\], wanted \[12, 32\]"):
        lowrank.load_adapter(mixture("qwen3_moe"), tmp_path / "adapter")
    assert not (tmp_path / "out").exists()
