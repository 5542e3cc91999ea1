"""Early stopping, LoRA+, the stable-decay schedule, and the rate of `--lr auto`."""

import json
from types import SimpleNamespace

import pytest
import torch

from lowrank import LoraConfig, inject, train
from lowrank.errors import ConfigError, LowrankError, LowrankWarning
from lowrank.train.auto_rate import auto_rate
from lowrank.train.config_file import resolve
from lowrank.train.evaluation import Scores
from lowrank.train.models import load_causal
from lowrank.train.optimiser import Optimiser, factors_b
from lowrank.train.patience import out_of_patience
from lowrank.train.reporting import Reporter
from lowrank.train.schedule import rate_factor
from lowrank.train.settings import LoopSettings, TrainSettings
from train_models import completion_rows, save_llama, write_jsonl


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    save_llama(home / "llama")
    write_jsonl(home / "rows.jsonl", completion_rows(24))
    return home


def settings(home, out, **changes):
    basic = {"model": str(home / "llama"), "data": str(home / "rows.jsonl"), "out": str(out), "device": "cpu"}
    return TrainSettings(**{**basic, "steps": 6, "lr": 0.02, "batch_size": 8, "targets": "all-linear", **changes})


PATIENCE = [
    ([3.0, 2.0, 1.0, 0.5], 1, False),
    ([3.0, 2.0, 2.0], 1, True),
    ([3.0, 2.0, 2.5], 2, False),
    ([3.0, 2.0, 2.5, 2.4], 2, True),
    ([3.0, 2.0, 2.5, 1.9], 2, False),
    ([1.0], 1, False),
    ([3.0, 3.0, 3.0], None, False),
]


@pytest.mark.parametrize(("losses", "patience", "stops"), PATIENCE)
def test_patience_counts_evaluations_since_the_lowest(losses, patience, stops):
    assert out_of_patience([(i, Scores(loss, 1)) for i, loss in enumerate(losses)], patience) == stops


def test_a_run_out_of_patience_stops_and_saves_its_best(home, tmp_path):
    """At a rate this high it soon gets worse; the adapter is that of the lowest evaluation."""
    asked = {"steps": 40, "lr": 1.0, "schedule": "constant", "clip": 0.0, "eval_split": 0.3, "eval_every": 1}
    result = train.run(settings(home, tmp_path / "a", patience=3, **asked))
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    losses = [found["loss"] for found in record["evaluations"]]
    assert result.steps == record["steps"] == len(losses) - 1 < 40
    assert losses.index(min(losses)) == len(losses) - 4
    best = record["best_step"]
    until = {**asked, "steps": best} if best else {**asked, "steps": 1}
    again = train.run(settings(home, tmp_path / "b", **until, keep="best"))
    assert again.best[1].loss == min(losses)
    weights = [(tmp_path / one / "adapter_model.safetensors").read_bytes() for one in "ab"]
    assert weights[0] == weights[1]


def test_rows_to_evaluate_that_are_trained_on_too_are_warned_of(home, tmp_path):
    rows = completion_rows(24)
    file = write_jsonl(tmp_path / "held.jsonl", [{"prompt": "the dog is", "completion": "red"}, *rows[3:5]])
    said = r"held.jsonl: 2 of the 3 rows to evaluate are trained on too \(.*held.jsonl:2, .*held.jsonl:3\)"
    with pytest.warns(LowrankWarning, match=said):
        train.run(settings(home, tmp_path / "run", steps=1, eval_data=str(file)))


def test_patience_needs_evaluations(home, tmp_path):
    with pytest.raises(ValueError, match=r"patience and .* need eval_data"):
        settings(home, tmp_path / "a", patience=2)


