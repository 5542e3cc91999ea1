"""What a run made: for whoever called it, and for run.json."""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank import __version__
from lowrank.data.recipe import FILE, Recipe
from lowrank.errors import CheckpointError
from lowrank.files.json_file import read_object
from lowrank.train.evaluation import Scores
from lowrank.train.loop import steps_of
from lowrank.train.loop_state import LoopState
from lowrank.train.patience import out_of_patience
from lowrank.train.settings import TrainSettings
from lowrank.train.task import Loaded

Evaluations = list[tuple[int, Scores]]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run made. folder: where it is; before, after: the first and the last evaluation, None without any.

    best: (step, scores) of the evaluation with the least loss.
    """

    folder: Path
    steps: int
    trained_tokens: int
    before: Scores | None
    after: Scores | None
    best: tuple[int, Scores] | None


def record(recipe: Recipe, state: LoopState, loaded: Loaded, rows: int) -> dict[str, Any]:
    """The content of run.json. rows: how many there were to train on; packs, where they were packed."""
    return {
        "recipe": recipe.as_json(),
        "steps": state.step,
        "rows": rows,
        "tokens": state.tokens,
        "trained_tokens": state.trained,
        "evaluations": [
            {"step": step, "loss": scores.loss, "tokens": scores.count, **scores.figures}
            for step, scores in state.evaluations
        ],
        "best_step": state.best[0] if state.best else None,
        "device": str(loaded.device),
        "versions": {"lowrank": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def result_of(folder: Path, state: LoopState) -> TrainResult:
    """The result in `folder` of a training that ended in this state."""
    return _result(folder, state.step, state.trained, state.evaluations)


def finished(folder: Path, settings: TrainSettings) -> TrainResult | None:
    """The result of a run that has taken all steps that the settings mean, or had no patience for; else None.

    Raises CheckpointError for a damaged run.json.
    """
    if not (folder / FILE).is_file():
        return None
    found = read_object(folder / FILE, "delete it to go on from the last checkpoint")
    try:
        steps, rows, evaluations = int(found["steps"]), int(found["rows"]), _evaluations(found["evaluations"])
        trained = int(found["trained_tokens"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{folder / FILE}: damaged, what the run gave cannot be read; delete it to go on from the last checkpoint"
        ) from None
    if steps_of(settings, rows) > steps and not out_of_patience(evaluations, settings.patience):
        return None
    return _result(folder, steps, trained, evaluations)


def _evaluations(found: list[dict[str, Any]]) -> Evaluations:
    own = ("step", "loss", "tokens")
    return [(e["step"], Scores(e["loss"], e["tokens"], {n: v for n, v in e.items() if n not in own})) for e in found]


def _result(folder: Path, steps: int, trained: int, found: Evaluations) -> TrainResult:
    return TrainResult(
        folder=folder,
        steps=steps,
        trained_tokens=trained,
        before=found[0][1] if found else None,
        after=found[-1][1] if found else None,
        best=min(found, key=lambda one: one[1].loss, default=None),
    )
