"""One process at a time for one place: a lock that ends with its process, however that ends."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lowrank.errors import OutputError

fcntl: Any
try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None

WITHOUT = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system that has no locks


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Hold the lock of `place` in the block: `.NAME.lock` beside it, which is gone afterwards.

    Folders above are made where they are missing, and taken away again where nothing came into them. Where only the
    folder `place` itself can be written to (a mount), it is locked itself.

    Raises OutputError where another process holds the lock, or nothing can be written there.
    """
    made = _make(place.parent)
    try:
        file, descriptor = _acquire(place)
        try:
            yield
        finally:
            with suppress(OSError):
                if file is not None:
                    file.unlink()  # before it is let go: nobody else's may be deleted
            os.close(descriptor)
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make a folder with those above it; the new ones, from below."""
    missing = [one for one in (folder, *folder.parents) if not os.path.exists(one)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({error.strerror or error}): give another place") from error
    return missing


def _acquire(place: Path) -> tuple[Path | None, int]:
    """(the lock file, None where the folder itself is it; its descriptor)."""
    while True:
        file, descriptor = _open(place)
        try:
            _lock(descriptor, place)
            if file is None or os.path.samestat(os.stat(file), os.fstat(descriptor)):
                with suppress(OSError):
                    os.truncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()}\n".encode())
                return file, descriptor
        except FileNotFoundError:
            pass  # the process that held it has deleted it since it was opened
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(place: Path) -> tuple[Path | None, int]:
    file = place.with_name(f".{place.name}.lock")
    try:
        return file, os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if os.path.isdir(place) and os.access(place, os.W_OK):
            return None, os.open(place, os.O_RDONLY)
        raise OutputError(f"cannot write to {place.parent} ({error.strerror or error}): give another place") from error


def _lock(descriptor: int, place: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"another process{_number(descriptor)} is writing {place} now: wait for it, or give another place"
        ) from None
    except OSError as error:
        if error.errno not in WITHOUT:
            raise


def _number(descriptor: int) -> str:
    """ " 1234", as its holder wrote it down, or nothing."""
    try:
        text = os.pread(descriptor, 20, 0).decode().strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return f" ({text})" if text.isdigit() else ""
