"""Runs told to other programs: what each is given, that none is imported unasked, and that none can end a training."""

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from lowrank import train
from lowrank.errors import ConfigError, LowrankWarning
from lowrank.train.settings import TrainSettings
from lowrank.train.sinks.sink import SINKS, check_sinks
from train_models import completion_rows, save_llama, write_jsonl


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    save_llama(home / "llama")
    write_jsonl(home / "rows.jsonl", completion_rows(24))
    return home


def run(home, out, **changes):
    asked = {"model": str(home / "llama"), "data": str(home / "rows.jsonl"), "out": str(out), "device": "cpu"}
    asked |= {"steps": 2, "eval_split": 0.25, "log_every": 1, "eval_every": 2}
    return train.run(TrainSettings(**asked | changes))


def fake(monkeypatch, name, calls, refuse=()):
    """A module of that name whose functions note what they are called with."""

    def note(what):
        def called(*args, **named):
            calls.append((what, args, named))
            if what in refuse:
                raise ConnectionError("no network")
            return SimpleNamespace(**{one: note(one) for one in ("log", "finish", "add_scalar", "flush", "close")})

        return called

    module = ModuleType(name)
    functions = "init log finish set_experiment start_run log_params log_metrics end_run SummaryWriter"
    for function in functions.split():
        setattr(module, function, note(function))
    monkeypatch.setitem(sys.modules, name, module)


def told(name, calls):
    """[(step, figures)] of what a fake was given."""
    if name == "tensorboard":
        return [(args[2], {args[0]: args[1]}) for what, args, _ in calls if what == "add_scalar"]
    return [(named["step"], args[0]) for what, args, named in calls if what in ("log", "log_metrics")]


@pytest.mark.parametrize("name", SINKS)
def test_what_a_sink_is_given(home, tmp_path, monkeypatch, name):
    calls = []
    fake(monkeypatch, SINKS[name], calls)
    result = run(home, tmp_path / "the-run", log_to=(name,))
    found = {}
    for step, figures in told(name, calls):
        found.setdefault(step, {}).update(figures)
    assert sorted(found) == [0, 1, 2]
    assert found[0]["eval/loss"] == result.before.loss
    assert found[2]["eval/loss"] == result.after.loss
    assert {"train/loss", "train/lr", "train/tokens_per_second", "train/memory_bytes"} <= found[1].keys()
    assert found[2]["eval/accuracy"] == result.after.accuracy
    assert calls[-1][0] in ("finish", "end_run", "close")
    said = repr(calls[:3])
    assert "the-run" in said
    assert name == "tensorboard" or "lowrank" in said


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_sink_that_fails_is_said_once_and_the_training_goes_on(home, tmp_path, monkeypatch, name):
    calls = []
    fake(monkeypatch, name, calls, refuse=("log", "log_metrics"))
    with pytest.warns(LowrankWarning, match=rf"--log-to {name}: it takes no more \(no network\)") as caught:
        assert run(home, tmp_path / "a", log_to=name).steps == 2
    assert len([one for one in caught if "takes no more" in str(one.message)]) == 1
    assert len(told(name, calls)) == 1
    run(home, tmp_path / "b")
    one, other = ((tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in "ab")
    assert one == other


def test_names_and_packages_that_are_not_there(home, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--log-to paper: not known, only tensorboard, wandb, mlflow, trackio"):
        run(home, tmp_path / "a", log_to="paper")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="--log-to wandb needs the package wandb: pip install wandb"):
        check_sinks(["wandb"])
    assert not (tmp_path / "a").exists()


def test_none_is_imported_unasked():
    code = f"import sys, lowrank.train.trainer; assert not {set(SINKS.values())!r} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_events_of_tensorboard_are_read_back(home, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(home, tmp_path / "a", log_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert events.Scalars("eval/loss")[-1].value == pytest.approx(result.after.loss)
