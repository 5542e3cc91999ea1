"""Where a result may go: one rule for everything that writes to a place its user names.

- An input is never written to: no result is an input, lies in one or holds one, under whatever name or link.
- What is there already was made by someone else: a folder must be new or empty, a file new or expressly given up.
- One process writes at a time: the place is locked from this check until the result is there.
- What a killed process left of an earlier try is swept.
"""

import glob
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lowrank.checkpoint.locks import locked
from lowrank.checkpoint.temporaries import leftovers, sweep
from lowrank.errors import OutputError, short, some
from lowrank.hub import cached

Inputs = Mapping[str, str | os.PathLike[str] | None]  # {what it is: where it is}, None where it was not given
Check = Callable[[Path], None]  # raises OutputError where the place is in use

SPARE = 2**24  # bytes left free for the file system's own use


def new_folder(place: Path) -> None:
    """Raise OutputError where `place` is anything but a folder that is missing or empty."""
    if os.path.exists(place) and not os.path.isdir(place):
        raise OutputError(f"{place} is a file: give a new folder")
    if held := entries(place):
        raise OutputError(
            f"{place} exists and is not empty, it holds {some(held)}: give a new folder, or delete this one first"
        )


def new_file(place: Path) -> None:
    """Raise OutputError where something is at `place`."""
    any_file(place)
    if os.path.lexists(place):
        raise OutputError(f"{place} exists: give another name, or allow it to be replaced (force=True, --force)")


def any_file(place: Path) -> None:
    """Raise OutputError where `place` is something else than a file that could be replaced."""
    if os.path.isdir(place):
        raise OutputError(f"{place} is a folder: give the name of a file")
    if os.path.exists(place) and not os.path.isfile(place):
        raise OutputError(f"{place} is a device or a pipe: give the name of a file")


def entries(folder: Path) -> list[str]:
    """The names in a folder, in order, without what killed processes left; none where there is no folder."""
    if not os.path.isdir(folder):
        return []
    left = {path.name for path in leftovers(folder)}
    return sorted(name for name in os.listdir(folder) if name not in left)


@contextmanager
def claimed(out: str | os.PathLike[str], inputs: Inputs, check: Check = new_folder) -> Iterator[Path]:
    """The real path of `out`, checked, and locked for the block.

    inputs: what the result is made from, {what it is: its file or folder}; check: what may be there already.
    Raises OutputError where the rule of this module forbids the place, or it cannot be written.
    """
    place = Path(os.path.realpath(out))
    _spare_inputs(out, place, inputs)
    if not place.name:
        raise OutputError(f"{place} is the root of all folders: give a new one")
    with locked(place):
        check(place)
        sweep(place.parent, place.name)
        sweep(place)
        yield place


def _spare_inputs(out: str | os.PathLike[str], place: Path, inputs: Inputs) -> None:
    for what, given in inputs.items():
        for source in () if given is None else _sources(given):
            if problem := _clash(place, source, what):
                raise OutputError(f"{short(os.fspath(out))} {problem}: give another place, inputs are never written to")


def _sources(given: str | os.PathLike[str]) -> Iterator[Path]:
    """The real paths of an input: a path, several with commas, a pattern, or a name on the Hub that the cache has."""
    if os.path.exists(given):
        yield Path(os.path.realpath(given))
        return
    for name in (part.strip() for part in os.fspath(given).split(",")):
        found = glob.glob(name) if glob.has_magic(name) else [name, *cached(name)]
        yield from (Path(os.path.realpath(path)) for path in found if os.path.exists(path))


def _clash(place: Path, source: Path, what: str) -> str | None:
    """What is wrong with a result at `place`, where `source` is read."""
    if _same(place, source):
        return f"is the {what} itself"
    if any(_same(folder, source) for folder in place.parents):
        return f"lies inside the {what}"
    if any(_same(folder, place) for folder in source.parents):
        return f"holds the {what}"
    if os.path.isfile(place) and os.path.isdir(source) and _is_in(place, source):
        return f"is a file of the {what} under another name"
    return None


def _same(one: Path, other: Path) -> bool:
    """Whether two real paths are one: by the file system's word, which knows of hard links and of letters' case."""
    if one == other:
        return True
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _is_in(file: Path, folder: Path) -> bool:
    inside = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return any(_same(file, path) for path in inside)


def check_room(folder: Path, needed: int) -> None:
    """Raise OutputError where the disk under `folder` has less than `needed` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed + SPARE > free:
        raise OutputError(
            f"the result needs {(needed + SPARE) / 1e6:,.1f} MB, some to spare included, and the disk of {folder} has "
            f"{free / 1e6:,.1f} MB free: make room, or give a place on another disk"
        )
