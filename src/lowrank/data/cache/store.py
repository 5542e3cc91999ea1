"""Arrow tables under a key: put in place in one step, mapped when they are there, and never believed unchecked.

A file is an Arrow stream, a header in JSON, and where the two end (sizes, and a CRC-32 of both). A file that is cut
short, or in which a bit has changed, is as good as none: what it held is made again, and replaces it.
"""

import json
import os
import secrets
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lowrank.checkpoint.temporaries import delete, sweep, temporary
from lowrank.data.cache.place import ENDING, root
from lowrank.data.cache.spool import Summed, Work, mapped, own, spool, write_stream
from lowrank.errors import LowrankWarning

TRAILER = struct.Struct("<QQI8s")  # bytes of the stream, bytes of the header, CRC-32 of both, the mark
MARK = b"lowrank1"
CHUNK = 1 << 22
_said: set[Path] = set()
Some = TypeVar("Some", bound=Work)


@dataclass(frozen=True, slots=True)
class Stored:
    """header: what was put beside the table; batches: its record batches, mapped and not read."""

    header: Mapping[str, Any]
    batches: list[Any]


def get(key: str) -> Stored | None:
    """What is stored under the key; None where nothing is, or nothing that is whole."""
    import pyarrow

    place = root() / f"{key}{ENDING}"
    try:
        with place.open("rb") as file:
            found = _header(file)
            if found is None:
                return None
            header, size = found
        return Stored(header, mapped(place, size))
    except (OSError, ValueError, pyarrow.ArrowException):
        return None


def keep(key: str, start: Callable[[], Some]) -> tuple[Stored, Some]:
    """Do work, one record batch at a time in memory, and store what it makes: (what is stored, the work).

    Under the key, where there is one, for this run and others. Where that place cannot be written or is full, which is
    said once, the work is started anew and goes where it goes without a key (`data.cache.spool`).
    """
    if key:
        work = start()
        try:
            return _put(key, work), work
        except OSError as error:
            _say(root(), error)
    work = start()
    batches = spool(work)
    return Stored(work.header(), batches), work


def _put(key: str, work: Work) -> Stored:
    folder = root()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    sweep(folder)
    beside = temporary(folder / f"{key}{ENDING}.{secrets.token_hex(4)}")  # threads may write one key at once
    try:
        with open(beside, "xb", opener=own) as file:
            header, size = _write(file, work)
        place = beside
        if work.lasting:
            place = folder / f"{key}{ENDING}"
            os.replace(beside, place)
        return Stored(header, mapped(place, size))
    finally:
        delete(beside)


def _write(file: Any, work: Work) -> tuple[Mapping[str, Any], int]:
    """(the header as it will be read, bytes of the stream)."""
    summed = Summed(file)
    write_stream(summed, work.schema, work.batches())
    size = summed.size
    text = json.dumps(work.header())
    summed.write(text.encode())
    file.write(TRAILER.pack(size, summed.size - size, summed.sum, MARK))
    return json.loads(text), size


def _header(file: Any) -> tuple[Mapping[str, Any], int] | None:
    """(header, bytes of the stream) of a file that is whole. Read in pieces: a mapped page would stay in memory."""
    whole = file.seek(0, os.SEEK_END)
    if whole < TRAILER.size:
        return None
    file.seek(whole - TRAILER.size)
    size, length, wanted, mark = TRAILER.unpack(file.read(TRAILER.size))
    if mark != MARK or size + length + TRAILER.size != whole:
        return None
    file.seek(0)
    found, left = 0, size + length
    while left:
        piece = file.read(min(CHUNK, left))
        found, left = zlib.crc32(piece, found), left - len(piece)
    if found != wanted:
        return None
    file.seek(size)
    return json.loads(file.read(length)), size


def _say(folder: Path, error: OSError) -> None:
    if folder not in _said:
        _said.add(folder)
        warnings.warn(
            f"rows and tokens are not kept for another run: {folder} cannot be written ({error.strerror or error}); "
            "name another place in LOWRANK_CACHE, or say --no-cache",
            LowrankWarning,
            stacklevel=3,
        )
