"""What every reader gives: rows as the file has them, and what cannot be a row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Record:
    """One row as its file has it: the line it starts at (or its number, where there are no lines), fields by name.

    begins, ends: whether a text does so with this row, which may be a part of it.
    """

    path: Path
    line: int
    fields: dict[str, Any]
    begins: bool = True
    ends: bool = True

    @property
    def place(self) -> str:
        """file:line, as editors and compilers say it."""
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A line that is no row. says: the whole sentence, place and remedy included."""

    says: str


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file's rows. columns: the names that hold for all of its rows; None where every row has its own."""

    records: Iterator[Record | BadRecord]
    columns: tuple[str, ...] | None = None


Reader = Callable[[Path, bool], DataFile]  # (path, whether a first line names the columns)
