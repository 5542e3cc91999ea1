"""What a run tells while it runs. The library says nothing by itself; the command line shows it, the log keeps it."""

import json
import os
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowrank.errors import LowrankWarning
from lowrank.train.evaluation import Scores


@dataclass(frozen=True, slots=True)
class Progress:
    """The state after a step. loss: mean since the last report; trained: tokens (or rows to classify) so far.

    memory: bytes at the most so far (`train.memory`).
    """

    step: int
    loss: float
    rate: float
    tokens_per_second: float
    trained: int
    memory: int

    def as_json(self) -> dict[str, Any]:
        """A line of the log."""
        return {
            "step": self.step,
            "loss": self.loss,
            "lr": self.rate,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "trained_tokens": self.trained,
            "memory_bytes": self.memory,
        }


@dataclass(frozen=True, slots=True)
class Sample:
    """What the model answers to one of the user's prompts. prompt: what was said last."""

    prompt: str
    answer: str


def evaluation_json(step: int, scores: Scores) -> dict[str, Any]:
    """A line of the log."""
    figures = {f"eval_{name}": value for name, value in scores.figures.items()}
    return {"step": step, "eval_loss": scores.loss, "eval_tokens": scores.count, **figures}


def append_whole(path: Path, line: bytes) -> None:
    """Append all of `line` to a file, or nothing. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        try:
            while line:
                line = line[os.write(descriptor, line) :]
        except OSError:
            if os.fstat(descriptor).st_size > before:
                os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


class Reporter:
    """Where a run reports to. This one says nothing; the others override what they want to hear."""

    def started(self, summary: Sequence[tuple[str, str]], steps: int) -> None:
        """Before the first step: (what, value) pairs to show, and how many steps there will be."""

    def stepped(self, step: int) -> None:
        """After every step."""

    def progressed(self, progress: Progress) -> None:
        """Every `log_every` steps, and after the last."""

    def evaluated(self, step: int, scores: Scores) -> None:
        """After an evaluation; step 0 is before training."""

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        """After an evaluation with `sample_prompts`: what the model answers now."""

    def stopping(self, number: int) -> None:
        """From a signal's handler: the signal that came, after which the step is finished and a checkpoint written."""


class Log(Reporter):
    """A reporter that appends one JSON record a line to a file, each written before the run goes on.

    A line that cannot be written is left out, whole, and the first time a LowrankWarning says so: a training is worth
    more than its log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began = time.monotonic()
        self.warned = False

    @property
    def seconds(self) -> float:
        """How long the run has taken, over all its starts."""
        return time.monotonic() - self.began

    def go_on(self, length: int | None, seconds: float) -> None:
        """In place: as it was when it had so many bytes, after so many seconds; later lines are written anew."""
        self.began = time.monotonic() - seconds
        with suppress(OSError):
            if length is not None and os.path.getsize(self.path) > length:
                os.truncate(self.path, length)

    def _write(self, record: dict[str, Any]) -> None:
        record["seconds"] = round(self.seconds, 3)
        try:
            append_whole(self.path, (json.dumps(record) + "\n").encode())
        except OSError as error:
            if not self.warned:
                self.warned = True
                reason = error.strerror or error
                text = f"{self.path}: cannot be written ({reason}); the training goes on, lines of its log are missing"
                warnings.warn(text, LowrankWarning, stacklevel=2)

    def progressed(self, progress: Progress) -> None:
        """A line with the step's figures."""
        self._write(progress.as_json())

    def evaluated(self, step: int, scores: Scores) -> None:
        """A line with the evaluation's figures."""
        self._write(evaluation_json(step, scores))

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        """A line with the prompts and their answers."""
        self._write({"step": step, "samples": [asdict(sample) for sample in samples]})


class Several(Reporter):
    """A reporter that passes everything on to others, in order."""

    def __init__(self, *reporters: Reporter) -> None:
        self.reporters = reporters

    def started(self, summary: Sequence[tuple[str, str]], steps: int) -> None:
        """To all."""
        for reporter in self.reporters:
            reporter.started(summary, steps)

    def stepped(self, step: int) -> None:
        """To all."""
        for reporter in self.reporters:
            reporter.stepped(step)

    def progressed(self, progress: Progress) -> None:
        """To all."""
        for reporter in self.reporters:
            reporter.progressed(progress)

    def evaluated(self, step: int, scores: Scores) -> None:
        """To all."""
        for reporter in self.reporters:
            reporter.evaluated(step, scores)

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        """To all."""
        for reporter in self.reporters:
            reporter.sampled(step, samples)

    def stopping(self, number: int) -> None:
        """To all."""
        for reporter in self.reporters:
            reporter.stopping(number)
