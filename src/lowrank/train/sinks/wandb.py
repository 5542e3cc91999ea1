"""Weights & Biases: one run, in the project that WANDB_PROJECT names, else "lowrank"."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Wandb:
    """A line for every step that is reported."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of a step."""
        self.run.log(dict(figures), step=step)

    def write_text(self, step: int, text: str) -> None:
        """Beside the figures of the step."""
        self.run.log({"eval/samples": text}, step=step)

    def close(self) -> None:
        """The run is complete."""
        self.run.finish()


def open_sink(folder: Path, settings: Mapping[str, Any], _start: int | None) -> Wandb:
    """A run that is called as its folder is, with the settings as its configuration."""
    import wandb

    project = os.environ.get("WANDB_PROJECT", "lowrank")
    return Wandb(wandb.init(project=project, name=folder.name, config=dict(settings)))
