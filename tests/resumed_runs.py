"""Short trainings that are killed and gone on with, for the tests of going on."""

import json
from pathlib import Path
from typing import Any

import pytest

from lowrank import train
from lowrank.train.reporting import Reporter
from lowrank.train.settings import TrainSettings
from train_models import completion_rows, label_rows, save_bert, save_llama, write_jsonl

ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "lowrank.json")
STEPS = 9


def make_home(home: Path) -> Path:
    """Models and rows in a folder."""
    save_llama(home / "llama")
    save_bert(home / "bert")
    write_jsonl(home / "rows.jsonl", completion_rows(21))
    write_jsonl(home / "unseen.jsonl", completion_rows(5, seed=5))
    write_jsonl(home / "labels.jsonl", label_rows(21))
    return home


def settings(home: Path, out: Path, **changes: Any) -> TrainSettings:
    """Of a short training with a checkpoint after every second step."""
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
        """After every step."""
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
    """Begin a run that is killed after a step."""
    with pytest.raises(Killed):
        train.run(asked, KilledAfter(step))
