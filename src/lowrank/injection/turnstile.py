"""Switching adapters while other threads run the model: a forward sees a switch whole, or not at all.

A switch goes through the model layer by layer. `Turnstile` lets any number of threads run the model's forward, and one
change it while none does. They take turns: a change that waits holds new forwards back, and forwards that a change kept
waiting go before the next one, so that neither starves. The model's hooks bring its forwards through
(`injection.rounds`); a submodule that is called alone, or a compiled model, goes past.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn

from lowrank.errors import LowrankError

LOOK_AGAIN = 0.05  # seconds: a thread may die in the middle of a forward
PATIENCE = 120.0  # seconds


class Turnstile:
    """Many forwards, or one change. Copies and pickles of it are new and open."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: dict[int, int] = {}  # by thread: how many forwards, one inside of the other
        self._owner: int | None = None  # the thread that changes the model
        self._depth = 0
        self._waiting = 0  # changes
        self._held = 0  # forwards that wait
        self._due = 0  # of these, how many were there when the last change ended
        self._round = 0  # how many changes have ended

    def __reduce__(self) -> tuple[Any, ...]:
        """A new one: what waits here does not wait there."""
        return Turnstile, ()

    def enter(self) -> None:
        """A forward begins in this thread: wait until nobody changes the model."""
        me = threading.get_ident()
        with self._changed:
            if (self._waiting or self._owner is not None) and me not in self._running and self._owner != me:
                self._stand()
            self._running[me] = self._running.get(me, 0) + 1

    def _stand(self) -> None:
        """Wait until nobody changes the model, or for the end of one change where others wait too."""
        came = self._round
        self._held += 1
        try:
            self._changed.wait_for(lambda: self._owner is None and (not self._waiting or self._round > came))
        finally:
            self._held -= 1
            if self._round > came:
                self._due -= 1

    def leave(self) -> None:
        """A forward ended in this thread."""
        me = threading.get_ident()
        with self._changed:
            left = self._running.pop(me, 0) - 1
            if left > 0:
                self._running[me] = left
            else:
                self._changed.notify_all()

    @contextmanager
    def change(self, model: nn.Module) -> Iterator[None]:
        """The block changes `model`: no other thread runs or changes it meanwhile. Changes nest within a thread.

        Raises LowrankError inside of a forward of the model, which would see half of the change.
        """
        me = threading.get_ident()
        with self._changed:
            if self._owner != me:
                self._wait(me, model)
            self._owner, self._depth = me, self._depth + 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._owner = None
                    self._round += 1
                    self._due = self._held
                    self._changed.notify_all()

    def _wait(self, me: int, model: nn.Module) -> None:
        if me in self._running and not _runs(model):
            del self._running[me]  # a Ctrl-C ended that forward without a word
        if me in self._running:
            raise LowrankError(
                f"adapters cannot be switched inside of the forward of the {type(model).__name__} that has them"
            )
        self._waiting += 1
        latest = time.monotonic() + PATIENCE
        try:
            while self._owner is not None or self._due or self._others():
                self._changed.wait(LOOK_AGAIN)
                if time.monotonic() > latest:
                    raise LowrankError(
                        f"adapters cannot be switched: another thread is in a forward of the {type(model).__name__} "
                        f"for more than {PATIENCE:g} s"
                    )
        finally:
            self._waiting -= 1
            self._changed.notify_all()

    def _others(self) -> bool:
        """Whether a forward runs in a thread that lives."""
        if self._running:
            alive = {thread.ident for thread in threading.enumerate()}
            self._running = {thread: depth for thread, depth in self._running.items() if thread in alive}
        return bool(self._running)


def _runs(model: nn.Module) -> bool:
    """Whether a call of `model` is on this thread's stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is model:
            return True
        frame = frame.f_back
    return False
