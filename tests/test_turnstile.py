"""Forwards and switches take turns: who waits goes before whoever asks again, in both directions. No clock is asked."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager

import pytest
from torch import nn

from lowrank.injection.turnstile import Turnstile

MODEL = nn.Identity()


def until(true: Callable[[], bool]) -> None:
    """Wait for another thread to get somewhere."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


class Turns:
    """A turnstile, and who went through it in which order."""

    def __init__(self) -> None:
        self.turnstile, self.order = Turnstile(), list[str]()
        self.threads: list[threading.Thread] = []

    @contextmanager
    def forward(self):
        self.turnstile.enter()
        try:
            self.order.append("forward")
            yield
        finally:
            self.turnstile.leave()

    @contextmanager
    def switch(self):
        with self.turnstile.change(MODEL):
            self.order.append("switch")
            yield

    def elsewhere(self, act: Callable[[], AbstractContextManager[None]], times: int = 1) -> None:
        """In another thread, as often as that."""

        def go() -> None:
            for _ in range(times):
                with act():
                    pass

        self.threads.append(threading.Thread(target=go, daemon=True))
        self.threads[-1].start()

    def end(self) -> None:
        """Everybody has gone through, and nobody is counted as waiting."""
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()
        turnstile = self.turnstile
        assert (turnstile._held, turnstile._due, turnstile._waiting, turnstile._running) == (0, 0, 0, {})


@pytest.fixture
def turns() -> Turns:
    return Turns()


def test_a_forward_that_a_switch_held_goes_before_the_next_switch(turns):
    """A thread that switches without pause asks again before the other one has even woken."""
    for number in range(1, 4):
        with turns.switch():
            for _ in range(number):
                turns.elsewhere(turns.forward)
            until(lambda count=number: turns.turnstile._held == count)
    with turns.switch():
        pass
    turns.end()
    assert "".join(name[0] for name in turns.order) == "sfsffsfffs"


def test_a_switch_that_forwards_held_goes_before_the_next_forward(turns):
    with turns.forward():
        turns.elsewhere(turns.switch)
        until(lambda: turns.turnstile._waiting == 1)
        turns.elsewhere(turns.forward)
        until(lambda: turns.turnstile._held == 1)
    turns.end()
    assert turns.order == ["forward", "switch", "forward"]


def test_of_two_switches_that_wait_one_goes_before_the_forwards_and_one_after(turns):
    with turns.forward():
        for _ in range(2):
            turns.elsewhere(turns.switch)
        until(lambda: turns.turnstile._waiting == 2)
        for _ in range(2):
            turns.elsewhere(turns.forward)
        until(lambda: turns.turnstile._held == 2)
    turns.end()
    assert "".join(name[0] for name in turns.order) == "fsffs"


def test_a_forward_that_is_interrupted_while_it_waits_is_not_waited_for(turns, monkeypatch):
    with turns.switch():
        monkeypatch.setattr(turns.turnstile._changed, "wait_for", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        faults: list[BaseException] = []

        def interrupted() -> None:
            try:
                turns.turnstile.enter()
            except KeyboardInterrupt as fault:
                faults.append(fault)

        thread = threading.Thread(target=interrupted)
        thread.start()
        thread.join()
    assert faults
    with turns.switch():
        pass
    turns.end()


def test_many_of_both_all_get_through(turns):
    for _ in range(4):
        turns.elsewhere(turns.forward, 200)
        turns.elsewhere(turns.switch, 50)
    turns.end()
    assert (turns.order.count("forward"), turns.order.count("switch")) == (800, 200)
