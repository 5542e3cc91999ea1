"""The law of a run: stopped after any step and gone on with, it gives the bytes of one that was never stopped."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank import train
from lowrank.errors import CheckpointError, ConfigError, LowrankWarning, OutputError
from lowrank.train import loop
from lowrank.train.evaluation import Scores
from lowrank.train.reporting import Reporter
from lowrank.train.state.randomness import draw_on, drawn
from lowrank.train.state.store import steps_kept
from output_cases import snapshot
from resumed_runs import ADAPTER, STEPS, Killed, KilledAfter, kill, made, make_home, settings
from train_models import completion_rows, save_llama, write_jsonl


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


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
    "held in four bits": {"quantise": "nf4", "targets": "q_proj,down_proj"},
    "labels": {"model": "bert", "data": "labels.jsonl", "targets": None, "dropout": 0.1},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_run_that_was_killed_gives_the_same_bytes(changes: dict[str, Any], home: Path, tmp_path: Path) -> None:
    """Killed in the third epoch, resumed, killed again, resumed in what looks like another process."""
    if "quantise" in changes:
        pytest.importorskip("bitsandbytes")
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
    assert sorted(os.listdir(out)) == sorted([*ADAPTER, "README.md", "log.jsonl", "run.json", "train.yaml"])


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


def test_nothing_that_the_process_drew_matters(home: Path, tmp_path: Path) -> None:
    """Python's and numpy's random numbers belong to a run too: some models drop layers by them."""

    class Draws(Reporter):
        def __init__(self) -> None:
            self.drawn: list[tuple[float, float, float]] = []

        def stepped(self, step: int) -> None:
            self.drawn.append((random.random(), float(numpy.random.normal()), float(torch.rand(()))))
            if step == 5 and len(self.drawn) == 5:
                raise Killed

    whole, first, second = Draws(), Draws(), Draws()
    whole.drawn.append((0.0, 0.0, 0.0))
    train.run(settings(home, tmp_path / "whole"), whole)
    before = random.getstate(), numpy.random.get_state()[1].tolist()
    with pytest.raises(Killed):
        train.run(settings(home, tmp_path / "killed"), first)
    train.resume(tmp_path / "killed", second)
    assert first.drawn[:4] + second.drawn == whole.drawn[1:]
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before


def test_the_same_seed_gives_the_same_checkpoint(home: Path, tmp_path: Path) -> None:
    files = []
    for name in ("one", "other"):
        kill(settings(home, tmp_path / name, dropout=0.1), 5)
        files.append((tmp_path / name / "checkpoints" / "step-4" / "state.safetensors").read_bytes())
    assert files[0] == files[1]


def test_kept_checkpoints_stay_and_a_complete_run_can_take_more_steps(home: Path, tmp_path: Path) -> None:
    """Of a constant rate the longer run is one: the first steps are the same."""
    how: dict[str, Any] = {"schedule": "constant", "warmup": 0.0, "dropout": 0.1}
    train.run(settings(home, tmp_path / "whole", steps=12, **how))
    out = tmp_path / "short"
    train.run(settings(home, out, keep_checkpoints=2, **how))
    assert steps_kept(out) == [8, 9]
    before = made(out)
    assert train.resume(out).steps == 9 and made(out) == before  # there is nothing left to do
    train.resume(out, steps=12, keep_checkpoints=1)
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert steps_kept(out) == [12]
    peft_reads(out, home)


def peft_reads(folder: Path, home: Path) -> None:
    import peft

    from lowrank.train.models import load_causal

    peft.PeftModel.from_pretrained(load_causal(home / "llama", torch.float32), folder)


def test_the_best_checkpoint_is_kept(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([5.0, 3.0, 1.0, 2.0, 4.0, 2.0])  # after 0, 2, 4, ... steps
    monkeypatch.setattr(loop, "score", lambda *_: Scores(next(losses), 1))
    out = tmp_path / "run"
    how = {"eval_data": str(home / "unseen.jsonl"), "eval_every": 2, "save_every": 1, "keep_checkpoints": 1}
    result = train.run(settings(home, out, **how))
    assert result.best is not None and result.best[0] == 4
    assert steps_kept(out) == [4, STEPS]


def test_a_run_that_had_no_patience_is_complete(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the evaluation that was one too many, it takes no further step; then there is nothing to do."""
    by_step = {0: 5.0, 2: 3.0, 4: 4.0, 6: 5.0}
    monkeypatch.setattr(loop, "score", lambda *_: Scores(next(losses), 1))
    how = {"eval_data": str(home / "unseen.jsonl"), "eval_every": 2, "patience": 2, "dropout": 0.1}
    losses = iter(by_step.values())
    assert train.run(settings(home, tmp_path / "whole", **how)).steps == 6
    losses = iter(by_step.values())
    with monkeypatch.context() as patch:
        patch.setattr(loop, "out_of_patience", lambda found, _: kill_at_last(found))
        with pytest.raises(Killed):
            train.run(settings(home, tmp_path / "killed", **how))
    for _ in range(2):
        assert train.resume(tmp_path / "killed").steps == 6
    assert made(tmp_path / "killed") == made(tmp_path / "whole")


