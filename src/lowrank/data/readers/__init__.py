"""Files to records: one file a format, chosen by the ending. A new format is a reader and a line in READERS."""

from collections.abc import Iterator
from pathlib import Path

from lowrank.data.faults import Faults
from lowrank.data.readers.arrow import read_arrow, read_parquet
from lowrank.data.readers.json_rows import read_json, read_jsonl
from lowrank.data.readers.opening import PACKED, kind_of
from lowrank.data.readers.plain import read_plain
from lowrank.data.readers.record import Reader, Record
from lowrank.data.readers.tables import read_csv, read_tsv
from lowrank.errors import DataError

READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_plain,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
ENDINGS = f"{', '.join(READERS)}; the text forms also with {' or '.join(PACKED)}"


def is_data(path: Path) -> bool:
    """Whether the file's name says that it holds rows."""
    return kind_of(path) in READERS


def read_records(path: Path, header: bool, bad: Faults, columns: dict[str, int]) -> Iterator[Record]:
    """Every row, one at a time; sentences about lines that are no rows go into `bad`.

    columns: those that hold for all rows of the file are entered, with 0, before the first row comes.

    Raises DataError, naming the file, where it is missing, of an unknown kind, damaged as a whole or not UTF-8.
    """
    reader = READERS.get(kind_of(path))
    if reader is None:
        what = f"a {kind_of(path)!r} file" if kind_of(path) else "a file without an ending"
        raise DataError(f"{path}: how {what} holds rows is not known; give one of {ENDINGS}")
    try:
        file = reader(path, header)
        for name in file.columns or ():
            columns.setdefault(name, 0)
        for found in file.records:
            if isinstance(found, Record):
                yield found
            else:
                bad.add(found.says)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.object[error.start]:#04x} in it is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"data file {path}: {error.strerror or error}") from None
