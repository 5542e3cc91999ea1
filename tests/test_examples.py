"""The examples that help shows: those that need nothing but the demo's folder are run as they stand."""

import re
import shlex
from importlib import import_module

import pytest

from lowrank import cli
from lowrank.nano import rows
from train_models import write_jsonl

OURS = re.compile(r"Examples?(?:, after `lowrank demo`)?:\n((?: .*\n?)+)")
LONG = re.compile(r"--steps \d+")


def commands_of(epilogue):
    """The command lines of the examples that need no data of the reader's own."""
    found = OURS.search(epilogue)
    return re.findall(r"^  (lowrank .*)$", found[1].replace("\\\n", " "), re.MULTILINE) if found else []


@pytest.fixture(scope="module")
def after_the_demo(tmp_path_factory):
    """A folder with the demo's files, of few rows and few steps."""
    home = tmp_path_factory.mktemp("examples")
    (home / "demo-out/data").mkdir(parents=True)
    for name, split in (("train", "train"), ("held-out", "held-out")):
        write_jsonl(home / f"demo-out/data/{name}.jsonl", [row._asdict() for row in rows(split, 60)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train = "train --model nano --data demo-out/data/train.jsonl --out demo-out/adapter --steps 4 --lr 5e-3"
        assert cli.main([*train.split(), "--device", "cpu"]) == 0
        assert cli.main(["merge", "--model", "nano", "--adapter", "demo-out/adapter", "--out", "demo-out/merged"]) == 0
    return home


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "demo"])
def test_the_examples_run(after_the_demo, tmp_path, monkeypatch, capsys, name):
    (tmp_path / "demo-out").symlink_to(after_the_demo / "demo-out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lowrank.study.doctor.PROBE", 32)
    module = import_module(f"lowrank.cli.{cli.MODULES.get(name, name)}")
    lines = commands_of(module.command.help_epilogue)
    assert any(line.startswith(f"lowrank {name}") for line in lines)
    for line in lines:
        assert cli.main(shlex.split(LONG.sub("--steps 1", line))[1:]) == 0, (line, capsys.readouterr().err)
