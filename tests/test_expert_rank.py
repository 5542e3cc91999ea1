"""`lowrank rank` on mixtures: every expert's own gradient, one rank for a stack, and one for each trained expert."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from expert_models import answer, mixture
from lowrank import LoraConfig
from lowrank.adapters.proposal import adapter_spectra
from lowrank.checkpoint.read import read_with_stacks
from lowrank.cli import main
from lowrank.core.sketch import Directions
from lowrank.injection.planning import plan
from lowrank.study.rank import AdapterRankSettings, from_adapter
from lowrank.study.rank.gradients import empty_sketches, watched
from test_expert_resize import adapter, changes
from train_models import completion_rows, tokenizer, write_jsonl

__all__ = ["adapter"]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_every_expert_is_given_its_own_gradient(family: str) -> None:
    model = mixture(family)
    entries = [entry for entry in plan(model, LoraConfig(r=2, target_modules="all-linear")).entries if entry.experts]
    parameters = [model.get_parameter(entry.path) for entry in entries]
    exact = torch.autograd.grad(answer(model).square().sum(), parameters)
    sketches = {entry.path: empty_sketches(entry, Directions(4, 0, torch.device("cpu"))) for entry in entries}
    with watched(model, tuple(entries), sketches):
        torch.autograd.backward(answer(model).square().sum())
    assert len(entries) == 4
    for entry, stack in zip(entries, exact, strict=True):
        matrices = stack.mT if family != "mixtral" else stack
        for sketch, matrix in zip(sketches[entry.path], matrices, strict=True):
            assert matrix.shape == (entry.d, entry.k)
            torch.testing.assert_close(sketch.whole, matrix, rtol=1e-4, atol=1e-5 * float(stack.norm()))


def test_what_is_proposed_for_stacks_can_be_trained_and_costs_no_more(tmp_path: Path, capsys: Any) -> None:
    mixture("mixtral", vocab_size=len(tokenizer())).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    data = write_jsonl(tmp_path / "skill.jsonl", completion_rows(20))
    ranks = tmp_path / "ranks.yaml"
    base = ["--model", str(tmp_path / "base"), "--data", str(data), "--device", "cpu"]
    wanted = ["--targets", "all-linear", "--rank", "3", "--out", str(ranks)]
    assert main(["rank", *base, *wanted]) == 0
    said = capsys.readouterr().out
    assert "4×96×32" in said and "The experts of a stack have one rank in training" in said
    assert main(["rank", *base, *wanted, "--force", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(module["cost"] * module["rank"] for module in found["modules"]) <= found["budget"]
    assert main(["train", "--config", str(ranks), *base, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    trained = read_with_stacks(tmp_path / "run")
    numbers = sum(tensor.numel() for tensors in trained.low_rank.values() for tensor in tensors.values())
    assert numbers == found["parameters"] <= sum(module["cost"] * 3 for module in found["modules"])
    assert {module["rank"] for module in found["modules"] if module["experts"]} - {3}  # the stacks were chosen for


def test_experts_of_a_trained_adapter_are_modules_that_resize_takes(adapter: Path, tmp_path: Path) -> None:
    choice = from_adapter(AdapterRankSettings(adapter=str(adapter), energy=0.8))
    wanted = {module.path: rank for module, rank in zip(choice.proposal.modules, choice.proposal.ranks, strict=True)}
    assert len(wanted) == 2 * 4 + 1 and len(set(wanted.values())) > 1
    dense = changes(adapter)
    for module, rank in zip(choice.proposal.modules, choice.proposal.ranks, strict=True):
        root, _, leaf = module.path.rpartition(".")
        change = dense["q_proj"][0] if module.stack is None else dense[f"experts.{leaf}"][int(root.split(".")[-1])]
        kept = torch.linalg.svdvals(change).square().cumsum(0) / change.square().sum()
        assert kept[rank - 1] >= 0.8 - 1e-4 and (rank == 1 or kept[rank - 2] < 0.8 + 1e-4)
    ranks = tmp_path / "ranks.yaml"
    assert main(["rank", "--adapter", str(adapter), "--energy", "0.8", "--out", str(ranks)]) == 0
    assert "experts.3.down_proj" in str(yaml.safe_load(ranks.read_text()))
    assert main(["resize", "--adapter", str(adapter), "--ranks", str(ranks), "--out", str(tmp_path / "out")]) == 0
    after = {module.path: module for module in adapter_spectra(tmp_path / "out")}
    before = {module.path: module for module in adapter_spectra(adapter)}
    assert after.keys() == wanted.keys()
    for path, rank in wanted.items():
        assert after[path].total == pytest.approx(before[path].held_by(rank), rel=1e-4)
    assert any("largest rank of its experts" in note for note in choice.notes)
