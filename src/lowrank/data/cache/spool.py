"""Record batches for this run alone: in memory while they are few, else in a file that goes with the process.

The file has no name as soon as it is mapped, so nothing is left of it whatever ends the process. One that is killed
while it writes leaves a hidden name, which the next one sweeps.
"""

import os
import secrets
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from lowrank.checkpoint.temporaries import delete, sweep, temporary
from lowrank.errors import OutputError

HELD = 1 << 26  # bytes that stay in memory
NAME = "lowrank-rows"


class Work(Protocol):
    """What is to be stored. schema: of the record batches; lasting: whether these alone say all, asked at the end.

    header: what is put beside them, asked after the last of them. Work that cannot be done raises a LowrankError.
    """

    @property
    def schema(self) -> Any: ...
    @property
    def lasting(self) -> bool: ...
    def batches(self) -> Iterator[Any]: ...
    def header(self) -> Mapping[str, Any]: ...


def spool(work: Work) -> list[Any]:
    """All record batches of the work. Raises OutputError where there are many and no place for them."""
    held: list[Any] = []
    size = 0
    batches = work.batches()
    for batch in batches:
        held.append(batch)
        size += batch.nbytes
        if size > HELD:
            return _in_a_file(work.schema, chain(held, batches))
    return held


def _in_a_file(schema: Any, batches: Iterator[Any]) -> list[Any]:
    folder = scratch()
    beside = temporary(folder / f"{NAME}.{secrets.token_hex(4)}")
    try:
        sweep(folder)
        with open(beside, "xb", opener=own) as file:
            write_stream(summed := Summed(file), schema, batches)
        return mapped(beside, summed.size)
    except OSError as error:
        raise OutputError(
            f"{folder}: rows are put there while they are needed, and it cannot be written "
            f"({error.strerror or error}); make room, or name another place in TMPDIR"
        ) from None
    finally:
        delete(beside)


def scratch() -> Path:
    """Where such files are: TMPDIR, else where the system has large temporary files, which /tmp may hold in memory."""
    if named := os.environ.get("TMPDIR"):
        return Path(named)
    large = Path("/var/tmp")
    return large if os.access(large, os.W_OK) else Path(tempfile.gettempdir())


def own(path: str, flags: int) -> int:
    """Opened for nobody but the user: rows may be private."""
    return os.open(path, flags, 0o600)


class Summed:
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


def write_stream(file: Summed, schema: Any, batches: Iterator[Any]) -> None:
    """Write an Arrow stream."""
    import pyarrow

    with pyarrow.ipc.new_stream(pyarrow.PythonFile(file, "w"), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def mapped(file: Path, size: int) -> list[Any]:
    """The record batches of a stream of so many bytes, mapped and not read. They stay when the file loses its name."""
    import pyarrow

    return list(pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)).read_buffer(size)))
