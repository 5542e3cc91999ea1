"""From records to rows of one kind: which fields mean what, checked on every row."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lowrank.data.records import DataFile, Record, read_file
from lowrank.data.settings import DataSettings
from lowrank.errors import DataError

Kind = Literal["text", "completion", "classification"]
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Shape:
    """The fields a row of one kind must have, and those it may have."""

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """As a message says it: prompt + completion."""
        return " + ".join(self.needed)


SHAPES: dict[Kind, Shape] = {
    "completion": Shape(("prompt", "completion")),
    "classification": Shape(("text", "label"), ("text_pair",)),
    "text": Shape(("text",)),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One checked row: the line it starts at, and its fields by meaning (prompt, completion, text, label...)."""

    line: int
    fields: dict[str, str]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rows of one kind, and the file they come from.

    unused: (column, rows in which it says something) of the columns that are not made into tokens.
    """

    path: Path
    kind: Kind
    rows: Sequence[Row]
    unused: tuple[tuple[str, int], ...] = ()

    def choose(self, indices: Sequence[int]) -> "Dataset":
        """The rows at these places."""
        return replace(self, rows=[self.rows[i] for i in indices])

    def spread(self, count: int | None) -> "Dataset":
        """`count` rows spread evenly over the file (sorted files keep their mixture); all where there are no more."""
        total = len(self.rows)
        if count is None or count >= total:
            return self
        return self.choose([i * total // count for i in range(count)])


def read_dataset(path: str | Path, settings: DataSettings) -> Dataset:
    """Every row of a file, checked.

    Raises DataError for columns that do not exist, rows of different kinds, and rows without the fields of their kind.
    """
    file = read_file(path, settings.header)
    columns = _columns(file, settings)
    kind = settings.kind or _sniff(file, columns, settings)
    shape = SHAPES[kind]
    named = {role: columns[role] for role in (*shape.needed, *shape.optional)}
    faults: list[str] = []
    rows = [_row(file, record, named, shape, faults) for record in file.records]
    _raise(faults, f"every row of kind {kind} needs {shape.label}{_flags(shape)}")
    if kind == "classification":
        _check_labels(file, columns["label"])
    return Dataset(file.path, kind, rows, _unused(file, set(named.values())))


def _unused(file: DataFile, used: set[str]) -> tuple[tuple[str, int], ...]:
    """The columns beside those used, but for empty ones."""
    filled = Counter(
        name for record in file.records for name, value in record.fields.items() if value not in (None, "", [], {})
    )
    return tuple((name, count) for name, count in filled.items() if name not in used)


def _columns(file: DataFile, settings: DataSettings) -> dict[str, str]:
    """{role: column}; a column the user named must be in the file."""
    roles = ("prompt", "completion", "text", "text_pair", "label")
    asked = {role: getattr(settings, f"{role}_column") for role in roles}
    present = file.columns or tuple(dict.fromkeys(name for record in file.records for name in record.fields))
    for role, column in asked.items():
        if column is not None and column not in present:
            raise DataError(
                f"{file.path}: there is no column {column!r} for --{role.replace('_', '-')}-column; "
                f"it has {', '.join(map(repr, present))}"
            )
    return {role: column or role for role, column in asked.items()}


def _sniff(file: DataFile, columns: dict[str, str], settings: DataSettings) -> Kind:
    """The one kind that all rows have: looked for in every row, since the first may be the exception."""
    first_of: dict[Kind, Record] = {}
    for record in file.records:
        for kind in _kinds(record, columns, settings):
            first_of.setdefault(kind, record)
    if not first_of:
        record = file.records[0]
        raise DataError(
            f"{file.place(record)}: none of prompt + completion, text + label, or text among its fields "
            f"({', '.join(map(repr, record.fields))}); say which column is which with --prompt-column and "
            "--completion-column, or --text-column and --label-column"
        )
    if len(first_of) > 1:
        places = ", ".join(f"{file.place(record)} is {SHAPES[kind].label}" for kind, record in first_of.items())
        raise DataError(f"rows of different kinds: {places}; keep one kind in a file, or choose with --kind")
    return next(iter(first_of))


def _kinds(record: Record, columns: dict[str, str], settings: DataSettings) -> Iterator[Kind]:
    """The kinds this row could be. A text with a label is no mere text, and columns the user named must be used."""

    def has(role: str) -> bool:
        return record.fields.get(columns[role]) is not None

    named = {role for role in columns if getattr(settings, f"{role}_column") is not None}
    for kind, shape in SHAPES.items():
        usable = named <= {*shape.needed, *shape.optional} and all(map(has, shape.needed))
        if usable and not (kind == "text" and has("label")):
            yield kind


def _row(file: DataFile, record: Record, named: dict[str, str], shape: Shape, faults: list[str]) -> Row:
    fields: dict[str, str] = {}
    for role, column in named.items():
        value = record.fields.get(column)
        if value is None and role in shape.optional:
            continue
        if fault := _fault(role, value):
            faults.append(f"{file.place(record)}: field {column!r} {fault}")
        else:
            fields[role] = str(value).strip() if role == "label" else str(value)
    return Row(record.line, fields)


def _fault(role: str, value: Any) -> str | None:
    if value is None:
        return "is missing"
    if role == "label":
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and not isinstance(value, str):
            return f"must be a name or a whole number, not {value!r}"
    elif not isinstance(value, str):
        return f"must be text, not {type(value).__name__} ({value!r:.40})"
    return None if str(value).strip() else "is empty"


def _flags(shape: Shape) -> str:
    flags = " and ".join(f"--{role.replace('_', '-')}-column" for role in shape.needed)
    return f" (columns of other names: {flags}): mend or remove the row"


def _raise(faults: list[str], remedy: str) -> None:
    if faults:
        more = f" and {len(faults) - SHOWN} more like these" if len(faults) > SHOWN else ""
        raise DataError("; ".join(faults[:SHOWN]) + more + f"; {remedy}")


def _check_labels(file: DataFile, column: str) -> None:
    first_of: dict[type, Record] = {}
    for record in file.records:
        first_of.setdefault(type(record.fields[column]), record)
    if len(first_of) > 1:
        places = ", ".join(f"{record.fields[column]!r} at {file.place(record)}" for record in first_of.values())
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
