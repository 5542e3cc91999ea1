"""The law of a run: stopped after any step and gone on with, it gives the bytes of one that was never stopped."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank import train
from lowrank.train.reporting import Reporter
from lowrank.train.settings import TrainSettings
from lowrank.train.state.store import steps_kept
from train_models import completion_rows, label_rows, save_bert, save_llama, write_jsonl

ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "lowrank.json")
STEPS = 9


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_llama(home / "llama")
    save_bert(home / "bert")
    write_jsonl(home / "rows.jsonl", completion_rows(21))
    write_jsonl(home / "unseen.jsonl", completion_rows(5, seed=5))
    write_jsonl(home / "labels.jsonl", label_rows(21))
    return home


def settings(home: Path, out: Path, **changes: Any) -> TrainSettings:
    basic: dict[str, Any] = {"model": str(home / "llama"), "data": str(home / "rows.jsonl"), "out": str(out)}
    basic |= {"targets": "all-linear", "rank": 3, "alpha": 5, "lr": 1e-2, "device": "cpu"}
    basic |= {"steps": STEPS, "batch_size": 6, "log_every": 2, "save_every": 2}
    return TrainSettings.model_validate({**basic, **changes})


class Killed(BaseException):
    """As kill -9 would: nothing is written after it."""


class KilledAfter(Reporter):
    """The process is gone as soon as a step is taken, before anything else is done at it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, step: int) -> None:
        if step == self.step:
            raise Killed


def made(out: Path) -> dict[str, Any]:
    """What a run gave: the files of its adapter, and its log without what a clock says."""
    found: dict[str, Any] = {name: (out / name).read_bytes() for name in ADAPTER}
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    clocks = ("seconds", "tokens_per_second", "memory_bytes")
    found["log"] = [{name: value for name, value in line.items() if name not in clocks} for line in lines]
    found["run"] = json.loads((out / "run.json").read_text())
    return found


def kill(asked: TrainSettings, step: int) -> None:
    with pytest.raises(Killed):
        train.run(asked, KilledAfter(step))


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.2},
    "accumulated": {"micro_batch": 2, "dropout": 0.1},
    "packed": {"pack": True, "max_length": 40, "batch_size": 2, "dropout": 0.1},
    "by length": {"group_by_length": True},
    "checkpointed": {"gradient_checkpointing": True, "dropout": 0.1},
    "bfloat16": {"dtype": "bfloat16", "dropout": 0.1},
    "bfloat16 with a whole module": {"dtype": "bfloat16", "modules_to_save": "lm_head", "bias": "none"},
    "the best": {"keep": "best", "eval_data": "unseen.jsonl", "eval_every": 3, "schedule": "constant", "lr": 0.1},
    "pissa and dora": {"init": "pissa", "dora": True, "targets": "q_proj,down_proj"},
    "labels": {"model": "bert", "data": "labels.jsonl", "targets": None, "dropout": 0.1},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_run_that_was_killed_gives_the_same_bytes(changes: dict[str, Any], home: Path, tmp_path: Path) -> None:
    """Killed in the third epoch, resumed, killed again, resumed in what looks like another process."""
    named = ("model", "data", "eval_data")
    changes = {name: str(home / value) if name in named else value for name, value in changes.items()}
    train.run(settings(home, tmp_path / "whole", **changes))
    out = tmp_path / "killed"
    kill(settings(home, out, **changes), 5)
    assert not (out / "run.json").exists() and steps_kept(out)
    heap = [torch.empty(37 * i % 4099 + 1) for i in range(999)][::2]
    with pytest.raises(Killed):
        train.resume(out, KilledAfter(8))
    torch.manual_seed(99)  # the process's own random numbers do not matter
    result = train.resume(out)
    del heap
    assert made(out) == made(tmp_path / "whole")
    assert result.steps == STEPS
    assert not (out / "checkpoints").exists()
    assert sorted(os.listdir(out)) == sorted([*ADAPTER, "log.jsonl", "run.json", "train.yaml"])


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_after_any_step(step: int, home: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"dropout": 0.1, "micro_batch": 4, "eval_data": str(home / "unseen.jsonl"), "eval_every": 4}
    whole = home / "any"
    if not whole.exists():
        train.run(settings(home, whole, **how))
    out = tmp_path / "killed"
    kill(settings(home, out, save_every=1, **how), step)
    assert steps_kept(out)[-1:] == ([step - 1] if step > 1 else [])  # no more is lost than the work since the last one
    train.resume(out)
    assert made(out) == made(whole)
