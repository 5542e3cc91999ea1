"""A data file as text: UTF-8 with or without a byte-order mark, packed by gzip or zstd or not at all."""

import io
from pathlib import Path
from typing import TextIO, cast

PACKED = {".gz": "gzip", ".zst": "zstd"}


def kind_of(path: Path) -> str:
    """The ending that says what is in the file, without that of its packing: ".jsonl" for rows.jsonl.zst."""
    inner = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return inner.suffix.lower()


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """The file, to be read as text. newline: as `open` takes it. Raises OSError."""
    packing = PACKED.get(path.suffix.lower())
    if packing is None:
        return path.open(encoding="utf-8-sig", newline=newline)
    import pyarrow

    packed = pyarrow.PythonFile(path.open("rb"), "r")  # pyarrow's own opening of a pipe would hear no signal
    unpacked = pyarrow.CompressedInputStream(packed, packing)
    return cast(TextIO, io.TextIOWrapper(io.BufferedReader(unpacked), encoding="utf-8-sig", newline=newline))
