"""The curves of runs: what is read of their logs, what is drawn of it, and the same picture from the same logs."""

import json

import pytest

from lowrank import cli
from lowrank.errors import CheckpointError
from lowrank.train.views.curves import drawn, picture
from lowrank.train.views.run_log import read_log
from lowrank.train.views.smoothing import Smoothed, smoothed

STEPS = [{"step": s, "loss": 3.0 / s, "trained_tokens": 100 * s, "seconds": s / 2} for s in (10, 20, 30)]
EVALUATIONS = [{"step": 0, "eval_loss": 4.0, "seconds": 0.1}, {"step": 25, "eval_loss": 0.5, "seconds": 13.0}]


def write_log(folder, *records, end=""):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    one = write_log(tmp_path / "one", EVALUATIONS[0], *STEPS, EVALUATIONS[1])
    return [read_log(one), read_log(write_log(tmp_path / "_$x^2$ <b>", *STEPS))]


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.99])
def test_the_mean_of_a_constant_is_the_constant(weight):
    assert smoothed([2.5] * 40, weight) == pytest.approx([2.5] * 40)


def test_the_mean_is_the_weighted_one():
    values, weight = [3.0, 1.0, 4.0, 1.5], 0.7
    shares = [weight ** (len(values) - 1 - i) for i in range(len(values))]
    wanted = sum(share * value for share, value in zip(shares, values, strict=True)) / sum(shares)
    assert smoothed(values, weight)[-1] == pytest.approx(wanted)
    assert smoothed(values, 0.0) == values
    assert Smoothed(0.9).add(7.0) == pytest.approx(7.0)


def test_a_log_is_read_by_steps_and_a_step_written_twice_is_the_later_one(tmp_path):
    again = {**STEPS[1], "loss": 9.0}
    sample = {"step": 25, "samples": ["text"], "seconds": 1.0}
    run = read_log(write_log(tmp_path / "a", *STEPS, EVALUATIONS[1], sample, again, end='{"step": 40, "lo'))
    assert run.steps == {10: STEPS[0], 20: again, 30: STEPS[2]}
    assert run.evaluations == {25: EVALUATIONS[1]}
    assert read_log(str(tmp_path / "a" / "log.jsonl")).steps == run.steps


WRONG = [
    ('{"step": 1, "loss": 2}\n{"step"\n{"step": 2, "loss": 2}\n', r"log\.jsonl:2: no line of a training's log"),
    ("[]\n", r"log\.jsonl:1: .* JSON objects"),
    ('{"step": 1, "loss": NaN}\n', r"log\.jsonl:1: .* finite numbers"),
    ('{"step": 1e308, "loss": 1}\n', r"log\.jsonl:1: .* finite numbers"),
    ('{"step": true, "loss": 1}\n', r"log\.jsonl:1: .* finite numbers"),
    ('{"step": 0, "eval_loss": 1}\n', "no step of a training yet"),
    ("", "no step of a training yet"),
]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_what_is_no_log_is_a_sentence(tmp_path, content, message):
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_log(str(tmp_path))


def test_a_folder_without_a_log_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"log\.jsonl cannot be read there \(No such file"):
        read_log(str(tmp_path))


def lines_of(figure):
    (axes,) = figure.get_axes()
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in axes.get_lines()]


def test_reports_their_mean_and_evaluations_are_drawn(runs):
    losses = [line["loss"] for line in STEPS]
    steps = [10.0, 20.0, 30.0]
    one = [(steps, losses), (steps, smoothed(losses, 0.6)), ([0.0, 25.0], [4.0, 0.5])]
    assert lines_of(drawn(runs, weight=0.6)) == [*one, *one[:2]]
    assert lines_of(drawn(runs, weight=0.0)) == [one[0], one[2], one[0]]


def test_an_evaluation_between_two_reports_lies_between_them_on_every_axis(runs):
    assert lines_of(drawn(runs[:1], "tokens"))[-1][0] == [0.0, 2500.0]
    assert lines_of(drawn(runs[:1], "seconds"))[-1][0] == [0.0, 12.5]


def test_names_are_shown_as_they_are(runs):
    (axes,) = drawn(runs).get_axes()
    one, other = runs[0].name, runs[1].name
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [one, f"{one}, evaluation", other]
    content = picture(runs, "svg").decode()
    assert "_$x^2$ &lt;b&gt;" in content
    assert "<b>" not in content


def test_the_same_logs_give_the_same_bytes(runs):
    for form, start in (("svg", b"<?xml"), ("png", b"\x89PNG")):
        content = picture(runs, form)
        assert content.startswith(start)
        assert content == picture(runs, form)
        assert content != picture(runs, form, log=True)


def test_the_command(tmp_path, monkeypatch, capsys, runs):
    monkeypatch.chdir(tmp_path)
    for line, said in (
        ("plot --out a.svg", "needs the folder of a run"),
        ("plot one --out a.pdf", "must end in .svg or .png"),
        ("plot one --out a.svg --smoothing 1", "at least 0 and below 1"),
        ("plot one none --out a.svg", "none: log.jsonl cannot be read there"),
        ("plot one/log.jsonl --out one/log.jsonl --force", "must end in"),
    ):
        assert cli.main(line.split()) == 2, line
        assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("*.svg"))
    assert cli.main(["plot", "one", "--out", "one/loss.SVG"]) == 0
    assert (tmp_path / "one" / "loss.SVG").read_bytes().startswith(b"<?xml")
    assert cli.main(["plot", "one", "--out", "one/loss.SVG"]) == 2
