"""`lowrank plot`."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from lowrank.errors import ConfigError

FORMS = ("svg", "png")

command = App(
    name="plot",
    help_epilogue="""Examples, after `lowrank demo`:
  lowrank plot demo-out/adapter --out loss.svg
  lowrank plot demo-out/adapter --x tokens --smoothing 0 --out loss.png

Examples with your own:
  lowrank plot runs/a runs/b runs/c --log --out runs/compared.svg""",
)


@command.default
def plot(
    *runs: str,
    out: Path,
    x: Literal["step", "tokens", "seconds"] = "step",
    smoothing: float = 0.8,
    log: Annotated[bool, Parameter(negative=())] = False,
    force: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Draw the loss of one or several runs, with their evaluations.

    Every report of the loss is drawn pale, their running mean over it, and each evaluation as a dot. A run
    that is still going on is drawn as far as it is.

    Parameters
    ----------
    runs
        The folders of runs (what --out of `train` named), or their log.jsonl
    out
        The picture to write, as its ending says: .svg or .png
    x
        What goes along: steps, trained tokens, or seconds
    smoothing
        How much of the mean stays at each report: from 0, no mean at all, to below 1
    log
        A logarithmic axis for the loss
    force
        Replace the picture, where there is one
    """
    form = out.suffix.lower().removeprefix(".")
    if not runs:
        raise ConfigError("plot needs the folder of a run: lowrank plot runs/a --out loss.svg")
    if form not in FORMS:
        raise ConfigError(f"--out {out}: a picture's name must end in .svg or .png")
    if not 0 <= smoothing < 1:
        raise ConfigError(f"--smoothing {smoothing:g}: what stays of the mean is at least 0 and below 1")
    from lowrank.checkpoint.atomic import write_file
    from lowrank.cli.claim import claimed_file
    from lowrank.cli.say import say
    from lowrank.train.views.curves import picture
    from lowrank.train.views.run_log import log_of, read_log

    with claimed_file(out, {f"log of run {number}": log_of(run) for number, run in enumerate(runs, 1)}, force) as place:
        assert place is not None
        write_file(place, picture([read_log(run) for run in runs], form, x, smoothing, log))
    say(f"picture: {out}")
