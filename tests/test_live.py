"""What a training shows on a terminal while it goes on, and that elsewhere it is plain lines."""

import io

import pytest
from rich.console import Console

from lowrank.cli.console import RunDisplay
from lowrank.train.evaluation import Scores
from lowrank.train.reporting import Progress


def shown(terminal):
    """What is written for a run of four steps with an evaluation."""
    stream = io.StringIO()
    with RunDisplay() as display:
        display.console = Console(file=stream, force_terminal=terminal, width=120, highlight=False)
        display.started([("model", "a [bold]name[/bold]")], 4)
        for step, loss in ((1, 4.0), (2, 2.0)):
            display.stepped(step)
            display.progressed(Progress(step, loss, 1e-3, 1234.5, 10 * step, 2_500_000_000))
        display.evaluated(2, Scores(1.5, 7, {"accuracy": 0.25}))
    return stream.getvalue()


def test_on_a_terminal_the_last_figures_stand_under_the_bar():
    text = shown(True)
    assert "2/4" in text
    last = text[text.rindex("loss\x1b") :] if "loss\x1b" in text else text
    assert "2.0000, smoothed 2.8889  █▁" in last
    assert "1.00e-03" in last and "1,234 tokens/s, 20 trained" in last and "2.50 GB" in last
    assert "step 2: loss 1.5000, accuracy 25.00%, over 7" in last


def test_elsewhere_it_is_a_line_for_each_report():
    text = shown(False)
    assert "\x1b" not in text
    assert text.splitlines()[1:] == [
        "step 1/4  loss 4.0000  1,234 tokens/s  rate 1.00e-03  10 trained",
        "step 2/4  loss 2.0000  1,234 tokens/s  rate 1.00e-03  20 trained",
        "step 2/4  evaluation: loss 1.5000, accuracy 25.00%, over 7",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_names_are_no_markup(terminal):
    assert "a [bold]name[/bold]" in shown(terminal)
