"""JSON: one object a line (jsonl), or objects one after the other, in an array or bare (json)."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowrank.data.readers.opening import open_text
from lowrank.data.readers.record import BadRecord, DataFile, Record
from lowrank.data.readers.window import Window
from lowrank.errors import DataError, quoted

ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # only an escape can bring one into a UTF-8 file
DEEPEST = 100  # brackets in brackets: beyond any data, and far below what Python's own recursion bears
TOO_DEEP = f"nested more than {DEEPEST} deep"


def read_jsonl(path: Path, header: bool) -> DataFile:
    """One JSON object a line; empty lines are passed over."""
    _no_header(path, header)
    return DataFile(_lines(path))


def read_json(path: Path, header: bool) -> DataFile:
    """One array of objects, or objects one after the other; each row knows the line that it starts at."""
    _no_header(path, header)
    return DataFile(_objects(path))


def _no_header(path: Path, header: bool) -> None:
    if not header:
        raise DataError(f"{path}: a {path.suffix} file has no header line to leave out; --no-header is for csv and tsv")


def _lines(path: Path) -> Iterator[Record | BadRecord]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                says = f"not JSON ({_reason(error)}); a jsonl file holds one JSON object a line"
                yield BadRecord(f"{path}:{number}: {says}")
                continue
            yield _checked(path, number, value, line)


def _objects(path: Path) -> Iterator[Record | BadRecord]:
    """The rows, read as they are asked for: in memory is a piece of the file, or one row where that is longer."""
    with open_text(path) as file:
        window = Window(file)
        array = window.skip() and window.text[window.at] == "["
        window.at += array
        while window.skip() and not (array and window.text[window.at] == "]"):
            line = window.line
            try:
                value, text = window.value()
            except (ValueError, RecursionError) as error:
                where = line + error.lineno - 1 if isinstance(error, json.JSONDecodeError) else line
                raise DataError(
                    f"{path}:{where}: not JSON ({_reason(error)}); a json file holds one array of rows"
                ) from None
            yield _checked(path, line, value, text)
        if array and window.at == len(window.text):
            raise DataError(f"{path}:{window.line}: not JSON (the array is not closed); was the file cut short?")


def _checked(path: Path, line: int, value: Any, text: str) -> Record | BadRecord:
    if not isinstance(value, dict):
        return BadRecord(f"{path}:{line}: a row must be a JSON object, not {type(value).__name__}")
    if text.count("[") + text.count("{") > DEEPEST and depth(value) > DEEPEST:
        return BadRecord(f"{path}:{line}: not a row ({TOO_DEEP})")
    if ESCAPED_SURROGATE.search(text) and (field := half_character(value)) is not None:
        return BadRecord(
            f"{path}:{line}: field {quoted(field)} holds half a character (a lone surrogate, of truncated JSON)"
        )
    return Record(path, line, value)


def _reason(error: ValueError | RecursionError) -> str:
    """A fault of syntax, brackets nested by the thousand, or a number that fills pages."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return TOO_DEEP if isinstance(error, RecursionError) else str(error).split(";")[0]


def depth(value: Any) -> int:
    """How deep lists and objects lie in each other, 0 for a bare value. No recursion: thousands would break it."""
    level, deep = [value], 0
    while inner := [v for v in level if isinstance(v, dict | list)]:
        level = [x for v in inner for x in (v.values() if isinstance(v, dict) else v)]
        deep += 1
    return deep


def half_character(fields: dict[str, Any]) -> str | None:
    """The first field that holds half a character, a surrogate without its other half, at any depth."""
    for name, value in fields.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return name.encode(errors="replace").decode()
    return None
