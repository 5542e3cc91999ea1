"""Files to rows in one pass: every record is looked at as it comes, and none of them is kept in memory."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.data.cache.rows import Packer, row_schema
from lowrank.data.cache.warned import heard
from lowrank.data.faults import SHOWN, Faults, settle
from lowrank.data.readers import read_records
from lowrank.data.readers.record import Record
from lowrank.data.rows import Conversation, Kind, Preference, Row, RowError
from lowrank.data.settings import DataSettings
from lowrank.data.shapes import Fields, Shape
from lowrank.data.sniff import Sniffer, check_columns, columns_of, flag_of, refuse_unknown
from lowrank.errors import DataError, quoted
from lowrank.stages import stage

EMPTY: tuple[Any, ...] = (None, "", [], {})


class Reading:
    """One pass over the files, as work for the cache: record batches of rows, then what is true of all of them."""

    def __init__(self, source: str | Path, files: Sequence[Path], settings: DataSettings) -> None:
        self.source, self.files, self.settings = source, files, settings
        self.columns = columns_of(settings)
        self.sniffer = Sniffer(self.columns, settings.kind)
        self.packer = Packer(files)
        self.faults = Faults()
        self.seen = 0
        self._shapes: dict[tuple[str, tuple[str, ...]], Shape] = {}  # those met, by what they need and may have
        self._filled: dict[str, int] = {}  # rows in which a column says something
        self._shapeless: list[Record] = []  # the first ones, before any record had a shape
        self._labels: dict[type, tuple[Any, str]] = {}  # the first label of each type, and its place

    @property
    def schema(self) -> Any:
        """Of the record batches."""
        return row_schema()

    @property
    def lasting(self) -> bool:
        """Whether what was written holds all rows: the others are in this process's memory."""
        return not self.packer.odd

    def batches(self) -> Iterator[Any]:
        """Every row that can be read."""
        return self.packer.batches(self._rows())

    def header(self) -> Mapping[str, Any]:
        """What is true of the rows, when all are read. Raises DataError for what is wrong with them."""
        with heard() as warned:
            kind = self._settled()
        file = self.files[0] if len(self.files) == 1 else Path(self.source)
        about = {"path": str(file), "files": [str(file) for file in self.files], "kind": kind}
        return {**about, "unused": self._unused(), **self.packer.about(), "warned": warned}

    def _rows(self) -> Iterator[Row]:
        for record in self._records():
            shape = self.sniffer.shape(record)
            if shape is None:
                self._set_aside(record)
                continue
            self._shapes.setdefault((shape.label, shape.optional), shape)
            try:
                yield _row(record, shape, self.columns.among(record.fields))
            except RowError as fault:
                self.faults.add(f"{record.place}: {fault}")

    def _records(self) -> Iterator[Record]:
        filled, label = self._filled, self.columns.of["label"]
        for file in self.files:
            for record in read_records(file, self.settings.header, self.faults, filled):
                fields = record.fields
                for name, value in fields.items():
                    if name not in filled:
                        filled[name] = 0
                    if value not in EMPTY:
                        filled[name] += 1
                if label in fields and type(fields[label]) not in self._labels:
                    self._labels[type(fields[label])] = (fields[label], record.place)
                self.seen += 1
                if self.seen % 10_000 == 0:
                    stage(f"reading {self.source}", self.seen)
                yield record

    def _set_aside(self, record: Record) -> None:
        """A record of no shape before any had one: what it lacks is said when the others have shown what was meant."""
        if len(self._shapeless) < SHOWN:
            self._shapeless.append(record)
        else:
            self.faults.count += 1

    def _settled(self) -> Kind:
        if not self.seen:
            settle(self.faults, "error", "mend the file")
            raise DataError(f"{self.source}: the file holds no rows")
        check_columns(self.source, self.columns, self._filled)
        kind = self.sniffer.settled()
        if kind is None:
            refuse_unknown(self._shapeless[0].place, self._shapeless[0].fields)
        assert kind is not None and self.sniffer.usual is not None
        self._say_what_lacks(self.sniffer.usual)
        remedy = f"{self._remedy(kind)}, or leave such rows out with --bad-rows skip"
        settle(self.faults, self.settings.bad_rows, remedy)
        if not self.packer.count:
            raise DataError(f"{self.source}: none of its {self.seen:,} rows can be read")
        if kind == "classification":
            self._check_labels()
        return kind

    def _say_what_lacks(self, usual: Shape) -> None:
        said = [
            f"{record.place}: {_lack(record, usual, self.columns.among(record.fields))}" for record in self._shapeless
        ]
        self.faults.shown[:] = [*said, *self.faults.shown][:SHOWN]
        self.faults.count += len(said)
        if said:
            self._shapes = {(usual.label, usual.optional): usual, **self._shapes}

    def _remedy(self, kind: Kind) -> str:
        if not self._shapes:
            return "mend or remove the row"
        roles = dict.fromkeys(role for shape in self._shapes.values() for role in shape.needed)
        flags = " and ".join(map(flag_of, roles))
        labels = " or ".join(dict.fromkeys(shape.label for shape in self._shapes.values()))
        return f"every row of kind {kind} needs {labels} (columns of other names: {flags}): mend or remove the row"

    def _unused(self) -> list[tuple[str, int]]:
        """The columns beside those used, but for empty ones."""
        columns = self.columns.among(self._filled)
        used = {columns[role] for shape in self._shapes.values() for role in shape.roles}
        return [(name, count) for name, count in self._filled.items() if count and name not in used]

    def _check_labels(self) -> None:
        if len(self._labels) > 1:
            places = ", ".join(f"{quoted(value)} at {place}" for value, place in self._labels.values())
            raise DataError(f"labels are numbers in some rows and names in others: {places}; use one of the two")


def _row(record: Record, shape: Shape, columns: dict[str, str]) -> Row:
    content = shape.read(Fields(record.fields, columns))
    if isinstance(content, Conversation):
        return Row(record.line, chat=content, path=record.path)
    if isinstance(content, Preference):
        return Row(record.line, chat=content.chosen, path=record.path, rejected=content.rejected)
    return Row(record.line, content, path=record.path, begins=record.begins, ends=record.ends)


def _lack(record: Record, shape: Shape, columns: dict[str, str]) -> str:
    try:
        _row(record, shape, columns)
    except RowError as fault:
        return str(fault)
    return f"it is not {shape.label}"
