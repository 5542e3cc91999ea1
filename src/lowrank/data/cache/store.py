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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.checkpoint.temporaries import delete, sweep, temporary
from lowrank.data.cache.place import ENDING, root
from lowrank.errors import LowrankWarning

TRAILER = struct.Struct("<QQI8s")  # bytes of the stream, bytes of the header, CRC-32 of both, the mark
MARK = b"lowrank1"
CHUNK = 1 << 22
_said: set[Path] = set()


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
        mapped = pyarrow.memory_map(str(place)).read_buffer(size)
        return Stored(header, list(pyarrow.ipc.open_stream(mapped)))
    except (OSError, ValueError, pyarrow.ArrowException):
        return None


def put(key: str, header: Mapping[str, Any], schema: Any, batches: Iterator[Any]) -> Stored | None:
    """Store record batches, one at a time in memory. None, said once, where the place cannot be written."""
    folder = root()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        sweep(folder)
        beside = temporary(folder / f"{key}{ENDING}.{secrets.token_hex(4)}")  # threads may write one key at once
        try:
            with open(beside, "xb", opener=_own) as file:
                _write(file, header, schema, batches)
            os.replace(beside, folder / f"{key}{ENDING}")
        except BaseException:
            delete(beside)
            raise
    except OSError as error:
        _say(folder, error)
        return None
    return get(key)


def _own(path: str, flags: int) -> int:
    """Opened for nobody but the user: rows may be private."""
    return os.open(path, flags, 0o600)


class _Summed:
    """A file that knows what went through it. pyarrow writes to it as to any file."""

    closed = False

    def __init__(self, file: Any) -> None:
        self.file, self.size, self.sum = file, 0, 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.sum = zlib.crc32(view, self.sum)
        self.size += view.nbytes
        self.file.write(view)
        return view.nbytes

    def flush(self) -> None:
        """At the end, with the file."""

    def close(self) -> None:
        """The file goes on."""


def _write(file: Any, header: Mapping[str, Any], schema: Any, batches: Iterator[Any]) -> None:
    import pyarrow

    summed = _Summed(file)
    with pyarrow.ipc.new_stream(pyarrow.PythonFile(summed, "w"), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    size = summed.size
    summed.write(json.dumps(header).encode())
    file.write(TRAILER.pack(size, summed.size - size, summed.sum, MARK))


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
            f"rows and tokens are not kept on disk: {folder} cannot be written ({error.strerror or error}); name "
            "another place in LOWRANK_CACHE, or say --no-cache",
            LowrankWarning,
            stacklevel=3,
        )
