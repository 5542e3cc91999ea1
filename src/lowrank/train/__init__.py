"""Training: data files to rows, rows to tokens, tokens to an adapter; and measuring and sampling what came out.

The public names are loaded when they are first used: reading the settings must not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank.train.evaluation import Scores
    from lowrank.train.evaluator import EvalResult, evaluate
    from lowrank.train.generation import generate
    from lowrank.train.result import TrainResult
    from lowrank.train.settings import EvalSettings, GenerateSettings, TrainSettings
    from lowrank.train.trainer import resume, run

_HOMES = {
    "EvalResult": "lowrank.train.evaluator",
    "EvalSettings": "lowrank.train.settings",
    "GenerateSettings": "lowrank.train.settings",
    "Scores": "lowrank.train.evaluation",
    "TrainResult": "lowrank.train.result",
    "TrainSettings": "lowrank.train.settings",
    "evaluate": "lowrank.train.evaluator",
    "generate": "lowrank.train.generation",
    "resume": "lowrank.train.trainer",
    "run": "lowrank.train.trainer",
}

__all__ = [  # noqa: RUF022  in the order of use
    "TrainSettings",
    "run",
    "resume",
    "TrainResult",
    "EvalSettings",
    "evaluate",
    "EvalResult",
    "Scores",
    "GenerateSettings",
    "generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lowrank.train' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
