"""Whole runs: what is written, that it can be repeated bit for bit, and that PEFT reads it."""

import json
import os

import pytest
import torch

from lowrank import load_adapter, train
from lowrank.errors import CheckpointError, ConfigError, DataError, LowrankWarning, OutputError, TargetError
from lowrank.train.models import load_causal, load_judge
from lowrank.train.settings import EvalSettings, GenerateSettings, TrainSettings
from train_models import completion_rows, label_rows, save_bert, save_llama, tokenizer, write_jsonl

ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "lowrank.json")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two models and three data files."""
    home = tmp_path_factory.mktemp("home")
    save_llama(home / "llama")
    save_bert(home / "bert")
    write_jsonl(home / "skill.jsonl", completion_rows(60))
    write_jsonl(home / "unseen.jsonl", completion_rows(20, seed=5))
    write_jsonl(home / "labels.jsonl", label_rows(80))
    return home


def settings(home, out, **changes):
    basic = {
        "model": str(home / "llama"),
        "data": str(home / "skill.jsonl"),
        "out": str(out),
        "template": "{prompt} ->",
        "targets": "all-linear",
        "steps": 3,
        "lr": 0.02,
        "batch_size": 16,
        "device": "cpu",
    }
    return TrainSettings(**{**basic, **changes})


def classify(home, out, **changes):
    return settings(
        home,
        out,
        **{"model": str(home / "bert"), "data": str(home / "labels.jsonl"), "targets": None, "steps": 40, **changes},
    )


def adapter_bytes(folder):
    return {name: (folder / name).read_bytes() for name in ADAPTER}


@pytest.fixture(scope="module")
def trained(home):
    """(folder, result) of a run that learns."""
    out = home / "runs" / "skill"
    result = train.run(settings(home, out, steps=60, eval_data=str(home / "unseen.jsonl"), eval_every=20))
    return out, result


def test_what_is_written(home, trained):
    out, result = trained
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*ADAPTER, "README.md", "log.jsonl", "run.json", "train.yaml"]
    )
    assert result.folder == out
    assert result.steps == 60
    assert result.after.loss < 0.3 * result.before.loss
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in log if "loss" in line]
    assert steps == [10, 20, 30, 40, 50, 60]
    assert [line["step"] for line in log if "eval_loss" in line] == [0, 20, 40, 60]
    assert log[-1]["eval_loss"] == result.after.loss
    assert {"step", "loss", "lr", "tokens_per_second", "trained_tokens", "memory_bytes", "seconds"} == set(log[1])
    record = json.loads((out / "run.json").read_text())
    assert record["recipe"]["template"] == "{prompt} ->"
    assert record["trained_tokens"] == result.trained_tokens == log[-2]["trained_tokens"]


def test_eval_repeats_the_last_evaluation(home, trained):
    out, result = trained
    found = train.evaluate(
        EvalSettings(model=str(home / "llama"), adapter=str(out), data=str(home / "unseen.jsonl"), device="cpu")
    )
    assert found.scores.loss == pytest.approx(result.after.loss, rel=1e-5)
    assert found.scores.accuracy == result.after.accuracy
    bare = train.evaluate(
        EvalSettings(model=str(home / "llama"), template="{prompt} ->", data=str(home / "unseen.jsonl"), device="cpu")
    )
    assert bare.scores.loss == pytest.approx(result.before.loss, rel=1e-5)


def test_generate_uses_the_template_of_the_run(home, trained):
    out, _ = trained
    written = train.generate(
        GenerateSettings(model=str(home / "llama"), adapter=str(out), prompt="what is the hat blue ?", device="cpu")
    )
    assert written.split() == ["the", "blue", "hat"]


def test_generate_streams_what_it_returns_and_samples_by_seed(home):
    def write(**changes):
        pieces = []
        asked = GenerateSettings(
            model=str(home / "llama"), prompt="the cat is", max_new_tokens=12, device="cpu", **changes
        )
        text = train.generate(asked, pieces.append)
        assert "".join(pieces).strip() == text.strip()
        return text

    before = torch.get_rng_state()
    greedy = write()
    assert write() == greedy
    assert write(temperature=2.0, seed=1) == write(temperature=2.0, seed=1)
    assert len({write(temperature=2.0, seed=seed) for seed in range(5)}) > 1
    assert write(temperature=2.0, top_p=1e-6, seed=3) == greedy
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prompt_that_fills_the_model_is_an_error(home):
    with pytest.raises(ConfigError, match="--prompt is 71 tokens long, and this model holds 64"):
        train.generate(GenerateSettings(model=str(home / "llama"), prompt="cat " * 70, device="cpu"))


def test_same_settings_same_bytes(home, tmp_path):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        torch.rand(1) if name == "b" else None  # where torch's random state is must not matter
        train.run(settings(home, tmp_path / name, seed=seed, dropout=0.1))
    one, two, other = (adapter_bytes(tmp_path / name) for name in "abc")
    assert one == two
    assert one["adapter_model.safetensors"] != other["adapter_model.safetensors"]
    torch.set_rng_state(state)


def test_a_run_can_be_repeated_from_its_own_settings(home, tmp_path):
    from lowrank.train.config_file import resolve

    train.run(settings(home, tmp_path / "a", rank=3, alpha=5, warmup=0.3, targets="q_proj,v_proj", layers=(1,)))
    again = resolve(TrainSettings, {"out": str(tmp_path / "b")}, tmp_path / "a" / "train.yaml")
    train.run(again)
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")


@pytest.mark.parametrize(
    "changes", [{}, {"rslora": True}, {"dora": True}, {"init": "pissa"}, {"targets": "q_proj,down_proj"}]
)
def test_peft_loads_what_is_saved(home, tmp_path, changes):
    import peft

    train.run(settings(home, tmp_path / "a", rank=3, alpha=7, **changes))
    ids = torch.arange(3, 13)[None]
    ours = load_causal(home / "llama", torch.float32)
    base = ours(ids).logits.detach()
    load_adapter(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(load_causal(home / "llama", torch.float32), tmp_path / "a")
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert (ours(ids).logits - base).abs().max() > 1e-2


def test_classification_learns_and_saves_its_head(home, tmp_path):
    import peft

    result = train.run(classify(home, tmp_path / "a", eval_split=0.25))
    assert result.after.accuracy == 1.0
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert "classifier" in config["modules_to_save"]
    assert json.loads((tmp_path / "a" / "run.json").read_text())["recipe"]["labels"] == ["bad", "good"]
    found = train.evaluate(
        EvalSettings(
            model=str(home / "bert"), adapter=str(tmp_path / "a"), data=str(home / "labels.jsonl"), device="cpu"
        )
    )
    assert found.kind == "classification"
    assert found.scores.accuracy == 1.0

    ids = torch.arange(3, 13)[None]
    model, fresh = load_judge(home / "bert", ("bad", "good"), torch.float32)
    assert fresh == ("classifier",)
    load_adapter(model, tmp_path / "a")
    other, _ = load_judge(home / "bert", ("bad", "good"), torch.float32)  # with another random head
    theirs = peft.PeftModel.from_pretrained(other, tmp_path / "a")
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_classifying_with_a_decoder_without_pad_token(home, tmp_path):
    result = train.run(classify(home, tmp_path / "a", model=str(home / "llama"), eval_split=0.25))
    assert result.after.accuracy > 0.9


def test_full_saves_a_model_that_needs_no_adapter(home, tmp_path):
    changes = {
        "full": True,
        "lr": 5e-3,
        "eval_split": 0.2,
        "model": str(home / "bert"),
        "data": str(home / "labels.jsonl"),
    }
    asked = {"steps": 40, "batch_size": 16, "out": str(tmp_path / "a"), "device": "cpu"}
    result = train.run(TrainSettings(**asked, **changes))
    assert not (tmp_path / "a" / "adapter_config.json").exists()
    found = train.evaluate(EvalSettings(model=str(tmp_path / "a"), data=str(home / "labels.jsonl"), device="cpu"))
    assert found.scores.accuracy == result.after.accuracy == 1.0


def test_full_trains_a_language_model(home, tmp_path):
    asked = {"full": True, "steps": 30, "lr": 5e-3, "batch_size": 16, "template": "{prompt} ->", "device": "cpu"}
    result = train.run(
        TrainSettings(
            model=str(home / "llama"), data=str(home / "skill.jsonl"), out=str(tmp_path / "a"), eval_split=0.2, **asked
        )
    )
    assert result.after.loss < 0.5 * result.before.loss
    written = train.generate(GenerateSettings(model=str(tmp_path / "a"), prompt="what is the hat blue ?", device="cpu"))
    assert written.split()[0] == "the"


WRONG = [
    ({"rank": 0}, ConfigError, "r must be a whole number of at least 1"),
    ({"rank": 1000}, ConfigError, "r is above min"),
    ({"alpha_pattern": {"q_proj": float("inf")}}, ConfigError, "must be a finite number"),
    ({"targets": "q_prj"}, TargetError, "'q_prj' matches no module"),
    ({"init": "magic"}, ConfigError, "magic"),
    ({"model": "no/such"}, CheckpointError, "no/such: there is no such folder here"),
    ({"max_length": 65}, ConfigError, "--max-length 65: this model holds 64 tokens"),
    ({"data": "none.jsonl"}, DataError, "none.jsonl"),
    ({"device": "warp"}, ConfigError, "--device warp"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG)
def test_a_wrong_call_writes_nothing(home, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train.run(settings(home, tmp_path / "a", **changes))
    assert not (tmp_path / "a").exists()


def test_a_folder_in_use_is_refused_before_any_work(home, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"not empty, it holds thesis\.tex"):
        train.run(settings(home, tmp_path, model="no/such"))
    with pytest.raises(OutputError, match="is a file: give a new folder"):
        train.run(settings(home, tmp_path / "thesis.tex"))
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_models_that_are_none(home, tmp_path):
    with pytest.raises(ConfigError, match=r"it holds no config\.json"):
        train.run(settings(home, tmp_path / "a", model=str(home)))
    with pytest.raises(CheckpointError, match=r"weights of BertLMHeadModel are not in its files"):
        train.run(settings(home, tmp_path / "a", model=str(home / "bert")))
    broken = save_llama(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"broken: not loadable as a causal language model"):
        train.run(settings(home, tmp_path / "a", model=str(broken)))
    (broken / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        train.run(settings(home, tmp_path / "a", model=str(broken)))


def test_an_adapter_is_no_model(home, trained, tmp_path):
    with pytest.raises(ConfigError, match="it holds an adapter, which goes to --adapter"):
        train.run(settings(home, tmp_path / "a", model=str(trained[0])))


def test_eval_without_a_trained_head_is_refused(home):
    with pytest.raises(ConfigError, match=r"labels .* are not known"):
        train.evaluate(EvalSettings(model=str(home / "bert"), data=str(home / "labels.jsonl")))


def test_other_rows_than_the_adapter_was_trained_on(home, trained):
    asked = {"model": str(home / "llama"), "adapter": str(trained[0]), "data": str(home / "labels.jsonl")}
    with pytest.raises(DataError, match="was trained on completion"):
        train.evaluate(EvalSettings(**asked))


def test_rows_without_anything_to_train_are_told(home, tmp_path):
    rows = [*completion_rows(10), {"prompt": "cat", "completion": "dog " * 70}]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    with pytest.warns(LowrankWarning, match="1 of 11 rows are left out"):
        train.run(settings(home, tmp_path / "a", data=str(path), steps=1))


def test_prompts_that_become_no_tokens_are_told(home, tmp_path):
    path = write_jsonl(tmp_path / "odd.jsonl", [{"prompt": ".", "completion": "the cat"}] * 4)
    with pytest.warns(LowrankWarning, match="every token is trained"):
        model = save_llama(tmp_path / "plain")
        (model / "tokenizer.json").write_text(_forget_dots((model / "tokenizer.json").read_text()))
        train.run(settings(home, tmp_path / "a", model=str(model), data=str(path), steps=1, template="{prompt}"))


def test_a_tokenizer_that_cannot_end_a_text_is_told(home, tmp_path):
    model = save_llama(tmp_path / "endless")
    tokenizer(eos=False).save_pretrained(model)
    with pytest.warns(LowrankWarning, match="cannot learn to stop"):
        train.run(settings(home, tmp_path / "a", model=str(model), steps=1))


def _forget_dots(text):
    """A tokenizer that makes nothing out of a dot."""
    content = json.loads(text)
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "."}, "content": ""}
    return json.dumps(content)


def test_a_damaged_run_record_is_a_sentence(home, trained, tmp_path):
    from lowrank.data.recipe import read_recipe

    assert read_recipe(trained[0]).template == "{prompt} ->"
    assert read_recipe(tmp_path) is None
    for content in ("{", "[]", '{"recipe": {"kind": 3}}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(CheckpointError, match="damaged"):
            read_recipe(tmp_path)


def test_model_labels_are_kept(home, tmp_path):
    """A classifier that knows its labels by name keeps their numbers, whatever the alphabet says."""
    from lowrank.train.models import own_labels

    model, _ = load_judge(home / "bert", ("good", "bad"), torch.float32)
    model.save_pretrained(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).write_bytes((home / "bert" / name).read_bytes())
    assert own_labels(tmp_path / "m") == ("good", "bad")
    train.run(classify(home, tmp_path / "a", model=str(tmp_path / "m"), steps=1))
    assert json.loads((tmp_path / "a" / "run.json").read_text())["recipe"]["labels"] == ["good", "bad"]
