"""What a run made: for whoever called it, and for run.json."""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank import __version__
from lowrank.data.recipe import Recipe
from lowrank.train.evaluation import Scores
from lowrank.train.loop_state import LoopState
from lowrank.train.task import Loaded


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


def record(recipe: Recipe, state: LoopState, loaded: Loaded) -> dict[str, Any]:
    """The content of run.json."""
    return {
        "recipe": recipe.as_json(),
        "steps": state.step,
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
    found = state.evaluations
    return TrainResult(
        folder=folder,
        steps=state.step,
        trained_tokens=state.trained,
        before=found[0][1] if found else None,
        after=found[-1][1] if found else None,
        best=state.best,
    )
