"""Opening a file that may be anything: a pipe that never answers, a device without an end, a file that shrinks.

Bytes are read, never mapped: a mapped file that another program cuts short kills the process (SIGBUS).
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank.errors import CheckpointError

LARGEST = 2**36  # bytes of a file that is held in memory


class TruncatedError(CheckpointError):
    """A source file that became shorter while it was read."""

    def __init__(self, path: Path | str) -> None:
        super().__init__(f"{path} became shorter while it was read: another program is writing it")


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, int]]:
    """(descriptor, size) of a regular file.

    Raises OSError where it cannot be opened and CheckpointError for a folder, a pipe, a socket or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))  # a pipe opens at once
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is no regular file but a {_kind(status.st_mode)}: put the file itself there")
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def _kind(mode: int) -> str:
    return "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device"


def read_into(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view` from the file's bytes at `offset`."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise TruncatedError(path)
        done += count


def read_bytes(path: Path, most: int = LARGEST) -> bytearray:
    """All bytes of a regular file of at most `most`.

    Raises OSError where it cannot be opened and CheckpointError for anything but such a file.
    """
    with opened(path) as (descriptor, size):
        if size > most:
            raise CheckpointError(f"{path} has {size:,} bytes, and at most {most:,} can be meant there")
        content = bytearray(size)
        read_into(descriptor, memoryview(content), 0, path)
    return content
