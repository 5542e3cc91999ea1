"""From files to rows of one kind: which shape every record has, read and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowrank.data.cache.keys import chosen_key, rows_key
from lowrank.data.cache.rows import StoredRows, stored_rows
from lowrank.data.cache.store import Stored, get, keep
from lowrank.data.cache.warned import repeat
from lowrank.data.faults import BadRows
from lowrank.data.reading import Reading
from lowrank.data.rows import Kind, Row
from lowrank.data.settings import DataSettings
from lowrank.data.sources import TRAIN, files_of
from lowrank.errors import DataError, quoted
from lowrank.stages import stage


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rows of one kind, and where they come from: a file, or what `--data` named.

    unused: (column, rows in which it says something) of the columns that are not made into tokens; bad_rows: what is
    done with a row that turns out to be none; key: what the rows were made from (`data.cache.keys`), empty where they
    are not kept; names: the fields that rows have; some_speak: whether conversations are among rows that prefer.
    """

    path: Path
    kind: Kind
    rows: Sequence[Row]
    unused: tuple[tuple[str, int], ...] = ()
    bad_rows: BadRows = "error"
    key: str = ""
    names: tuple[str, ...] = ()
    some_speak: bool = False

    @property
    def speaks(self) -> bool:
        """Whether rows of the files are conversations, which a chat template writes."""
        return self.some_speak or self.kind == "chat"

    @property
    def file(self) -> Path:
        """The first file."""
        return self.rows.files[0] if isinstance(self.rows, StoredRows) else self.path

    def place(self, row: Row) -> str:
        """file:line, as editors and compilers say it."""
        return f"{row.path or self.path}:{row.line}"

    def choose(self, indices: Any) -> "Dataset":
        """The rows at these places, whole numbers in a list or an array."""
        assert isinstance(self.rows, StoredRows)
        return replace(self, rows=self.rows.choose(indices), key=chosen_key(self.key, indices))

    def spread(self, count: int | None) -> "Dataset":
        """`count` rows spread evenly over the file (sorted files keep their mixture); all where there are no more."""
        total = len(self.rows)
        if count is None or count >= total:
            return self
        return self.choose([i * total // count for i in range(count)])


def read_dataset(source: str | Path, settings: DataSettings, parts: Sequence[str] = (TRAIN,)) -> Dataset:
    """Every row of the files, checked; those that the cache has of files with this content, without reading them anew.

    parts: which part of a folder is meant, the first that there is.

    Raises DataError for columns that do not exist, rows of different kinds, and rows without the fields of their shape.
    """
    stage(f"reading {source}")
    files = files_of(source, parts)
    key = rows_key(source, files, settings) if settings.cache else ""
    if key and (kept := get(key)) is not None:
        repeat(kept.header["warned"])
        return _dataset(kept, {}, settings, key)
    found, reading = keep(key, lambda: Reading(source, files, settings))
    return _dataset(found, reading.packer.odd, settings, key if reading.lasting else "")


def _dataset(found: Stored, odd: Mapping[int, Row], settings: DataSettings, key: str) -> Dataset:
    about: Any = found.header
    rows = stored_rows(found, [Path(name) for name in about["files"]], odd)
    unused = tuple((name, count) for name, count in about["unused"])
    path, names = Path(about["path"]), tuple(about["names"])
    return Dataset(path, about["kind"], rows, unused, settings.bad_rows, key, names, about["speaks"])


def split(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """(rows to train on, rows held out): a seeded choice of `share` of the rows, at least one, in file order.

    Raises DataError where nothing would be left to train on.
    """
    import numpy
    import torch

    held = max(1, round(share * len(data.rows)))
    if held >= len(data.rows):
        raise DataError(f"{data.path}: {len(data.rows)} rows are too few to hold out {share:.0%} of them")
    order = torch.randperm(len(data.rows), generator=torch.Generator().manual_seed(seed)).numpy()
    return data.choose(numpy.sort(order[held:])), data.choose(numpy.sort(order[:held]))


def label_names(data: Dataset) -> tuple[str, ...]:
    """The labels that occur, whole numbers by value and names by alphabet. Raises DataError where there is only one."""
    found = {row.fields["label"] for row in data.rows}
    numbers = all(label.lstrip("-").isdecimal() for label in found)
    names = sorted(found, key=int) if numbers else sorted(found)
    if len(names) < 2:
        raise DataError(f"{data.path}: every row has the label {quoted(names[0])}; there is nothing to tell apart")
    return tuple(names)
