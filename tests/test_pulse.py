"""What long work says off a terminal: its stages, and after a while where it is."""

import io
import sys
import time

import pytest

from lowrank import cli, stages
from lowrank.cli.pulse import Pulse
from train_models import completion_rows, save_llama, write_jsonl


def told_by(job):
    """Every stage that `job` tells."""
    found = []
    with stages.listening(lambda *stage: found.append(stage)):
        job()
    return found


def test_stages_are_told_to_who_listens_and_to_nobody_else():
    stages.stage("unheard")
    assert told_by(lambda: stages.stage("reading", 1, 2)) == [("reading", 1, 2)]

    def nested():
        with stages.under("seed 0"):
            stages.stage("training", 3, 40)
        stages.stage("saving")

    assert told_by(nested) == [("seed 0: training", 3, 40), ("saving", None, None)]


def until(condition, seconds=20.0):
    """Waits; how long a thread is kept waiting by a busy machine must not matter."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_a_pulse_says_the_stage_and_says_it_again():
    stream = io.StringIO()
    with Pulse(0.01, 0.03, stream):
        stages.stage("tokenising 600 rows")
        until(lambda: stream.getvalue().count("lowrank: tokenising 600 rows, 0:0") > 1)
        stages.stage("training", 3, 4000)
        until(lambda: "lowrank: training, 3 of 4,000, 0:0" in stream.getvalue())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_tokenising_shows_a_bar_on_a_terminal_until_it_ends(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        with Pulse(60, 60, stream) as pulse:
            stages.stage("tokenising rows", 0, 4000)
            stages.stage("tokenising rows", 1000, 4000)
            assert pulse._bar.shown == (stream is terminal)
            stages.stage("tokenising rows", 4000, 4000)
            assert not pulse._bar.shown
            stages.stage("training", 3, 40)
            assert not pulse._bar.shown
    assert "tokenising rows" in terminal.getvalue() and "1000/4000" in terminal.getvalue()
    assert pipe.getvalue() == ""


def test_a_pulse_is_silent_in_short_work_and_beside_a_bar():
    stream = io.StringIO()
    with Pulse(60, 60, stream):
        stages.stage("reading")
    with Pulse(0.01, 0.01, stream) as pulse, pulse.muted():
        stages.stage("reading")
        time.sleep(0.1)
    assert stream.getvalue() == ""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("pulse")
    save_llama(home / "llama")
    write_jsonl(home / "skill.jsonl", completion_rows(30))
    return home


COMMANDS = [
    ("train --steps 2 --out run", ["reading skill.jsonl", "loading the model", "tokenising rows", "training"]),
    ("eval", ["reading skill.jsonl", "loading the model", "tokenising rows", "evaluating"]),
    ("rank --sample 4", ["reading skill.jsonl", "loading the model", "tokenising rows", "gradient"]),
    (
        "dimension --steps 1 --ladder 2 --seeds 1 --out d",
        ["tokenising rows", "full, seed 0: training", "2, seed 0: training", "2, seed 0: evaluating"],
    ),
]


@pytest.mark.parametrize(("line", "wanted"), COMMANDS)
def test_every_long_command_tells_its_stages(home, monkeypatch, capsys, line, wanted):
    monkeypatch.chdir(home)
    found = []
    monkeypatch.setattr(Pulse, "told", lambda self, what, done, total: found.append(what))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    name, _, rest = line.partition(" ")
    assert cli.main([name, "--model", "llama", "--data", "skill.jsonl", "--device", "cpu", *rest.split()]) == 0
    assert [stage for stage in dict.fromkeys(found) if stage in wanted] == wanted
    assert capsys.readouterr().err == ""