def test_lora_plus_moves_b_faster_and_a_as_before(home):
    moved = {}
    for ratio in (1.0, 16.0):
        model = load_causal(home / "llama", torch.float32)
        torch.manual_seed(0)
        inject(model, LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"))
        trained = [p for p in model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        optimiser = Optimiser(trained, LoopSettings(lr=1e-3, lr_ratio=ratio, clip=0.0), factors_b(model))
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimiser.step(0.5)
        of_b = {id(p) for p in factors_b(model)}
        assert 2 * len(of_b) == len(trained)
        moved[ratio] = [((p - q).abs().max().item(), id(p) in of_b) for p, q in zip(trained, before, strict=True)]
    for (plain, _), (plus, is_b) in zip(moved[1.0], moved[16.0], strict=True):
        assert plain == pytest.approx(5e-4, rel=1e-3)
        assert plus == pytest.approx(plain * (16 if is_b else 1), rel=1e-3)


def test_stable_decay_stays_and_falls_over_the_last_fifth():
    factors = [rate_factor("wsd", step, 100, 10) for step in range(100)]
    assert factors[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert factors[10:82] == [1.0] * 72
    assert factors[91] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.06


def of_family(name, width):
    config = SimpleNamespace(model_type=name)
    config.get_text_config = lambda: SimpleNamespace(hidden_size=width)
    return SimpleNamespace(config=config)


def test_the_rate_by_width():
    assert auto_rate(of_family("llama", 2000), full=False) == pytest.approx(5e-4)
    assert auto_rate(of_family("llama", 2000), full=True) == pytest.approx(5e-5)
    assert auto_rate(of_family("llama", 4096), full=False) == pytest.approx(5e-4 * (2000 / 4096) ** 0.781)
    assert auto_rate(of_family("qwen3_moe", 4096), full=False) == pytest.approx(5e-4 * (2000 / 4096) ** 0.0775)
    with pytest.raises(ConfigError, match="this is a gpt2: give a number"):
        auto_rate(of_family("gpt2", 768), full=False)


class Panel(Reporter):
    def started(self, summary, steps):
        self.lines = dict(summary)


def test_an_auto_rate_is_said_with_its_source_and_written_down(home, tmp_path):
    import yaml

    panel = Panel()
    train.run(settings(home, tmp_path / "a", lr="auto", lr_ratio=4, steps=1), panel)
    rate = yaml.safe_load((tmp_path / "a" / "train.yaml").read_text())["lr"]
    assert rate == pytest.approx(5e-4 * (2000 / 32) ** 0.781)
    assert panel.lines["rate"].startswith(f"{rate:g}, {4 * rate:g} for B (LoRA+), linear after 0 steps")
    assert "tinker-cookbook's rule" in panel.lines["trained"]


WRONG = [
    ({"lr": "fast"}, "valid number"),
    ({"lr": 0}, "greater than 0"),
    ({"full": True, "targets": None, "lr_ratio": 2}, "lr_ratio is between"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_settings(home, tmp_path, changes, message):
    asked = {"model": "m", "data": "d", "out": "o", **{k: v for k, v in changes.items() if v is not None}}
    with pytest.raises(ConfigError, match=message):
        resolve(TrainSettings, asked)


def test_an_adapter_to_train_on_from_that_is_not_there_is_said_before_a_row_is_read(home, tmp_path, monkeypatch):
    monkeypatch.setattr("lowrank.train.preparing.read_rows", lambda _: pytest.fail("rows were read"))
    asked = settings(home, tmp_path / "out").model_dump(exclude_unset=True, exclude={"targets"})
    with pytest.raises(LowrankError, match=r"there is no folder .*nowhere"):
        train.run(TrainSettings(**asked, init_from=str(tmp_path / "nowhere")))


def test_training_on_from_an_adapter_begins_where_it_ended(home, tmp_path):
    first = train.run(settings(home, tmp_path / "a", eval_split=0.3, rank=3, alpha=5))
    on = settings(home, tmp_path / "b", eval_split=0.3).model_dump(exclude_unset=True, exclude={"targets"})
    on["init_from"] = str(tmp_path / "a")
    second = train.run(TrainSettings(**on))
    assert second.before.loss == pytest.approx(first.after.loss, rel=1e-6)
    assert second.after.loss < second.before.loss
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 5)
    again = tmp_path / "b" / "train.yaml"
    assert resolve(TrainSettings, {}, again).init_from == str(tmp_path / "a")
    with pytest.raises(ValueError, match="init_from trains on what the adapter has, so targets cannot be meant"):
        settings(home, tmp_path / "c", init_from="x")
