"""A bar of the bytes written, on standard error; without one, a stage that others may show."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lowrank.stages import stage

MEGABYTE = 10**6


@contextmanager
def bar(total: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A function that is told, from any thread, how many more bytes are written; it draws nothing unless `wanted`."""
    if not wanted:
        yield _telling(total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task("merging", total=total)
        yield lambda count: progress.advance(task, count)


def _telling(total: int) -> Callable[[int], None]:
    """Counts the bytes and tells the megabytes as a stage."""
    done, lock = 0, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
        stage("megabytes merged", done // MEGABYTE, total // MEGABYTE)

    return advance
