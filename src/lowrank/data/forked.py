"""Work in parts by several processes, the results in order: what they are does not depend on how many there are.

Each is a fork of this one, so it has what the work needs (mapped rows, a tokenizer) without a copy of it, and no
program is started anew. It is told the numbers of parts through a pipe, and ends when that is closed: with this
process too, however that ends.
"""

import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import current_process, get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from lowrank import launch
from lowrank.errors import DataError

AHEAD = 2  # parts that each has before it
OFF = ("false", "0", "off", "no", "n", "f")  # of TOKENIZERS_PARALLELISM
SWITCH = "TOKENIZERS_PARALLELISM"
Made = TypeVar("Made")


def useful() -> int:
    """How many processes there are cores for; 1 where none can be forked, or the tokenizer's own switches say so.

    Of several that a launcher started the first one goes ahead, alone, to fill the cache for all; what the others then
    find to do they do at the same time, so each has its share of this machine's cores.
    """
    if sys.platform != "linux" or current_process().daemon or os.environ.get(SWITCH, "").lower() in OFF:
        return 1
    asked = os.environ.get("RAYON_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    cores = len(os.sched_getaffinity(0))
    return cores if launch.is_first() else max(1, cores // launch.count_here())


def in_order(work: Callable[[int], Made], parts: int, processes: int) -> Iterator[Made]:
    """`work` of every part, by fewer processes where the system allows no more, by this one where it allows none.

    Raises what the work raises, and DataError where a process was ended from outside.
    """
    pipes: list[Connection] = []
    started: list[Any] = []
    try:
        with suppress(OSError):
            while len(started) < processes:
                started.append(_fork(work, pipes))
        if not started:
            yield from map(work, range(parts))
            return
        waiting: deque[Connection] = deque()
        for part in range(parts):
            pipe = pipes[part % len(started)]
            pipe.send(part)
            waiting.append(pipe)
            if len(waiting) == AHEAD * len(started):
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise DataError(
            f"a process that makes rows into tokens was ended from outside, perhaps for want of memory; {SWITCH}=false "
            "makes them in one"
        ) from None
    finally:
        for pipe in pipes:
            pipe.close()
        for process in started:
            process.join()


def _fork(work: Callable[[int], Any], pipes: list[Connection]) -> Any:
    """A process, and our end of its pipe as the last of `pipes`. Raises OSError."""
    ours, theirs = get_context("fork").Pipe()
    pipes.append(ours)
    process = get_context("fork").Process(target=_serve, args=(work, theirs, pipes), daemon=True)
    said = os.environ.get(SWITCH)
    os.environ[SWITCH] = "false"  # each has one core; and the tokenizer would tell everybody that it was forked
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads of this process are no part of the work
            process.start()
    finally:
        theirs.close()
        if said is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = said
    return process


def _serve(work: Callable[[int], Any], theirs: Connection, ours: list[Connection]) -> None:
    """Answer at `theirs`. ours: the ends of others, which would live as long as they are open here."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it says when to end
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for pipe in ours:
        pipe.close()
    try:
        while True:
            part = theirs.recv()
            try:
                found = work(part)
            except Exception as error:
                found = error
            theirs.send(found)
    except (EOFError, OSError):
        return


def _result(pipe: Connection) -> Any:
    """What comes next through the pipe. Raises it where it is an error."""
    found = pipe.recv()
    if isinstance(found, Exception):
        raise found
    return found
