"""Whole runs over numbers and preferences: learned, kept with how they were made, evaluated again."""

import json

import pytest

from lowrank import train
from lowrank.errors import ConfigError, LowrankWarning
from lowrank.train.settings import EvalSettings, TrainSettings
from train_models import THINGS, save_bert, save_llama, write_jsonl


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two models; texts with a star for each very; answers of which the one with the colour first is chosen."""
    home = tmp_path_factory.mktemp("home")
    save_llama(home / "llama")
    save_bert(home / "bert")
    texts = [
        {"text": f"the {thing} is {'very ' * n}good", "label": n + 0.5 if thing == "cat" else n}
        for thing in THINGS
        for n in range(5)
    ]
    write_jsonl(home / "stars.jsonl", texts * 2)
    write_jsonl(home / "whole.jsonl", [row for row in texts if isinstance(row["label"], int)])
    pairs = [
        {"prompt": f"what is the {thing} ?", "chosen": f"red {thing}", "rejected": f"{thing} red"} for thing in THINGS
    ]
    write_jsonl(home / "pairs.jsonl", pairs * 4)
    return home


def settings(home, out, **changes):
    common = {"steps": 40, "lr": 1e-2, "batch_size": 8, "targets": "all-linear", "device": "cpu", "log_every": 20}
    return TrainSettings(**{"out": str(out), "model": str(home / "llama"), **common, **changes})


def evaluated(home, folder, **changes):
    """The result of `eval` of the adapter in a folder, or of the bare model."""
    adapter = folder and str(folder)
    basic = {"model": str(home / "llama"), "adapter": adapter, "device": "cpu"}
    return train.evaluate(EvalSettings(**{**basic, **changes}))


@pytest.mark.parametrize("model, correlation", [("bert", 0.6), ("llama", 0.75)])
def test_numbers_are_learned(home, tmp_path, model, correlation):
    asked = settings(home, tmp_path / "a", model=str(home / model), data=str(home / "stars.jsonl"), eval_split=0.2)
    result = train.run(asked)
    assert result.after.loss < 0.3 * result.before.loss
    assert result.after.figures["pearson"] > correlation and result.after.figures["spearman"] > correlation
    found = evaluated(home, tmp_path / "a", model=str(home / model), data=str(home / "stars.jsonl"))
    assert found.kind == "regression" and found.scores.figures["pearson"] > correlation
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["evaluations"][-1]["pearson"] == result.after.figures["pearson"]


def test_whole_numbers_are_numbers_to_what_learned_numbers(home, tmp_path):
    train.run(
        settings(home, tmp_path / "a", data=str(home / "stars.jsonl"), eval_data=str(home / "whole.jsonl"), steps=2)
    )
    assert evaluated(home, tmp_path / "a", data=str(home / "whole.jsonl")).kind == "regression"


def test_preferences_are_learned_and_asked_again_with_their_beta(home, tmp_path):
    data = str(home / "pairs.jsonl")
    result = train.run(settings(home, tmp_path / "a", data=data, eval_split=0.25, beta=0.3, micro_batch=3))
    assert result.before.loss == pytest.approx(0.6931, abs=1e-4)
    assert result.before.figures["accuracy"] == 0.5
    assert result.after.figures["accuracy"] == 1.0 and result.after.figures["margin"] > 1
    kept = evaluated(home, tmp_path / "a", data=data).scores.figures["margin"]
    assert kept == pytest.approx(
        3 * evaluated(home, tmp_path / "a", data=data, beta=0.1).scores.figures["margin"], rel=1e-4
    )
    with pytest.warns(LowrankWarning, match="its own reference"):
        assert evaluated(home, None, data=data).scores.figures["margin"] == 0


def test_micro_batches_do_not_change_what_preferences_teach(home, tmp_path):
    how = {"data": str(home / "pairs.jsonl"), "eval_split": 0.25, "steps": 5}
    runs = [train.run(settings(home, tmp_path / f"{micro}", micro_batch=micro, **how)) for micro in (None, 2)]
    figures = [run.after.figures["margin"] for run in runs]
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)


@pytest.mark.parametrize(
    "data, changes, complaint",
    [
        ("pairs.jsonl", {"full": True}, r"--full: .*pairs\.jsonl has rows of preference"),
        ("stars.jsonl", {"beta": 0.2}, r"--beta 0\.2: .*stars\.jsonl has rows of regression"),
        ("pairs.jsonl", {"metrics": "bleu", "eval_split": 0.5}, "--metrics bleu: rows of preference"),
    ],
)
def test_what_has_no_sense_for_a_kind_is_said_before_a_model_is_loaded(home, tmp_path, data, changes, complaint):
    wanted = {"out": str(tmp_path / "a"), "model": str(home / "llama"), "data": str(home / data), **changes}
    with pytest.raises(ConfigError, match=complaint):
        train.run(TrainSettings(**wanted))
    assert not (tmp_path / "a").exists()


def test_large_labels_are_warned_of(home, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", [{"text": "good", "label": 150.5}, {"text": "bad", "label": 9}])
    with pytest.warns(LowrankWarning, match=r"labels go up to 150\.5.*divide them"):
        train.run(settings(home, tmp_path / "a", data=str(tmp_path / "d.jsonl"), steps=1, batch_size=2))
