"""Bytes of files: written whole, and moved by the kernel where it can."""

import errno
import fcntl
import os
from pathlib import Path

from lowrank.files.regular import read_into

NOT_BY_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY}
CHUNK = 2**20
FICLONE = 0x40049409  # Linux's ioctl for sharing all blocks of a file: linux/fs.h


def write_from(descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of `view` at `offset`."""
    done = 0
    while done < len(view):
        done += os.pwritev(descriptor, [view[done:]], offset + done)


def move(source: int, start: int, result: int, offset: int, count: int, path: Path) -> None:
    """Copy `count` bytes from one file to another, inside the kernel where the file systems allow it."""
    done = _move_by_kernel(source, start, result, offset, count) if hasattr(os, "copy_file_range") else 0
    buffer = bytearray(min(CHUNK, count - done))
    while done < count:
        view = memoryview(buffer)[: count - done]
        read_into(source, view, start + done, path)
        write_from(result, view, offset + done)
        done += len(view)


def _move_by_kernel(source: int, start: int, result: int, offset: int, count: int) -> int:
    """How many bytes the kernel copied; less than `count` where it declined the rest."""
    done = 0
    while done < count:
        try:
            moved = os.copy_file_range(source, result, count - done, start + done, offset + done)
        except OSError as error:
            if error.errno in NOT_BY_KERNEL:
                return done
            raise
        if moved == 0:
            return done
        done += moved
    return done


def clone(source: Path, result: Path) -> bool:
    """Make `result` share all of the source's blocks (a reflink); False where the file system cannot."""
    with open(source, "rb") as old, open(result, "wb") as new:
        try:
            fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
        except OSError:
            return False
    return True
