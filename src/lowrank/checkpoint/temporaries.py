"""The hidden names that results are written under, `.NAME.PID-TOKEN.tmp`, and what a killed process leaves of them."""

import os
import re
import secrets
import shutil
import sys
from pathlib import Path

TOKEN = secrets.token_hex(4)  # in a container every program may have the number 1: numbers alone do not tell them apart
LEFT = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d{1,9})-(?P<token>[0-9a-f]{8})\.tmp")


def temporary(path: Path) -> Path:
    """The hidden name beside `path` that this process writes to before it gives the result its name."""
    return path.with_name(f".{path.name}.{os.getpid()}-{TOKEN}.tmp")


def sweep(folder: Path, name: str | None = None) -> None:
    """Delete the temporaries in `folder` (of `name` alone, where given) that processes left which are no more."""
    for entry in leftovers(folder):
        if name is None or entry.name.startswith(f".{name}."):
            delete(entry)


def leftovers(folder: Path) -> list[Path]:
    """The temporaries in `folder` of processes that are no more."""
    try:
        found = [(entry, LEFT.fullmatch(entry.name)) for entry in folder.iterdir()]
    except OSError:
        return []
    return [entry for entry, match in found if match and not _at_work(int(match["pid"]), match["token"])]


def _at_work(pid: int, token: str) -> bool:
    if pid == os.getpid():
        return token == TOKEN
    if sys.platform == "win32":
        return True  # there, signal 0 is Ctrl-C
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def delete(path: Path) -> None:
    """Delete a file, or a folder with all it holds, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            return  # what cannot be deleted is not in the way
