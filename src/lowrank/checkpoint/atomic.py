"""Files that are whole or not there: written under a temporary name, synced, then renamed.

What is guaranteed, power loss included:

- A file under its final name is whole, always.
- A folder that did not exist, was empty, or holds nothing but the files to be written (an adapter's folder) changes
  from the old files to the new ones in a single step: the new folder is written and synced beside it, then takes its
  name. No reader sees the weights of one adapter with the config of another.
- Where the folder holds other files too (a training run's), or the file system cannot exchange two folders, each file
  is replaced in the given order after all of them are written and synced. Only a power loss between two renames, some
  microseconds, can then leave new files beside old ones, each of them whole.
- When writing fails (no space, no permission), what was there is untouched and nothing temporary is left. A killed
  process can leave a hidden `.NAME.PID-TOKEN.tmp` behind, which no reader looks at; the next writing of NAME sweeps it.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lowrank.checkpoint.temporaries import delete, sweep, temporary
from lowrank.errors import OutputError

Content = bytes | Sequence[memoryview]  # of a file: at once, or by parts that are written where they lie

AT_FDCWD = -100
RENAME_EXCHANGE = 2


def sync(path: Path) -> None:
    """Make a file's or a folder's present state durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, data: Content) -> None:
    with open(path, "wb") as file:
        for part in (data,) if isinstance(data, bytes) else data:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write in the block; it becomes `path` when the block ends, and is deleted if it raises."""
    beside = temporary(path)
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
    finally:
        delete(beside)
    sync(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Replace one file durably. Raises OutputError where it cannot be written."""
    try:
        with replacing(path) as beside:
            _write_synced(beside, data)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_folder(folder: Path, files: Mapping[str, Content]) -> None:
    """Write `files` (name: content) into `folder`, all of them or none; see the module for what is guaranteed.

    Raises OutputError where the files cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    sweep(folder.parent, folder.name)
    try:
        present = set(os.listdir(folder)) if folder.exists() else set()
        if present <= set(files) and _swap_folder(folder, files):
            return
        _replace_each(folder, files)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot write {', '.join(files)} ({error.strerror or error}); what was there is untouched"
        ) from error


def _swap_folder(folder: Path, files: Mapping[str, Content]) -> bool:
    """Put a new folder with `files` in the place of `folder`; False, with nothing changed, where that is impossible."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = temporary(folder)
    try:
        beside.mkdir()
    except OSError:
        return False  # the parent may be read-only where the folder itself is not
    try:
        for name, data in files.items():
            _write_synced(beside / name, data)
        sync(beside)
        if not _put_in_place(beside, folder):
            return False
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    sync(folder.parent)
    return True


def _put_in_place(beside: Path, folder: Path) -> bool:
    if folder.exists():
        shutil.copymode(folder, beside)
        if os.listdir(folder):
            return exchange(beside, folder)
    try:
        os.rename(beside, folder)
    except OSError:
        return False  # a mount point, for one
    return True


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change names in one step; False where this system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0)


def _replace_each(folder: Path, files: Mapping[str, Content]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    beside = {name: temporary(folder / name) for name in files}
    try:
        for name, data in files.items():
            _write_synced(beside[name], data)
        for name in files:
            os.replace(beside[name], folder / name)
    finally:
        for path in beside.values():
            delete(path)
    sync(folder)
