"""`lowrank init`: every setting with its meaning and its default, and all of it a file that `train --config` takes."""

import yaml

from lowrank import cli
from lowrank.train.config_file import resolve
from lowrank.train.settings import TrainSettings
from lowrank.train.views.settings_file import settings_file

NEEDED = {"model": "nano", "data": "d.jsonl", "out": "o"}


def settings_in(text):
    """The lines of the file that are settings, without the # of those that are defaults."""
    lines = [line.removeprefix("#") for line in text.splitlines() if line and not line.startswith("# ")]
    return yaml.safe_load("\n".join(lines))


def test_every_setting_stands_there_once_with_its_default(tmp_path):
    text = settings_file({})
    lines = [line for line in text.splitlines() if line and not line.startswith("# ")]
    assert sorted(line[1:].partition(":")[0] for line in lines) == sorted(TrainSettings.model_fields)
    assert all(line.startswith("#") for line in lines)
    assert yaml.safe_load(text) is None
    written = {**settings_in(text), **NEEDED}
    assert TrainSettings(**written) == TrainSettings(**NEEDED)


def test_every_setting_has_its_meaning():
    words = " ".join(settings_file({}).replace("\n# ", " ").split())
    for name, field in TrainSettings.model_fields.items():
        assert " ".join(field.description.split()) in words, name


def test_what_is_given_holds(tmp_path):
    given = {**NEEDED, "data": "it's: a #file, é.jsonl", "out": "null"}
    (tmp_path / "run.yaml").write_text(settings_file(given), encoding="utf-8")
    assert resolve(TrainSettings, {}, tmp_path / "run.yaml") == TrainSettings(**given)


def test_the_command_writes_what_train_reads(tmp_path, capsys):
    assert cli.main(["init", "--model", "nano", "--data", "none.jsonl"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert "none.jsonl: No such file" in capsys.readouterr().err
