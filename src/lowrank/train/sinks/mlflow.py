"""MLflow: one run, in the experiment that MLFLOW_EXPERIMENT_NAME names, else "lowrank"."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LONGEST = 500  # characters that MLflow takes of a parameter


class Mlflow:
    """A metric for every figure."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of a step."""
        self.module.log_metrics(dict(figures), step=step)

    def write_text(self, step: int, text: str) -> None:
        """A file of the run's."""
        self.module.log_text(text, f"samples/step-{step}.txt")

    def close(self) -> None:
        """The run is complete."""
        self.module.end_run()


def open_sink(folder: Path, settings: Mapping[str, Any], _start: int | None) -> Mlflow:
    """A run that is called as its folder is, with the settings as its parameters."""
    import mlflow

    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "lowrank"))
    mlflow.start_run(run_name=folder.name)
    mlflow.log_params({name: str(value)[:LONGEST] for name, value in settings.items()})
    return Mlflow(mlflow)
