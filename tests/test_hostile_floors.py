"""Damaged adapters of stacked experts and of single rows, on every command that reads one: a sentence, nothing left."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import expert_models
import lowrank
from lowrank import LoraConfig
from lowrank.cli import main
from train_models import save_llama

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture and a Llama, each with an adapter beside it: of all stacks of experts, of three rows of the table."""
    folder = tmp_path_factory.mktemp("floors")
    mixture = expert_models.mixture("qwen3_moe")
    mixture.save_pretrained(folder / "mixture")
    lowrank.save_adapter(expert_models.adapted(mixture), folder / "experts")
    from transformers import AutoModelForCausalLM

    save_llama(folder / "llama")
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    lowrank.inject(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 9, 20]))
    lowrank.save_adapter(model, folder / "rows")
    return folder


def calls(adapter: str, base: str) -> list[list[str]]:
    """Every command that reads an adapter and needs no training."""
    return [
        ["inspect", adapter, "--model", base],
        ["merge", "--model", base, "--adapter", adapter, "--out", "out"],
        ["combine", "--adapter", adapter, "--adapter", f"{adapter}:0.5", "--out", "out"],
        ["resize", "--adapter", adapter, "--rank", "1", "--out", "out"],
        ["convert", "--source", adapter, "--to", "vllm", "--model", base, "--out", "out"],
        ["rank", "--adapter", adapter, "--out", "out"],
        ["generate", "--model", base, "--adapter", adapter, "--prompt", "the cat", "--max-new-tokens", "1"],
    ]


def config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))

    return spoil


def tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        made = {name: tensor.contiguous() for name, tensor in change(load_file(folder / WEIGHTS)).items()}
        save_file(made, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def of_rows(change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return tensors(lambda all_: {name: change(t) if "token_adapter" in name else t for name, t in all_.items()})


EXPERTS = {
    "half of the experts": tensors(lambda all_: {name: t[: len(t) // 2].clone() for name, t in all_.items()}),
    "vectors": tensors(lambda all_: {name: t.flatten() for name, t in all_.items()}),
    "four dimensions": tensors(lambda all_: {name: t[None, None] for name, t in all_.items()}),
    "empty": tensors(lambda all_: {name: t[:0].clone() for name, t in all_.items()}),
    "wide": tensors(lambda all_: {name: torch.zeros(3 * len(t), t.shape[1] + 1) for name, t in all_.items()}),
    "a rank of a billion": config(r=10**9),
}
ROWS = {
    "far": config(trainable_token_indices=[10**12, 3, 9]),
    "negative": config(trainable_token_indices=[-1, 3, 9]),
    "twice": config(trainable_token_indices=[3, 3, 9]),
    "beyond any integer": config(trainable_token_indices=[10**299, 3, 9]),
    "fractions": config(trainable_token_indices=[3.5, 1, 2]),
    "many": config(trainable_token_indices=list(range(200_000))),
    "of a module that is none": config(trainable_token_indices={"(" * 900: [1, 2, 3]}),
    "not finite": of_rows(lambda t: t * torch.nan),
    "a vector": of_rows(lambda t: t.flatten()),
}
ALL = [("experts", "mixture", name) for name in EXPERTS] + [("rows", "llama", name) for name in ROWS]


@pytest.mark.parametrize(("adapter", "base", "fault"), ALL, ids=[f"{one[0]}: {one[2]}" for one in ALL])
def test_a_damaged_adapter_is_one_sentence(adapter, base, fault, made, tmp_path, monkeypatch, capsys):
    for name in ("mixture", "llama"):
        (tmp_path / name).symlink_to(made / name)
    shutil.copytree(made / adapter, tmp_path / adapter)
    (EXPERTS if adapter == "experts" else ROWS)[fault](tmp_path / adapter)
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    for line in calls(adapter, base):
        status = main(line)
        said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("lowrank: error: ")]
        assert status == 2 and len(said) == 1 and len(said[0]) < 430 and said[0].isprintable(), (line, status, said)
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_sound_ones_are_read(made, tmp_path, monkeypatch):
    """So that what is refused above is refused for its fault."""
    monkeypatch.chdir(made)
    for adapter, base in (("experts", "mixture"), ("rows", "llama")):
        for line in calls(adapter, base):
            line = [str(tmp_path / f"{adapter}-{line[0]}") if word == "out" else word for word in line]
            if line[0] in ("inspect", "merge"):  # rows are not combined, and this mixture has no tokenizer
                assert main(line) == 0, line
