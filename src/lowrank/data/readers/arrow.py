"""parquet and arrow (a file as Feather writes it, or a stream as `datasets` does): rows have numbers, not lines."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowrank.data.readers.record import DataFile, Record
from lowrank.errors import DataError
from lowrank.files.regular import opened

ROWS = 256  # that are made into Python's values at once


def read_parquet(path: Path, header: bool) -> DataFile:
    """The rows of a parquet file."""
    import pyarrow
    from pyarrow import parquet

    _check_regular(path)
    try:
        file = parquet.ParquetFile(path)
        return _file(path, file.schema_arrow.names, file.iter_batches(ROWS), header)
    except pyarrow.ArrowException as error:
        raise _unreadable(path, error) from None


def read_arrow(path: Path, header: bool) -> DataFile:
    """The rows of an arrow file or stream."""
    import pyarrow
    from pyarrow import ipc

    _check_regular(path)
    try:
        source = pyarrow.OSFile(str(path))
        try:
            file = ipc.open_file(source)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
            return _file(path, file.schema.names, batches, header)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            stream = ipc.open_stream(source)
            return _file(path, stream.schema.names, iter(stream), header)
    except pyarrow.ArrowException as error:
        raise _unreadable(path, error) from None


def _check_regular(path: Path) -> None:
    """Raises CheckpointError for a pipe or a device: pyarrow would wait there and hear no signal."""
    with opened(path):
        pass


def _file(path: Path, names: list[str], batches: Iterator[Any], header: bool) -> DataFile:
    if not header:
        raise DataError(f"{path}: its columns have names; --no-header is for csv and tsv")
    return DataFile(_records(path, batches), tuple(names))


def _records(path: Path, batches: Iterator[Any]) -> Iterator[Record]:
    import pyarrow

    number = 0
    try:
        for batch in batches:
            for fields in batch.to_pylist():
                number += 1
                yield Record(path, number, {name: _present(value) for name, value in fields.items()})
    except pyarrow.ArrowException as error:
        raise _unreadable(path, error) from None


def _present(value: Any) -> Any:
    """Without the nulls that a table puts where one of many messages has a key and the others have not."""
    if isinstance(value, dict):
        return {name: _present(inner) for name, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not readable as {path.suffix[1:]} ({' '.join(str(error).split()):.150})")
