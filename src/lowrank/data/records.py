"""Reading a data file: every row as a record that knows its file and line."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.data.tables import read_csv, read_tsv
from lowrank.errors import DataError


@dataclass(frozen=True, slots=True)
class Record:
    """One row as the file has it: the line it starts at, and its fields by name."""

    line: int
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file's rows. columns: the names a csv or tsv gives to all its rows; None where every row has its own."""

    path: Path
    records: list[Record]
    columns: tuple[str, ...] | None = None

    def place(self, record: Record) -> str:
        """file:line, as editors and compilers say it."""
        return f"{self.path}:{record.line}"


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """One JSON object a line; empty lines are passed over."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not JSON ({error.msg} at column {error.colno}); "
                    "a jsonl file holds one JSON object a line"
                ) from None
            if not isinstance(value, dict):
                raise DataError(f"{path}:{number}: a row must be a JSON object, not {type(value).__name__}")
            yield number, value


def _jsonl(path: Path, header: bool) -> DataFile:
    if not header:
        raise DataError(f"{path}: a jsonl file has no header line to leave out; --no-header is for csv and tsv")
    return DataFile(path, [Record(line, fields) for line, fields in read_jsonl(path)])


def _csv(path: Path, header: bool) -> DataFile:
    columns, rows = read_csv(path, header)
    return DataFile(path, [Record(line, fields) for line, fields in rows], columns)


def _tsv(path: Path, header: bool) -> DataFile:
    columns, rows = read_tsv(path, header)
    return DataFile(path, [Record(line, fields) for line, fields in rows], columns)


READERS: dict[str, Callable[[Path, bool], DataFile]] = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _tsv}


def read_file(path: str | Path, header: bool = True) -> DataFile:
    """All rows of a jsonl, csv or tsv file.

    Raises DataError, naming file and line, for a file that is missing, empty, of another kind or not UTF-8, and for
    lines that cannot be read.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: what is in a {path.suffix or 'file without extension'!r} is not known; "
            f"give one of {', '.join(READERS)}"
        )
    try:
        found = reader(path, header)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.object[error.start]:#04x} in it is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"data file {path}: {error.strerror or error}") from None
    if not found.records:
        raise DataError(f"{path}: the file holds no rows")
    return found
