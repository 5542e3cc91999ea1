"""Plain text: a file is one long row, or several where it is longer than is good to hold at once."""

import re
from collections.abc import Iterator
from pathlib import Path

from lowrank.data.readers.opening import open_text
from lowrank.data.readers.record import DataFile, Record
from lowrank.errors import DataError

PART = 1 << 21  # characters of a part, and at most twice as many
BORDERS = (re.compile(r"\n(?=\S)"), re.compile(r"(?<=\S)(?=\s)"))  # the end of a line, else of a word


def read_plain(path: Path, header: bool) -> DataFile:
    """The file as the text of one row, or of its parts as rows, each ending with a line; none where it is blank."""
    if not header:
        raise DataError(f"{path}: a text file has no header line to leave out; --no-header is for csv and tsv")
    return DataFile(_parts(path), ("text",))


def _parts(path: Path) -> Iterator[Record]:
    """In memory is a part, and what was read of the next one."""
    with open_text(path) as file:
        text, line, first = file.read(PART), 1, True
        while text:
            more = file.read(PART)
            if more and not more.strip():
                text += more  # blanks end a part, and are none
                continue
            end = _border(text) if more else len(text)
            part, text = text[:end], text[end:] + more
            if part.strip():
                yield Record(path, line, {"text": part}, first, not more)
                first = False
            line += part.count("\n")


def _border(text: str) -> int:
    """Where the last line of the second half ends, else its last word; the end of a text without either."""
    found = ([match.end() for match in border.finditer(text, len(text) // 2)] for border in BORDERS)
    return next((ends[-1] for ends in found if ends), len(text))
