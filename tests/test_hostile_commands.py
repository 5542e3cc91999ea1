"""Whole commands keep their promise: on what fuzzing once found (tests/hostile/command-*), and on some fresh cases."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest

from lowrank import cli

HOSTILE = Path(__file__).parent / "hostile"
sys.path.insert(0, str(HOSTILE))

import commands  # noqa: E402


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """A base, and a sound case beside it."""
    folder = tmp_path_factory.mktemp("seeds") / "seeds"
    commands.make_seeds(folder)
    return folder


def test_sound_calls_answer(seeds, tmp_path):
    """Without damage every kind of call has a result, so a refusal is the damage's."""
    dice = random.Random(0)
    for number in range(20):
        line = commands.make_line(dice)
        folder = shutil.copytree(seeds / "case", tmp_path / str(number))
        status, _, told = commands.call(folder, seeds / "base", line)
        assert status == 0, (line, told)


def test_what_breaks_the_promise_is_seen(seeds, tmp_path, monkeypatch):
    """A status that is none of 0 and 2, two sentences, a changed input, a number that is none."""
    folder = shutil.copytree(seeds / "case", tmp_path / "case")

    def broken(status: int, told: str = "", complained: str = "", name: str | None = None) -> bool:
        def main(_line: list[str]) -> int:
            print(told)
            print(complained, file=sys.stderr)
            if name is not None:
                (folder / name).write_text("other")
            return status

        monkeypatch.setattr(cli, "main", main)
        return commands.broken_promise(folder, seeds / "base", ["eval"]) is not None

    error = "lowrank: error: no"
    assert not broken(0, "{}") and not broken(2, complained=error)
    assert broken(0, '{"loss": NaN}') and broken(1, complained=error) and broken(2)
    assert broken(2, complained=f"{error}\n{error}") and broken(2, complained=f"{error}\x1b[31m")
    assert broken(2, complained=error, name="out.svg") and broken(0, "{}", name="rows.csv")


@pytest.mark.parametrize("case", sorted(HOSTILE.glob("command-*")), ids=lambda case: case.name)
def test_kept_calls(case, seeds, tmp_path):
    """What broke the promise once keeps it now."""
    folder = shutil.copytree(case, tmp_path / "case", symlinks=True)
    assert commands.broken_promise(folder, seeds / "base", json.loads((case / "line.json").read_text())) is None


def test_fresh_calls(seeds, tmp_path):
    """The first cases of the fuzz target's own sequence."""
    for number in range(40):
        folder = tmp_path / str(number)
        line = commands.make_case(seeds, folder, number, seed=0)
        assert commands.broken_promise(folder, seeds / "base", line) is None, (number, line)
        shutil.rmtree(folder)