def kill_at_last(evaluations: list[tuple[int, Scores]]) -> bool:
    if evaluations[-1][0] == 6:
        raise Killed
    return False


def test_a_run_without_a_checkpoint_begins_anew(home: Path, tmp_path: Path) -> None:
    train.run(settings(home, tmp_path / "whole"))
    kill(settings(home, tmp_path / "killed"), 1)
    train.resume(tmp_path / "killed")
    assert made(tmp_path / "killed") == made(tmp_path / "whole")


def test_a_checkpoint_that_is_damaged_is_said_and_the_one_before_it_taken(home: Path, tmp_path: Path) -> None:
    train.run(settings(home, tmp_path / "whole"))
    out = tmp_path / "killed"
    kill(settings(home, out), 7)
    assert steps_kept(out) == [4, 6]
    tensors = out / "checkpoints" / "step-6" / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-5])
    with pytest.warns(LowrankWarning, match=r"step-6.*5 bytes too short.*goes on from an earlier one"):
        train.resume(out)
    assert made(out) == made(tmp_path / "whole")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: {k: v[:1] if ".exp_avg." in k else v for k, v in t.items()}, r"exp_avg\..* is \(1, .*in the checkp"),
        (lambda t: {k: v for k, v in t.items() if ".exp_avg_sq." not in k}, r"the checkpoint lacks exp_avg_sq of "),
        (lambda t: t | {"random.torch": t["random.torch"][:7]}, r"random states are none \("),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_a_sentence(damage: Any, said: str, home: Path, tmp_path: Path) -> None:
    """Well formed, and of something else: what the optimiser remembers, the random states."""
    out = tmp_path / "killed"
    kill(settings(home, out), 3)
    file = out / "checkpoints" / "step-2" / "state.safetensors"
    save_file(damage(load_file(file)), file)
    with pytest.raises(CheckpointError, match=said):
        train.resume(out)


