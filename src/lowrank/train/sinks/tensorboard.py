"""TensorBoard: event files in the run's folder, `tensorboard --logdir RUN`."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

FOLDER = "tensorboard"


class TensorBoard:
    """A scalar for every figure."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """A point in each curve, on disk before the run goes on."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def write_text(self, step: int, text: str) -> None:
        """Shown as it is: indented, none of it is markdown."""
        self.writer.add_text("eval/samples", indent(text, "    "), step)
        self.writer.flush()

    def close(self) -> None:
        """The file is whole."""
        self.writer.close()


def open_sink(folder: Path, _settings: Mapping[str, Any], start: int | None) -> TensorBoard:
    """Events of an earlier try are deleted; of a run that goes on, those after `start` are withdrawn."""
    from torch.utils.tensorboard import SummaryWriter

    if start is None:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
    purged = None if start is None else start + 1
    return TensorBoard(SummaryWriter(str(folder / FOLDER), purge_step=purged))
