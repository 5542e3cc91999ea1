"""A folder that gets its final name only when everything in it is whole and on the disk.

The result is written under a hidden name beside its final one, a place that is claimed (`checkpoint.outputs`) while a
process works for it. Killed at any moment, that process leaves the hidden folder or the finished result, nothing
between; the next claim of the same place sweeps it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank.checkpoint.atomic import sync
from lowrank.checkpoint.temporaries import delete, temporary
from lowrank.errors import OutputError


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A folder to write in; it becomes the claimed place `out` when the block ends, and is deleted if the block raises.

    Files in it must be synced by the block; the folder itself and its change of name are made durable here.
    Raises OutputError where the folder cannot be made or written.
    """
    if os.path.ismount(out):
        raise OutputError(
            f"{out} is where a disk is mounted, which cannot get its content in one step: give a folder in it"
        )
    beside = temporary(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
    except OSError as error:
        raise OutputError(f"cannot write to {out.parent} ({error.strerror or error}): give another place") from error
    try:
        yield beside
        _sync_folders(beside)
        os.rename(beside, out)
    except OSError as error:
        raise OutputError(f"writing {out} failed ({error.strerror or error}): nothing is left of it") from error
    finally:
        delete(beside)
    sync(out.parent)


def _sync_folders(folder: Path) -> None:
    for parent, _, _ in os.walk(folder, topdown=False):
        sync(Path(parent))
