"""Writes a run's checkpoints when they are due, stops it when that is asked for, and takes it back when it diverged."""

import os
import shlex
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals

from lowrank.checkpoint.atomic import sync
from lowrank.errors import Diverged, LowrankError, LowrankWarning, OutputError, Stopped
from lowrank.train import processes
from lowrank.train.loop import Loop
from lowrank.train.reporting import Log
from lowrank.train.state.capture import capture, restore
from lowrank.train.state.forward import ForwardState
from lowrank.train.state.settings import CheckpointSettings
from lowrank.train.state.stopping import Stop
from lowrank.train.state.store import checkpoint, latest, prune, steps_kept
from lowrank.train.state.value import About, LogFacts, RunValue
from lowrank.train.watch import Watch

SECONDS = 600.0  # between checkpoints, where no steps are given
KEPT = 2  # while the run lasts
HALVINGS = 3  # at most


@dataclass(slots=True)
class Keeper(Watch):
    """Of the run in `folder`, which its user calls `name`. rows: from examples to the places of their rows.

    last: the step of the last whole checkpoint, None before there is one.
    """

    folder: Path
    name: str
    settings: CheckpointSettings
    about: About
    log: Log
    stop: Stop
    forward: ForwardState
    rows: Callable[[Sequence[int]], list[str]]
    last: int | None = None
    refused: bool = False  # whether the disk refused the last one
    written: float = field(default_factory=time.monotonic)

    def go_on(self, loop: Loop, value: RunValue) -> None:
        """In place: loop and log are where they were. Raises CheckpointError where the value is of another run."""
        try:
            restore(loop, self.forward, value)
        except LowrankError as error:
            raise type(error)(f"{checkpoint(self.folder, value.facts.step)}: {error}") from None
        self.last = value.facts.step
        if processes.is_first():
            self.log.go_on(value.facts.log.length, value.facts.log.seconds)

    def between(self, loop: Loop) -> None:
        """Write a checkpoint where one is due. Raises Stopped, with one written, where the training is to stop.

        However short its time, a start takes a step: else a run that is started again and again would stay where it is.
        """
        state = loop.state
        stops = self._stops()
        begun = state.step != (self.last or 0) or self.stop.number is not None
        if stops and begun and (state.step < loop.steps or self.stop.left):
            if state.step > 0 and state.step != self.last:
                self._write(loop)
            raise Stopped(self._why(state.step), self.stop.number)
        if state.step != self.last and processes.first_says(self._is_due(loop)):
            self._write(loop)

    def evaluating(self) -> AbstractContextManager[None]:
        """A signal ends an evaluation at once; not one that several processes share, which would wait for this one."""
        return nullcontext() if processes.grouped() else self.stop.evaluating()

    def places(self, examples: Sequence[int]) -> list[str]:
        """file:line of each row."""
        return self.rows(examples)

    def saved(self) -> str:
        """Where the last checkpoint is, and how it is gone on from."""
        if self.last is None:
            return Watch.saved(self)  # with slots, `super()` would look for another class
        where = checkpoint(Path(self.name), self.last)
        if self.settings.on_divergence == "back":
            return f"{where} is the last good checkpoint, gone back to {HALVINGS} times in vain"
        return f"{where} is the last good checkpoint, which {self._line} --on-divergence back goes on from"

    def goes_back(self, loop: Loop, error: Diverged) -> bool:
        """In place: the loop is where the last checkpoint was, at half the rate; False where that is not to be done."""
        halvings = loop.state.halvings + 1
        if self.settings.on_divergence != "back" or halvings > HALVINGS:
            return False
        value = latest(self.folder)
        if value is None:
            return False
        self.go_on(loop, value)
        loop.state.halvings = halvings
        what = str(error).split(", so ")[0]
        warnings.warn(
            f"{what}; back to step {value.facts.step}, at 1/{2**halvings} of the rate", LowrankWarning, stacklevel=2
        )
        return True

    def _stops(self) -> bool:
        """Whether to stop now: of several processes, some may hear a signal before others do."""
        own = -1 if not self.stop.wanted else self.stop.number or 0
        agreed = processes.largest(own)
        self.stop.number = agreed if agreed > 0 else self.stop.number
        return agreed >= 0

    def _is_due(self, loop: Loop) -> bool:
        step, settings = loop.state.step, self.settings
        if step == loop.steps:
            return settings.keep_checkpoints is not None  # else the result itself comes now
        if step == 0:
            return settings.on_divergence == "back"
        if loop.state.evaluated:
            return True
        if settings.save_every is not None:
            return step % settings.save_every == 0
        return time.monotonic() - self.written >= SECONDS

    def _write(self, loop: Loop) -> None:
        """A disk that refuses is said; the training goes on, and the next time is another try.

        Every process has its part in it, and the first one writes.
        """
        step = loop.state.step
        place = checkpoint(self.folder, step)
        self.written = time.monotonic()
        value = capture(loop, self.forward, self.about, self._log_facts())
        if processes.first_says(processes.is_first() and self._written(value, place)):
            self.last = step

    def _say(self, place: Path, error: Exception) -> None:
        last = "there is none yet" if self.last is None else f"that of step {self.last} stays"
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        reason = getattr(cause, "strerror", None) or cause
        text = f"{place}: the checkpoint cannot be written ({reason}); the training goes on, {last}, and more are tried"
        warnings.warn(text, LowrankWarning, stacklevel=2)

    def _written(self, value: RunValue, place: Path) -> bool:
        """Whether the disk took it; checkpoints that are not to be kept any more are deleted then.

        One that it refuses is said, those after it are not until it has taken one.
        """
        try:
            value.write(place)
        except (OSError, OutputError) as error:
            if not self.refused:
                self._say(place, error)
            self.refused = True
            return False
        self.refused = False
        step, evaluations = value.facts.step, value.facts.evaluations
        recent = [found for found in steps_kept(self.folder) if found <= step]
        best = [min(evaluations, key=lambda one: one.loss).step] if evaluations else []
        prune(self.folder, {*recent[-(self.settings.keep_checkpoints or KEPT) :], *best})
        return True

    def _log_facts(self) -> LogFacts:
        """The log as it is on the disk: a checkpoint never knows of lines that a power loss took."""
        path = self.log.path
        try:
            sync(path)
            length = os.path.getsize(path)
        except OSError:
            return LogFacts(length=None, seconds=self.log.seconds)
        return LogFacts(length=length, seconds=self.log.seconds)

    def _why(self, step: int) -> str:
        number = self.stop.number
        why = f"--stop-after {self.settings.stop_after}" if number is None else Signals(number).name
        if self.last is None:
            return f"stopped by {why} after step {step}, with no checkpoint; {self._line} begins anew"
        at = "" if self.last == step else f", and goes on from step {self.last}"
        return f"stopped by {why} after step {step}{at}; to go on: {self._line}"

    @property
    def _line(self) -> str:
        return f"lowrank train --resume {shlex.quote(self.name)}"
