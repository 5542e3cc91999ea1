"""trackio: one run, in the project that TRACKIO_PROJECT names, else "lowrank"."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Trackio:
    """A line for every step that is reported."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of a step."""
        self.module.log(dict(figures), step=step)

    def write_text(self, step: int, text: str) -> None:
        """Beside the figures of the step."""
        self.module.log({"eval/samples": text}, step=step)

    def close(self) -> None:
        """The run is complete."""
        self.module.finish()


def open_sink(folder: Path, settings: Mapping[str, Any], _start: int | None) -> Trackio:
    """A run that is called as its folder is, with the settings as its configuration."""
    import trackio

    trackio.init(project=os.environ.get("TRACKIO_PROJECT", "lowrank"), name=folder.name, config=dict(settings))
    return Trackio(trackio)
