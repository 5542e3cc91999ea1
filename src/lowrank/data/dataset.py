"""From files to rows of one kind: which shape every record has, read and checked."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowrank.data.cache.keys import chosen_key, rows_key
from lowrank.data.cache.rows import StoredRows, keep, load
from lowrank.data.cache.warned import heard, repeat
from lowrank.data.faults import BadRows, settle
from lowrank.data.readers import read_records
from lowrank.data.readers.record import Record
from lowrank.data.rows import Conversation, Kind, Preference, Row, RowError
from lowrank.data.settings import DataSettings
from lowrank.data.shapes import Fields, Shape
from lowrank.data.sniff import columns_of, flag_of, sniff
from lowrank.data.sources import TRAIN, files_of
from lowrank.errors import DataError
from lowrank.stages import stage


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rows of one kind, and where they come from: a file, or what `--data` named.

    unused: (column, rows in which it says something) of the columns that are not made into tokens; bad_rows: what is
    done with a row that turns out to be none; key: what the rows were made from (`data.cache.keys`), empty where they
    are not kept.
    """

    path: Path
    kind: Kind
    rows: Sequence[Row]
    unused: tuple[tuple[str, int], ...] = ()
    bad_rows: BadRows = "error"
    key: str = ""

    @property
    def speaks(self) -> bool:
        """Whether rows are conversations, which a chat template writes."""
        return any(row.chat is not None for row in self.rows)

    def place(self, row: Row) -> str:
        """file:line, as editors and compilers say it."""
        return f"{row.path or self.path}:{row.line}"

    def choose(self, indices: Sequence[int]) -> "Dataset":
        """The rows at these places."""
        own = self.rows
        rows = own.choose(indices) if isinstance(own, StoredRows) else [own[i] for i in indices]
        return replace(self, rows=rows, key=chosen_key(self.key, indices))

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
    if (kept := load(key)) is not None:
        header, rows = kept
        repeat(header["warned"])
        unused = tuple((name, count) for name, count in header["unused"])
        return Dataset(Path(header["path"]), header["kind"], rows, unused, settings.bad_rows, key)
    with heard() as warned:
        found = _read(source, files, settings)
    about = {"path": str(found.path), "kind": found.kind, "unused": found.unused, "warned": warned}
    return replace(found, rows=keep(key, about, found.rows), key=key)


def _read(source: str | Path, files: list[Path], settings: DataSettings) -> Dataset:
    faults: list[str] = []
    records, present = _records(files, settings, faults)
    if not records:
        settle(faults, "error", "mend the file")
        raise DataError(f"{source}: the file holds no rows")
    columns = columns_of(source, present, settings)
    shapes = sniff(records, columns, settings.kind)
    rows: list[Row] = []
    used: set[str] = set()
    for record, shape in zip(records, shapes, strict=True):
        try:
            rows.append(_row(record, shape, columns.of))
        except RowError as fault:
            faults.append(f"{record.place}: {fault}")
        used.update(columns.of[role] for role in shape.roles)
    settle(faults, settings.bad_rows, f"{_remedy(shapes)}, or leave such rows out with --bad-rows skip")
    if not rows:
        raise DataError(f"{source}: none of its {len(records):,} rows can be read")
    kind = shapes[0].kind
    if kind == "classification":
        _check_labels(records, columns.of["label"])
    return Dataset(files[0] if len(files) == 1 else Path(source), kind, rows, _unused(records, used), settings.bad_rows)


def _records(files: Iterable[Path], settings: DataSettings, faults: list[str]) -> tuple[list[Record], tuple[str, ...]]:
    """(the records of all files, the columns that they have for sure)."""
    records: list[Record] = []
    columns: dict[str, None] = {}
    for file in files:
        found, names = read_records(file, settings.header, faults)
        records += found
        columns |= dict.fromkeys(names if names is not None else (name for record in found for name in record.fields))
    return records, tuple(columns)


def _row(record: Record, shape: Shape, columns: dict[str, str]) -> Row:
    content = shape.read(Fields(record.fields, columns))
    if isinstance(content, Conversation):
        return Row(record.line, chat=content, path=record.path)
    if isinstance(content, Preference):
        return Row(record.line, chat=content.chosen, path=record.path, rejected=content.rejected)
    return Row(record.line, content, path=record.path)


def _remedy(shapes: Sequence[Shape]) -> str:
    labels = " or ".join(dict.fromkeys(shape.label for shape in shapes))
    if not labels:
        return "mend or remove the row"
    roles = dict.fromkeys(role for shape in shapes for role in shape.needed)
    flags = " and ".join(map(flag_of, roles))
    return (
        f"every row of kind {shapes[0].kind} needs {labels} (columns of other names: {flags}): mend or remove the row"
    )


def _unused(records: Sequence[Record], used: set[str]) -> tuple[tuple[str, int], ...]:
    """The columns beside those used, but for empty ones."""
    filled = Counter(
        name for record in records for name, value in record.fields.items() if value not in (None, "", [], {})
    )
    return tuple((name, count) for name, count in filled.items() if name not in used)


def _check_labels(records: Sequence[Record], column: str) -> None:
    first_of: dict[type, Record] = {}
    for record in records:
        if column in record.fields:
            first_of.setdefault(type(record.fields[column]), record)
    if len(first_of) > 1:
        places = ", ".join(f"{record.fields[column]!r} at {record.place}" for record in first_of.values())
        raise DataError(f"labels are numbers in some rows and names in others: {places}; use one of the two")


def split(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """(rows to train on, rows held out): a seeded choice of `share` of the rows, at least one, in file order.

    Raises DataError where nothing would be left to train on.
    """
    import torch

    held = max(1, round(share * len(data.rows)))
    if held >= len(data.rows):
        raise DataError(f"{data.path}: {len(data.rows)} rows are too few to hold out {share:.0%} of them")
    order = torch.randperm(len(data.rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return data.choose(sorted(order[held:])), data.choose(sorted(order[:held]))


def label_names(data: Dataset) -> tuple[str, ...]:
    """The labels that occur, whole numbers by value and names by alphabet. Raises DataError where there is only one."""
    found = {row.fields["label"] for row in data.rows}
    numbers = all(label.lstrip("-").isdecimal() for label in found)
    names = sorted(found, key=int) if numbers else sorted(found)
    if len(names) < 2:
        raise DataError(f"{data.path}: every row has the label {names[0]!r}; there is nothing to tell apart")
    return tuple(names)
