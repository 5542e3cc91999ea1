"""The checkpoints of a run: `checkpoints/step-N` in its folder, each whole or not there."""

import os
import re
import warnings
from collections.abc import Collection
from pathlib import Path

from lowrank.checkpoint.temporaries import delete, temporary
from lowrank.errors import CheckpointError, LowrankWarning
from lowrank.train.state.value import RunValue, read

FOLDER = "checkpoints"
NAME = re.compile(r"step-(0|[1-9]\d{0,9})")


def checkpoint(run: Path, step: int) -> Path:
    """Where the checkpoint after so many steps is."""
    return run / FOLDER / f"step-{step}"


def steps_kept(run: Path) -> list[int]:
    """The steps that there are checkpoints of, in order."""
    try:
        names = os.listdir(run / FOLDER)
    except OSError:
        return []
    return sorted(int(match[1]) for name in names if (match := NAME.fullmatch(name)))


def latest(run: Path) -> RunValue | None:
    """The last checkpoint; None where there is none. One that is damaged is said, and the one before it is taken.

    Raises CheckpointError where none can be read.
    """
    steps = steps_kept(run)
    for step in reversed(steps):
        try:
            return read(checkpoint(run, step))
        except CheckpointError as error:
            if step == steps[0]:
                raise
            warnings.warn(f"{error}; this run goes on from an earlier one", LowrankWarning, stacklevel=2)
    return None


def prune(run: Path, kept: Collection[int]) -> None:
    """Delete all checkpoints but these, as far as the disk lets us; none is ever there in part."""
    for step in steps_kept(run):
        if step not in kept:
            _remove(checkpoint(run, step))


def remove_all(run: Path) -> None:
    """Delete the checkpoints and what killed processes left of some."""
    if (run / FOLDER).is_dir():
        _remove(run / FOLDER)


def _remove(folder: Path) -> None:
    """It loses its name in one step, and then its files."""
    hidden = temporary(folder)
    delete(hidden)
    try:
        os.rename(folder, hidden)
    except OSError:
        return  # a disk that cannot be written to keeps it
    delete(hidden)
