"""Plain text: a file is one long row."""

from pathlib import Path

from lowrank.data.readers.opening import open_text
from lowrank.data.readers.record import DataFile, Record
from lowrank.errors import DataError


def read_plain(path: Path, header: bool) -> DataFile:
    """The whole file as the text of one row; none where it is blank."""
    if not header:
        raise DataError(f"{path}: a text file has no header line to leave out; --no-header is for csv and tsv")
    with open_text(path) as file:
        text = file.read()
    return DataFile(iter([Record(path, 1, {"text": text})] if text.strip() else []), ("text",))