@pytest.mark.parametrize(("words", "place"), [([1, 2, 3], 1), ([2**40] * 625, 1), ([2] * 620, 2**70)])
def test_random_states_that_cannot_be_are_a_sentence(words: list[int], place: int) -> None:
    tensors, facts = drawn(torch.device("cpu"))
    for wrong in ({"python": (words, None)}, {"numpy": (words[:620], place, 0, 0.0)}):
        with pytest.raises(CheckpointError, match="the checkpoint's random states are none"):
            draw_on(torch.device("cpu"), tensors, facts.model_copy(update=wrong))
    draw_on(torch.device("cpu"), tensors, facts)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"lr": 0.5, "rank": 7}, r"--lr 0.5 \(the run has 0.01\), --rank 7 \(the run has 3\) cannot change on the way"),
    ({"micro_batch": 3}, r"--micro-batch 3 \(the run has None\)"),
    ({"seed": 1}, r"--seed 1 \(the run has 0\)"),
    ({"steps": 3}, "the run is at step 4 already, and 3 are asked for"),
    ({"keep": "best", "eval_data": "unseen.jsonl"}, "--keep best"),
    ({"wormup": 1}, "did you mean 'warmup'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_may_not_change_is_named(changes: dict[str, Any], message: str, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    kill(settings(home, out), 5)
    before = snapshot(out)
    if "eval_data" in changes:
        changes = {**changes, "eval_data": str(home / "unseen.jsonl")}
    with pytest.raises(ConfigError, match=message):
        train.resume(out, **changes)
    assert snapshot(out) == before


def test_what_may_change(home: Path, tmp_path: Path) -> None:
    """Places, how often something is looked at, and evaluation: no bit of the adapter depends on them."""
    train.run(settings(home, tmp_path / "whole", dropout=0.1))
    moved = write_jsonl(tmp_path / "moved.jsonl", completion_rows(21))
    kill(settings(home, tmp_path / "run", dropout=0.1), 5)
    (tmp_path / "run").rename(tmp_path / "renamed")
    unseen = str(home / "unseen.jsonl")
    train.resume(tmp_path / "renamed", data=str(moved), save_every=1, log_every=1, eval_data=unseen, eval_every=3)
    name = "adapter_model.safetensors"
    assert (tmp_path / "renamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def other_rows(folder: Path) -> None:
    write_jsonl(folder / "rows.jsonl", completion_rows(21, seed=3))


def other_base(folder: Path) -> None:
    save_llama(folder / "llama", seed=8)


def other_words(folder: Path) -> None:
    path = folder / "llama" / "tokenizer.json"
    path.write_text(path.read_text().replace('"red"', '"rot"'))


@pytest.mark.parametrize(
    ("change", "message"),
    [(other_rows, "the data"), (other_base, "the base model"), (other_words, "the tokenizer, what the rows become")],
)
def test_what_a_run_is_made_of_is_compared(change: Any, message: str, tmp_path: Path) -> None:
    save_llama(tmp_path / "llama")
    write_jsonl(tmp_path / "rows.jsonl", completion_rows(21))
    kill(settings(tmp_path, tmp_path / "run"), 5)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=f"{message}.*not what the run began with"):
        train.resume(tmp_path / "run")


def test_another_machine_is_said(home: Path, tmp_path: Path) -> None:
    kill(settings(home, tmp_path / "run"), 5)
    facts = tmp_path / "run" / "checkpoints" / "step-4" / "state.json"
    facts.write_text(facts.read_text().replace(torch.__version__, "1.0"))
    with pytest.warns(LowrankWarning, match=r"torch .* \(was 1\.0\): the run goes on, but not bit for bit"):
        train.resume(tmp_path / "run")


@pytest.mark.parametrize("changes", [{"optimizer": "adamw8bit"}, {"quantise": "nf4"}], ids=["optimiser", "base"])
def test_another_bitsandbytes_is_said_where_it_makes_numbers(
    changes: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    kill(settings(home, tmp_path / "plain"), 5)
    assert '"bitsandbytes"' not in (tmp_path / "plain" / "checkpoints" / "step-4" / "state.json").read_text()
    kill(settings(home, tmp_path / "run", **changes), 5)
    facts = tmp_path / "run" / "checkpoints" / "step-4" / "state.json"
    content = json.loads(facts.read_text())
    content["about"]["machine"]["bitsandbytes"] = "0.1"
    facts.write_text(json.dumps(content))
    with pytest.warns(LowrankWarning, match=r"bitsandbytes .* \(was 0\.1\): the run goes on, but not bit for bit"):
        train.resume(tmp_path / "run")


def test_where_there_is_no_run(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no run, it holds no train\.yaml"):
        train.resume(tmp_path)
    train.run(settings(home, tmp_path / "run"))
    with pytest.raises(ConfigError, match="complete and its checkpoints are gone"):
        train.resume(tmp_path / "run", steps=20)
    kill(settings(home, tmp_path / "other"), 5)
    with pytest.raises(OutputError, match="a run that is not finished: go on with --resume"):
        train.run(settings(home, tmp_path / "other"))
