"""What a command says where no bar shows its work: after seconds which stage it is in, then every half minute."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self, TextIO

from lowrank import launch
from lowrank.cli.stage_bar import StageBar
from lowrank.stages import listening

FIRST, EVERY = 5.0, 30.0  # seconds: a stage that takes less says nothing, nor at first one that counts


class Pulse:
    """Lines on standard error, from a thread of its own. Use it as a context manager."""

    def __init__(self, first: float, every: float, stream: TextIO | None = None) -> None:
        self.first, self.every, self.stream = first, every, stream
        self._what, self._done, self._total = "starting", None, None  # type: tuple[str, int | None, int | None]
        self._since = self._began = time.monotonic()
        self._due = self._since + every
        self._muted, self._seen = 0, {""}
        self._wake, self._stopped = threading.Event(), False
        self._bar = StageBar(self.stream or sys.stderr)
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def told(self, what: str, done: int | None, total: int | None) -> None:
        """The stage, as `lowrank.stages` tells it: what is new begins to be timed, what goes on counts up."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._since = what, now
            if what not in self._seen and done is None:
                self._seen.add(what)
                self._due = min(self._due, now + self.first)
                self._wake.set()
        self._done, self._total = done, total
        if not self._muted and launch.is_first():
            self._bar.told(what, done, total)

    def spoke(self) -> None:
        """Something else was shown: another half minute of silence is fine."""
        self._due = time.monotonic() + self.every

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Inside, a bar shows where the work is."""
        self._muted += 1
        self._bar.close()
        try:
            yield
        finally:
            self._muted -= 1
            self.spoke()

    def __enter__(self) -> Self:
        self._listening = listening(self.told)
        self._listening.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stopped = True
        self._bar.close()
        self._wake.set()
        self._thread.join()
        self._listening.__exit__(None, None, None)

    def _beat(self) -> None:
        while not self._stopped:
            left = self._due - time.monotonic()
            if left > 0:
                self._wake.wait(left)
                self._wake.clear()
                continue
            if not self._muted and not self._bar.shown and launch.is_first():
                print(self.line(), file=self.stream or sys.stderr, flush=True)
            self.spoke()

    def line(self) -> str:
        """Where the work is now: "lowrank: training, 3 of 40, 1:05"."""
        count = "" if self._done is None else f", {self._done:,}" + (f" of {self._total:,}" if self._total else "")
        seconds = round(time.monotonic() - self._since)
        return f"lowrank: {self._what}{count}, {seconds // 60}:{seconds % 60:02}"


pulse: Pulse | None = None


@contextmanager
def pulsing() -> Iterator[None]:
    """A pulse for the block; displays find it by `spoke` and `muted`."""
    global pulse
    before = pulse
    with Pulse(FIRST, EVERY) as pulse:
        try:
            yield
        finally:
            pulse = before


def spoke() -> None:
    """Tell the pulse, if there is one, that something was shown."""
    if pulse is not None:
        pulse.spoke()


@contextmanager
def muted() -> Iterator[None]:
    """No pulse in the block."""
    if pulse is None:
        yield
        return
    with pulse.muted():
        yield
