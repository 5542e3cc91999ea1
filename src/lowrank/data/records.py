"""Reading a data file: every row as a record that knows its file and line."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.data.tables import read_csv, read_tsv
from lowrank.errors import DataError
from lowrank.hub import local_file

ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # only an escape can bring one into a UTF-8 file
DEEPEST = 100  # brackets in brackets: beyond any data, and far below what Python's own recursion bears
TOO_DEEP = f"nested more than {DEEPEST} deep"
HALF = "holds half a character (a lone surrogate, as truncated JSON leaves it); mend or remove the row"


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
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}:{number}: not JSON ({json_fault(error)}); a jsonl file holds one JSON object a line"
                ) from None
            if not isinstance(value, dict):
                raise DataError(f"{path}:{number}: a row must be a JSON object, not {type(value).__name__}")
            if line.count("[") + line.count("{") > DEEPEST and depth(value) > DEEPEST:
                raise DataError(f"{path}:{number}: not a row ({TOO_DEEP}); mend or remove the row")
            if ESCAPED_SURROGATE.search(line) and (half := half_character(value)) is not None:
                raise DataError(f"{path}:{number}: field {half!r} {HALF}")
            yield number, value


def json_fault(error: ValueError | RecursionError) -> str:
    """What is wrong with the JSON, in words: a syntax fault, brackets nested by the thousand, a number of pages."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return TOO_DEEP if isinstance(error, RecursionError) else str(error).split(";")[0]


def depth(value: Any) -> int:
    """How deep lists and objects lie in each other, 0 for a bare value; no recursion, which thousands would break."""
    level, deep = [value], -1
    while level:
        deep += 1
        inner = [v for v in level if isinstance(v, dict | list)]
        level = [x for v in inner for x in (v.values() if isinstance(v, dict) else v)]
        if inner and not level:
            return deep + 1
    return deep


def half_character(fields: dict[str, Any]) -> str | None:
    """The first field that holds half a character, a surrogate without its other half, at any depth."""
    for name, value in fields.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return name.encode(errors="replace").decode()
    return None


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
    """All rows of a jsonl, csv or tsv file, or of one in a data set on the Hub (org/name:train.jsonl).

    Raises DataError, naming file and line, for a file that is missing, empty, of another kind or not UTF-8, and for
    lines that cannot be read.
    """
    path = local_file(path)
    if path.is_dir():
        raise DataError(f"{path}: this is a folder; give one of its files ({', '.join(READERS)})")
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
