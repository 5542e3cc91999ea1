"""Where long work is: the library tells the stage it is in, and whoever listens shows it; nothing is shown unasked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str, int | None, int | None], None]  # (what is done, how many so far, of how many)
_listeners: list[Listener] = []


def stage(what: str, done: int | None = None, total: int | None = None) -> None:
    """Tell the innermost listener: "tokenising 600 rows", or "training", 3, 40. From any thread."""
    if _listeners:
        _listeners[-1](what, done, total)


@contextmanager
def under(name: str) -> Iterator[None]:
    """Inside, every stage is told as one of what `name` says: "full, seed 0: training", 3, 40."""
    if not _listeners:
        yield
        return
    outer = _listeners[-1]
    with listening(lambda what, done, total: outer(f"{name}: {what}", done, total)):
        yield


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, `listener` is told every stage."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
