"""Extracting an adapter from two checkpoints: exact where the difference is low-rank, the best otherwise."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank
from checkpoint_models import answer, disturb, gpt2, llama
from combination_oracle import truncated
from lowrank import LoraConfig
from lowrank.adapters.differences import pair
from lowrank.adapters.extract import extract_adapter
from lowrank.errors import CheckpointError, ConfigError, LowrankError, MergeError
from lowrank.modelfiles.base import read_base


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def untied():
    """GPT-2 with an output head of its own, so that its embedding can be adapted alone."""
    model = gpt2()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone() + 0.1)
    return model


@torch.no_grad()
def moved(model, names=("weight", "bias"), seed=3, size=0.05):
    """In place: a full fine-tuning's kind of change: every parameter whose name ends in one of `names`."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(names):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return model


def by_us(model, folder):
    lowrank.load_adapter(model, folder)
    return answer(model)


def by_peft(model, folder):
    from peft import PeftModel

    return answer(PeftModel.from_pretrained(model, folder).eval())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_extracting_a_merged_adapter_gives_it_back(tmp_path, build, exact):
    model = build()
    save(model, tmp_path / "base")
    targets = ["q_proj", "down_proj"] if build is llama else ["c_attn", "c_fc"]
    lowrank.inject(model, LoraConfig(r=3, lora_alpha=7, target_modules=targets))
    disturb(model)
    wanted = answer(model)
    save(lowrank.merge_and_unload(model), tmp_path / "tuned")
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=3, exact=exact)
    assert len(report.modules) == 4
    assert report.kept == pytest.approx(1.0, abs=1e-6)
    assert report.unexpressed == ()
    assert (wanted - answer(build())).abs().max() > 0.05
    assert torch.allclose(by_us(build(), tmp_path / "out"), wanted, atol=1e-4)
    assert torch.allclose(by_peft(build(), tmp_path / "out"), wanted, atol=1e-4)


@pytest.mark.parametrize("exact", [True, False])
def test_every_module_is_the_best_of_its_rank_and_the_report_is_true(tmp_path, exact):
    base, tuned = llama(), moved(llama())
    save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned")
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=4, exact=exact)
    assert len(report.modules) == 2 * 7 + 1  # all matrices and the head
    model = llama()
    lowrank.load_adapter(model, tmp_path / "out")
    result = lowrank.merge_and_unload(model)
    for module in report.modules:
        wanted = (tuned.get_submodule(module.path).weight - base.get_submodule(module.path).weight).detach().double()
        got = (result.get_submodule(module.path).weight - base.get_submodule(module.path).weight).detach().double()
        assert module.norm == pytest.approx(float(wanted.norm()), rel=1e-5)
        assert torch.allclose(got, truncated(wanted, 4), atol=1e-5)
        assert module.kept == pytest.approx(1 - float((wanted - got).square().sum() / wanted.square().sum()), abs=1e-4)
    assert {lost.name for lost in report.unexpressed} == {
        name for name, _ in base.named_parameters() if "norm" in name or "embed" in name
    }
    norm = next(lost for lost in report.unexpressed if lost.name == "model.norm.weight")
    change = tuned.get_parameter(norm.name) - base.get_parameter(norm.name)
    assert norm.norm == pytest.approx(float(change.detach().norm()), rel=1e-5)
    assert "not expressed" in str(report)


def test_energy_gives_every_module_the_rank_it_needs(tmp_path):
    base, tuned = llama(), moved(llama())
    save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned")
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", energy=0.8)
    assert len({module.rank for module in report.modules}) > 1
    for module in report.modules:
        delta = (tuned.get_submodule(module.path).weight - base.get_submodule(module.path).weight).detach().double()
        shares = torch.linalg.svdvals(delta).square().cumsum(0)
        assert module.rank == int((shares / shares[-1] < 0.8).sum()) + 1
        assert module.kept >= 0.8 - 1e-6
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    assert torch.allclose(by_peft(llama(), tmp_path / "out"), by_us(llama(), tmp_path / "out"), atol=1e-5)
    capped = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "two", energy=0.8, rank=5)
    assert {m.path: m.rank for m in capped.modules} == {m.path: min(m.rank, 5) for m in report.modules}


@pytest.mark.parametrize("build", [llama, untied])
def test_with_the_rest_in_full_and_all_the_rank_nothing_is_lost(tmp_path, build):
    base, tuned = build(), moved(build())
    save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned")
    report = extract_adapter(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=99, embeddings=True, save_rest=True
    )
    assert report.unexpressed == ()
    assert report.whole
    wanted = answer(tuned)
    assert torch.allclose(by_us(build(), tmp_path / "out"), wanted, atol=2e-4)
    assert torch.allclose(by_peft(build(), tmp_path / "out"), wanted, atol=2e-4)


def test_a_tied_table_changes_the_head_too(tmp_path):
    """GPT-2 stores one table for both ends: the adapter must change both, or its answers are others."""
    base, tuned = gpt2(), moved(gpt2(), names=("wte.weight",))
    save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned")
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=99, embeddings=True)
    assert [module.path for module in report.modules] == ["transformer.wte", "lm_head"]
    assert torch.allclose(by_us(gpt2(), tmp_path / "out"), answer(tuned), atol=2e-4)


