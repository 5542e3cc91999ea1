"""The log of a run, read again: steps and evaluations in the order of the steps, each step once.

A run that goes on after it was killed may have written steps a second time; what was written last is what happened.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.errors import CheckpointError
from lowrank.files.json_file import parse_json
from lowrank.files.regular import read_bytes
from lowrank.train.run_folder import LOG

MOST = 2**30  # bytes: five million lines
LARGEST = 1e100  # number that a picture holds beside another one, and far beyond any loss


@dataclass(frozen=True, slots=True)
class RunLog:
    """What a log holds. name: as the user gave it; steps, evaluations: {step: its line}, in the order of the steps."""

    name: str
    steps: dict[int, dict[str, float]]
    evaluations: dict[int, dict[str, float]]


def log_of(run: str) -> Path:
    """The file that is meant by a run: its folder, or the log itself."""
    return Path(run) / LOG if Path(run).is_dir() else Path(run)


def read_log(run: str) -> RunLog:
    """What the log of a run holds; run: its folder, or the file.

    A last line that is not whole is being written, and left out. Raises CheckpointError where there is no log, a line
    is none, or no step is in it.
    """
    path = log_of(run)
    steps: dict[int, dict[str, float]] = {}
    evaluations: dict[int, dict[str, float]] = {}
    for number, line in enumerate(_lines(path, run), 1):
        record = _record(line, f"{path}:{number}")
        if record is not None:
            kind = evaluations if "eval_loss" in record else steps
            kind[int(record["step"])] = record
    if not steps:
        raise CheckpointError(f"{path} holds no step of a training yet: wait for its first lines")
    return RunLog(run, dict(sorted(steps.items())), dict(sorted(evaluations.items())))


def losses_of(run: str) -> list[float]:
    """The losses of a run's log in order; none where the log cannot be read."""
    try:
        return [line["loss"] for line in read_log(run).steps.values()]
    except CheckpointError:
        return []


def _lines(path: Path, run: str) -> Iterator[bytes]:
    try:
        content = bytes(read_bytes(path, MOST))
    except OSError as error:
        raise CheckpointError(
            f"{run}: {LOG} cannot be read there ({error.strerror or error}): give the folder that a training's --out "
            "named"
        ) from None
    yield from content[: content.rfind(b"\n") + 1].splitlines()


def _record(line: bytes, place: str) -> dict[str, float] | None:
    """The numbers of a line; None where it tells neither a loss nor an evaluation."""
    try:
        value: Any = parse_json(line)
    except ValueError as error:
        raise CheckpointError(f"{place}: no line of a training's log ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{place}: no line of a training's log, which are JSON objects")
    if not {"loss", "eval_loss"} & value.keys():
        return None
    numbers = {name: float(number) for name, number in value.items() if _is_number(number)}
    if "step" not in numbers or not {"loss", "eval_loss"} & numbers.keys():
        raise CheckpointError(f"{place}: its step and loss must be finite numbers")
    return numbers


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
