"""csv and tsv. A tsv is read as GLUE writes it: a tab always parts two fields, and a quote is an ordinary letter."""

import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from lowrank.data.readers.opening import open_text
from lowrank.data.readers.record import BadRecord, DataFile, Record
from lowrank.errors import DataError

Line = tuple[int, list[str]]


def read_csv(path: Path, header: bool) -> DataFile:
    """Every row with the line it starts at; quoted fields may span lines."""
    return _table(path, _csv_lines(path), header)


def read_tsv(path: Path, header: bool) -> DataFile:
    """Every row with its line."""
    return _table(path, _tsv_lines(path), header)


def _csv_lines(path: Path) -> Iterator[Line]:
    limit = csv.field_size_limit(sys.maxsize)
    start = 1
    try:
        with open_text(path, newline="") as file:
            reader = csv.reader(file, strict=True)
            for fields in reader:
                if fields:
                    yield start, fields
                start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{start}: not csv ({error}); is a quote left open?") from None
    finally:
        csv.field_size_limit(limit)


def _tsv_lines(path: Path) -> Iterator[Line]:
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.rstrip("\r\n").split("\t")


def _table(path: Path, lines: Iterator[Line], header: bool) -> DataFile:
    first = next(lines, None)
    if first is None:
        return DataFile(iter(()), ())
    fields = first[1]
    columns = tuple(name.strip() for name in fields) if header else tuple(str(i + 1) for i in range(len(fields)))
    _check_columns(path, columns)
    return DataFile(_records(path, lines if header else _again(first, lines), columns), columns)


def _again(first: Line, rest: Iterable[Line]) -> Iterator[Line]:
    yield first
    yield from rest


def _check_columns(path: Path, columns: tuple[str, ...]) -> None:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}:1: the header names {', '.join(map(repr, twice))} more than once; "
            "is it a header? (--no-header if not)"
        )


def _records(path: Path, lines: Iterable[Line], columns: tuple[str, ...]) -> Iterator[Record | BadRecord]:
    for number, fields in lines:
        if len(fields) == len(columns):
            yield Record(path, number, dict(zip(columns, fields, strict=True)))
        else:
            yield BadRecord(f"{path}:{number}: {len(fields)} fields, where the first line has {len(columns)}")
