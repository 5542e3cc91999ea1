"""csv and tsv. A tsv is read as GLUE writes it: a tab always parts two fields, and a quote is an ordinary letter."""

import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from lowrank.errors import DataError

Row = tuple[int, dict[str, str]]


def read_csv(path: Path, header: bool) -> tuple[tuple[str, ...], list[Row]]:
    """The columns, and every row with the line it starts at; quoted fields may span lines."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _table(path, _csv_lines(path, file), header)
    finally:
        csv.field_size_limit(limit)


def _csv_lines(path: Path, file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(file, strict=True)
    start = 1
    try:
        for fields in reader:
            if fields:
                yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{start}: not csv ({error}); is a quote left open?") from None


def read_tsv(path: Path, header: bool) -> tuple[tuple[str, ...], list[Row]]:
    """The columns, and every row with its line."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        lines = ((number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(file, 1) if line.strip())
        return _table(path, lines, header)


def _table(path: Path, lines: Iterator[tuple[int, list[str]]], header: bool) -> tuple[tuple[str, ...], list[Row]]:
    first = next(lines, None)
    if first is None:
        return (), []
    number, fields = first
    columns = tuple(name.strip() for name in fields) if header else tuple(str(i + 1) for i in range(len(fields)))
    _check_columns(path, columns)
    rows = [] if header else [_row(path, number, fields, columns)]
    rows += [_row(path, number, fields, columns) for number, fields in lines]
    return columns, rows


def _check_columns(path: Path, columns: tuple[str, ...]) -> None:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}:1: the header names {', '.join(map(repr, twice))} more than once; "
            "is it a header? (--no-header if not)"
        )


def _row(path: Path, number: int, fields: list[str], columns: tuple[str, ...]) -> Row:
    if len(fields) != len(columns):
        raise DataError(f"{path}:{number}: {len(fields)} fields, where the first line has {len(columns)}")
    return number, dict(zip(columns, fields, strict=True))
