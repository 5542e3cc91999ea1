"""A folder that gets its final name only when everything in it is whole and on the disk.

The result is written to `.NAME.merging` beside its final name, which is locked while a process works in it. Killed at
any moment, a merge leaves that hidden folder or the finished result, nothing between; the next merge to the same name
finds the folder unlocked and clears it.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank.checkpoint.atomic import sync
from lowrank.errors import MergeError

SPARE = 2**24  # bytes left free for the file system's own use


def check_place(out: Path, sources: dict[str, Path]) -> Path:
    """The real path of the result's folder, where one may be made. sources: {what it is: its folder}.

    Raises MergeError for a place that is a source, lies in one, or is in use.
    """
    real = Path(os.path.realpath(out))
    for what, folder in sources.items():
        if real == folder:
            raise MergeError(f"--out {out} is the {what} itself: give a new folder, sources are never written to")
        if real.is_relative_to(folder):
            raise MergeError(
                f"--out {out} lies inside the {what}: give a folder outside it, sources are never written to"
            )
    if real.exists() and not real.is_dir():
        raise MergeError(f"--out {out} is a file: give a new folder")
    if real.is_dir() and any(real.iterdir()):
        raise MergeError(f"--out {out} exists and is not empty: give a new folder, or delete this one first")
    return real


def check_space(folder: Path, needed: int) -> None:
    """Raise MergeError where the disk under `folder` has less than `needed` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed + SPARE > free:
        raise MergeError(
            f"the result needs {needed / 1e9:.2f} GB and the disk of {folder} has {free / 1e9:.2f} GB free: make room, "
            "or give --out on another disk"
        )


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A folder to write in; it becomes `out` when the block ends, and is deleted if the block raises.

    Files in it must be synced by the block; the folder itself and its change of name are made durable here.
    Raises MergeError where the folder cannot be made, or another process is writing the same result.
    """
    beside = out.with_name(f".{out.name}.merging")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(beside, out)
    except OSError as error:
        raise MergeError(f"cannot write to {out.parent} ({error.strerror or error}): give another --out") from error
    try:
        _clear(beside)
        yield beside
        _sync_folders(beside)
        os.rename(beside, out)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError):
            raise MergeError(f"writing {out} failed ({error.strerror or error}): nothing is left of it") from error
        raise
    finally:
        os.close(lock)
    sync(out.parent)


def _locked(beside: Path, out: Path) -> int:
    """A descriptor of the folder, locked for this process; it is made where it is missing."""
    while True:
        beside.mkdir(exist_ok=True)
        try:
            descriptor = os.open(beside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # the process that had it has just given it its final name
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise MergeError(f"another merge is writing {out} now: wait for it, or give another --out") from None
        if beside.exists() and os.path.samestat(os.stat(beside), os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)


def _clear(folder: Path) -> None:
    """Delete what a killed merge left."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync_folders(folder: Path) -> None:
    for parent, _, _ in os.walk(folder, topdown=False):
        sync(Path(parent))
