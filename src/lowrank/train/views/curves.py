"""The loss of one or several runs as a picture: every report pale, their mean strong, evaluations as dots.

The same logs give the same bytes.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy

from lowrank.errors import printable
from lowrank.train.views.run_log import RunLog
from lowrank.train.views.smoothing import WEIGHT, smoothed

# Okabe and Ito's colours, which those who see two of three colours tell apart; further runs have them dashed
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STROKES = ("-", "--", ":", "-.")
AXES = {"step": ("step", "step"), "tokens": ("trained_tokens", "trained tokens"), "seconds": ("seconds", "seconds")}
STYLE = {
    "svg.hashsalt": "lowrank",  # else names of parts are random
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ in the name of a folder is a $
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#66625b",
    "axes.grid": True,
    "grid.color": "#e6e3dd",
    "font.size": 10.0,
}


def picture(runs: Sequence[RunLog], form: str, axis: str = "step", weight: float = WEIGHT, log: bool = False) -> bytes:
    """The content of a file of the form "svg" or "png". axis: one of AXES; weight: of the mean; log: of the losses."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = drawn(runs, axis, weight, log)
        held = io.BytesIO()
        unsaid = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
        figure.savefig(held, format=form, dpi=160, metadata=unsaid)
    return held.getvalue()


def drawn(runs: Sequence[RunLog], axis: str = "step", weight: float = WEIGHT, log: bool = False) -> Any:
    """The same as a figure of matplotlib's: of each run its reports, their mean where it smooths, its evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    entries = []
    for number, run in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        stroke = STROKES[number // len(COLOURS) % len(STROKES)]
        places, losses = [_place(run, step, axis) for step in run.steps], [line["loss"] for line in run.steps.values()]
        raw, *mean = (losses, smoothed(losses, weight)) if weight and len(losses) > 1 else (losses,)
        one = "o" if len(losses) == 1 else ""  # a line through one point is not seen
        pale = 0.35 if mean else 1.0
        (line,) = axes.plot(places, raw, stroke, marker=one, color=colour, alpha=pale, linewidth=1.0 if mean else 1.8)
        for values in mean:
            (line,) = axes.plot(places, values, stroke, color=colour, linewidth=1.8)
        entries.append((line, run.name))
        if run.evaluations:
            at = [_place(run, step, axis) for step in run.evaluations]
            (line,) = axes.plot(
                at, [found["eval_loss"] for found in run.evaluations.values()], "o", color=colour, markersize=5,
                markeredgecolor="white", linestyle=(0, (1, 2)), linewidth=1.0,
            )  # fmt: skip
            entries.append((line, f"{run.name}, evaluation"))
    axes.set_xlabel(AXES[axis][1])
    axes.set_ylabel("loss")
    axes.set_yscale("log" if log else "linear")
    axes.margins(x=0.02)
    _name(axes, entries)
    return figure


def _place(run: RunLog, step: int, axis: str) -> float:
    """Where a step lies on the axis: between the reports around it, where it has none; the start is 0."""
    if axis == "step":
        return step
    values = [line.get(AXES[axis][0], 0.0) for line in run.steps.values()]
    return float(numpy.interp(step, [0, *run.steps], [0.0, *values]))


def _name(axes: Any, entries: Sequence[tuple[Any, str]]) -> None:
    """The legend. Its words are put in afterwards: matplotlib leaves out labels that begin with an underscore."""
    legend = axes.legend([line for line, _ in entries], ["run"] * len(entries), frameon=False, fontsize=9)
    for text, (_, name) in zip(legend.get_texts(), entries, strict=True):
        text.set_text(printable(name))
