"""The card beside a trained adapter: the same for the same run, true to run.json, and safe whatever the names say."""

import json

import pytest
import yaml

from lowrank import train
from lowrank.train.settings import TrainSettings
from lowrank.train.views.card import card, code, fenced
from lowrank.train.views.spark import spark
from train_models import completion_rows, save_llama, write_jsonl

RECORD = {
    "recipe": {"kind": "completion"},
    "steps": 1200,
    "tokens": 5000,
    "trained_tokens": 2000,
    "evaluations": [{"step": 0, "loss": 2.5, "tokens": 9, "exact_match": 0.5}],
    "best_step": 0,
    "versions": {"torch": "2.13"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two folders of one run, begun in different places."""
    home = tmp_path_factory.mktemp("home")
    save_llama(home / "llama")
    write_jsonl(home / "rows.jsonl", completion_rows(24))
    asked = {"model": str(home / "llama"), "data": str(home / "rows.jsonl"), "device": "cpu", "eval_split": 0.25}
    for name in "ab":
        train.run(TrainSettings(**asked, out=str(home / name), steps=4, log_every=1, save_every=None))
    return home / "a", home / "b"


def test_the_same_run_writes_the_same_card_and_it_does_not_tell_where(runs):
    one, other = ((folder / "README.md").read_bytes() for folder in runs)
    assert one == other
    assert str(runs[0]).encode() not in one


def test_the_card_says_what_run_json_says(runs):
    text = (runs[0] / "README.md").read_text(encoding="utf-8")
    record = json.loads((runs[0] / "run.json").read_text())
    assert f"(completion): 4 steps, {record['trained_tokens']:,} trained tokens." in text
    for found in record["evaluations"]:
        assert f"| {found['step']} | {found['loss']:.4f} |" in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    written = yaml.safe_load((runs[0] / "train.yaml").read_text())
    assert settings.items() <= written.items()
    assert {"rank", "lr", "seed", "data"} <= settings.keys() and "out" not in settings
    assert "| `the data` | `" in text


def test_names_of_others_are_text_and_nothing_else():
    model = "a`b``<script>alert(1)</script>|\n# heading"
    settings = TrainSettings(model=model, data="x ``` y.jsonl", out="o")
    text = card(settings, RECORD, {"the | data": "<b>"}, [2.0, 1.0]).decode()
    assert "\n# heading" not in text
    assert "```a`b``<script>alert(1)</script>|\\n# heading```" in text
    assert "| `the \\| data` | `<b>` |" in text
    body, settings_block = text.split("## Settings")
    assert "\n````yaml\n" in settings_block and settings_block.rstrip().endswith("````")
    assert "exact match" in body and "| 0 | 2.5000 | 0.5000 |" in body


@pytest.mark.parametrize("name", ["org/name", "org/name@main", "./here", "/abs/path", "a/b/c", "nano"])
def test_the_front_matter_names_a_public_base_alone(name):
    text = card(TrainSettings(model=name, data="d", out="o"), RECORD, {}, []).decode()
    found = yaml.safe_load(text.split("---")[1])
    assert found["library_name"] == "peft"
    assert found.get("base_model") == ("org/name" if name.startswith("org/name") else None)


def test_code_and_fences_are_longer_than_what_they_hold():
    assert code("plain") == "`plain`"
    assert code("`") == "`` ` ``"
    assert fenced("x", ["````"])[0] == "`````x"
    assert fenced("x", ["a\nb"])[1] == "a\\nb"


def test_a_line_of_blocks_goes_from_the_least_to_the_most():
    assert spark([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert spark([5.0]) == "▁" and spark([]) == ""
    assert len(spark(list(range(1000)), 40)) == 40
    assert spark(list(range(1000)), 8) == "▁▂▃▄▅▆▇█"
