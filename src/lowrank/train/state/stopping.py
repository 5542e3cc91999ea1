"""When a training is to stop between two steps: a signal, or its time is up."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lowrank import launch

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


ECHO = 5.0  # seconds in which a launcher passes on what the terminal has told its processes already


class Left(KeyboardInterrupt):
    """An evaluation that was left because a signal came."""


class Stop:
    """Listens for signals, and looks at the clock. number: the signal that came, None while none has.

    left: whether an evaluation was left for it. told: called with the number when the first one comes, from its
    handler.
    """

    def __init__(self, deadline: float | None, told: Callable[[int], None]) -> None:
        self.deadline = deadline
        self.told = told
        self.number: int | None = None
        self.left = False
        self._before: dict[int, Any] = {}
        self._evaluating = False
        self._since = 0.0

    @property
    def wanted(self) -> bool:
        """Whether the training is to stop now."""
        return self.number is not None or (self.deadline is not None and time.monotonic() >= self.deadline)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In the block the first signal is kept for `wanted`; a second one does what it would have done without us.

        Signals that are ignored stay so. Outside of the main thread nobody listens.
        """
        if threading.current_thread() is threading.main_thread():
            found = {number: signal.getsignal(number) for number in SIGNALS}
            self._before = {n: handler for n, handler in found.items() if handler not in (signal.SIG_IGN, None)}
        for number in self._before:
            signal.signal(number, self._came)
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In the block nothing changes, so that a signal ends it at once."""
        try:
            self._evaluating = self.number is None
            yield
        except Left:
            self.left = True
        finally:
            self._evaluating = False

    def _came(self, number: int, _frame: FrameType | None) -> None:
        if self.number is not None:
            if launch.count() > 1 and time.monotonic() - self._since < ECHO:
                return
            self._leave()
            signal.raise_signal(number)
            return
        self.number, self._since = number, time.monotonic()
        self.told(number)
        if self._evaluating:
            self._evaluating = False
            raise Left

    def _leave(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