def test_targets_limit_what_is_adapted(tmp_path):
    save(llama(), tmp_path / "base"), save(moved(llama()), tmp_path / "tuned")
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2, targets=["q_proj"])
    assert {module.path for module in report.modules} == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert any(lost.why == "it is none of the targets" for lost in report.unexpressed)


def test_a_block_at_a_time_is_the_same_as_all_at_once(tmp_path, monkeypatch):
    base, tuned = llama(), moved(llama())
    save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned")
    whole = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "whole", rank=3)
    monkeypatch.setattr("lowrank.adapters.extract.DENSE_ELEMENTS", 0)
    monkeypatch.setattr("lowrank.core.merging.BLOCK_ELEMENTS", 64)
    blocks = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "blocks", rank=3)
    for one, other in zip(whole.modules, blocks.modules, strict=True):
        assert one.kept == pytest.approx(other.kept, abs=1e-5)


def test_sharded_half_precision_and_renamed_checkpoints(tmp_path):
    base, tuned = llama().bfloat16(), moved(llama()).bfloat16()
    base.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    save(tuned, tmp_path / "tuned")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists()
    first = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "one", rank=3)
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    renamed = {name.replace("model.layers", "model.language_model.layers"): t for name, t in tensors.items()}
    save_file(renamed, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    second = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "two", rank=3)
    assert {m.path for m in first.modules} == {m.path for m in second.modules}
    delta = (tuned.lm_head.weight.float() - base.lm_head.weight.float()).detach()
    head = next(module for module in first.modules if module.path == "lm_head")
    assert head.norm == pytest.approx(float(delta.norm()), rel=1e-5)


def test_a_prefix_puts_the_names_where_the_model_has_them(tmp_path):
    save(gpt2().transformer, tmp_path / "base"), save(moved(gpt2()).transformer, tmp_path / "tuned")
    extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2, prefix="transformer.")
    model = gpt2()
    lowrank.load_adapter(model, tmp_path / "out")
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight" in keys


def test_the_same_call_writes_the_same_bytes(tmp_path):
    save(llama(), tmp_path / "base"), save(moved(llama()), tmp_path / "tuned")
    for name in ("one", "two"):
        extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / name, rank=3)
    for file in ("adapter_model.safetensors", "adapter_config.json", "lowrank.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_changed_vocabulary_is_told_not_guessed(tmp_path):
    save(llama(), tmp_path / "base")
    tuned = moved(llama())
    tuned.resize_token_embeddings(40, mean_resizing=False)
    save(tuned, tmp_path / "tuned")
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=3, save_rest=True)
    told = {lost.name: lost.why for lost in report.unexpressed}
    assert set(told) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert "shape changed from [32, 16] to [40, 16]" in told["lm_head.weight"]


def test_wrong_calls_are_one_sentence_and_leave_nothing(tmp_path):
    save(llama(), tmp_path / "base"), save(moved(llama()), tmp_path / "tuned")
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    broken = shutil.copytree(tmp_path / "tuned", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((tmp_path / "tuned" / "model.safetensors").read_bytes()[:-9])
    spoilt = shutil.copytree(tmp_path / "tuned", tmp_path / "spoilt")
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = math.nan
    save_file(tensors, spoilt / "model.safetensors")
    other = save(gpt2(), tmp_path / "other")
    calls = {
        "give a rank, or the share": {"rank": None},
        "rank must be a whole number": {"rank": -1},
        "energy must be a share": {"energy": 1.2},
        "there is no model at": {"base": tmp_path / "nowhere"},
        "no matrix to adapt differs": {"tuned": tmp_path / "copy"},
        "do the targets name the right modules": {"targets": ["query"]},
        "short for its header": {"tuned": broken},
        "up_proj.weight holds values that are not finite": {"tuned": spoilt},
        "have no tensor in common": {"tuned": other},
        "is the base model itself": {"out": tmp_path / "base"},
    }
    for message, call in calls.items():
        arguments = {"base": tmp_path / "base", "tuned": tmp_path / "tuned", "out": tmp_path / "out", "rank": 2} | call
        with pytest.raises(LowrankError, match=message) as caught:
            extract_adapter(**arguments)
        assert isinstance(caught.value, ConfigError | MergeError | CheckpointError)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_numbers_and_bytes_without_a_shape_or_a_value_do_not_matter(tmp_path):
    for name, step in (("base", 1), ("tuned", 2)):
        generator = torch.Generator().manual_seed(step)
        tensors = {
            "norm.num_batches_tracked": torch.tensor(step),
            "empty.weight": torch.zeros(0, 4),
            "mask": torch.tensor([True, False]),
            "lin.weight": torch.randn(6, 5, generator=generator),
            "lin.quantised.weight": torch.ones(4, 4, dtype=torch.int8) * step,
        }
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    pairing = pair(read_base(tmp_path / "base"), read_base(tmp_path / "tuned"))
    same = {one.name for one in pairing.shared if one.identical}
    assert same == {"empty.weight", "mask"}
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
    assert [module.path for module in report.modules] == ["lin"]
    assert {lost.name for lost in report.unexpressed} == {"norm.num_batches_tracked", "lin.quantised.weight"}
