"""Rows on disk: JSON in an Arrow column, made into rows again when they are asked for."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from lowrank.data.cache.store import Stored
from lowrank.data.cache.table import Table
from lowrank.data.rows import Conversation, Message, Row

ROWS, CHARACTERS = 2048, 1 << 22  # at most in a record batch, but for the last row of it
PART_ROWS, PART_CHARACTERS = 1024, 1 << 20  # at most in a part, but for the last row of it


@dataclass(frozen=True, slots=True, eq=False)
class StoredRows(Sequence[Row]):
    """Rows of a stored table, or those at some of its places: 8 bytes of memory each, and none for all of them.

    files: where rows come from, by number; odd: the rows that JSON would not give back, by their place.
    """

    table: Table
    places: Any  # a range, or a numpy array
    files: Sequence[Path]
    odd: Mapping[int, Row]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> "StoredRows": ...
    def __getitem__(self, at: int | slice) -> "Row | StoredRows":
        if isinstance(at, slice):
            return StoredRows(self.table, self.places[at], self.files, self.odd)
        place = int(self.places[at])
        batch, row = self.table.find(place)
        text = batch.column(0)[row].as_py()
        return self.odd[place] if text is None else _row(text, self.files)

    def __iter__(self) -> Iterator[Row]:
        return (self[at] for at in range(len(self)))

    def said(self) -> Iterator[int]:
        """Of every row 64 bits that rows share which say the same, whatever their files and lines; no row is made."""
        for place in self.places:
            batch, row = self.table.find(int(place))
            text = batch.column(0)[row].as_py()
            yield hash(repr(replace(self.odd[int(place)], line=0, path=None)) if text is None else _words(text))

    def parts(self) -> list["StoredRows"]:
        """All rows in order, some at a time: few where they are long."""
        found: list[StoredRows] = []
        ends = self._sizes().cumsum()
        start, before = 0, 0
        while start < len(self):
            end = min(start + PART_ROWS, int(ends.searchsorted(before + PART_CHARACTERS)) + 1, len(self))
            found.append(self[start:end])
            start, before = end, int(ends[end - 1])
        return found

    def _sizes(self) -> Any:
        """(rows,) how many bytes each has, by where they begin: none is read."""
        import numpy

        sizes = []
        for batch in self.table.batches:
            offsets = numpy.frombuffer(batch.column(0).buffers()[1], "<i8")[: batch.num_rows + 1]
            sizes.append(numpy.diff(offsets))
        every = numpy.concatenate(sizes) if sizes else numpy.zeros(0, numpy.int64)
        own = self.places
        return every[own.start : own.stop : own.step] if isinstance(own, range) else every[own]

    def choose(self, indices: Any) -> "StoredRows":
        """The rows at these places."""
        import numpy

        own = self.places
        chosen = numpy.asarray(indices, dtype=numpy.int64)
        places = chosen * own.step + own.start if isinstance(own, range) else own[chosen]
        return StoredRows(self.table, places, self.files, self.odd)


def stored_rows(found: Stored, files: Sequence[Path], odd: Mapping[int, Row]) -> StoredRows:
    """All rows of a stored table."""
    table = Table(found.batches)
    return StoredRows(table, range(len(table)), files, odd)


def row_schema() -> Any:
    """One column, a row's JSON; null for the rows that JSON would not give back."""
    import pyarrow

    return pyarrow.schema([("row", pyarrow.large_string())])


@dataclass(slots=True)
class Packer:
    """Rows into record batches, and what is noticed on the way: count; speaks, whether any row is a conversation;
    names: the fields that rows have; odd: rows with values that JSON does not know (dates, bytes), by their place.
    """

    files: Sequence[Path]
    count: int = 0
    speaks: bool = False
    names: dict[str, None] = field(default_factory=dict)
    odd: dict[int, Row] = field(default_factory=dict)

    def batches(self, rows: Iterable[Row]) -> Iterator[Any]:
        """The rows as record batches, so many at a time."""
        import pyarrow

        schema = row_schema()
        numbers = {file: number for number, file in enumerate(self.files)}
        part: list[str | None] = []
        size = 0
        for row in rows:
            part.append(text := self._text(row, numbers))
            size += len(text or "")
            if len(part) == ROWS or size >= CHARACTERS:
                yield pyarrow.record_batch([pyarrow.array(part, schema.field(0).type)], schema=schema)
                part, size = [], 0
        if part:
            yield pyarrow.record_batch([pyarrow.array(part, schema.field(0).type)], schema=schema)

    def about(self) -> dict[str, Any]:
        """What was noticed, as JSON values."""
        return {"speaks": self.speaks, "names": list(self.names)}

    def _text(self, row: Row, numbers: Mapping[Path, int]) -> str | None:
        self.names |= dict.fromkeys(row.fields)
        self.speaks = self.speaks or row.chat is not None
        text = _text(row, None if row.path is None else numbers[row.path])
        if text is None:
            self.odd[self.count] = row
        self.count += 1
        return text


def _text(row: Row, file: int | None) -> str | None:
    """The row as JSON; None where that would not give it back as it is."""
    value = [
        dict(sorted(row.fields.items())),
        _said(row.chat),
        _said(row.rejected),
        row.begins,
        row.ends,
        row.line,
        file,
    ]
    try:
        text = json.dumps(value)
    except TypeError:
        return None
    plain = _is_plain(row.chat) and _is_plain(row.rejected)
    return text if plain or json.loads(text) == value else None


def _is_plain(chat: Conversation | None) -> bool:
    """Whether nothing but text is said, which JSON always gives back."""
    if chat is None:
        return True
    return not chat.tools and all(type(value) is str for m in chat.messages for value in m.fields.values())


def _words(text: str) -> str:
    """What a row's JSON says, without its last two values: the line, and the file."""
    return text.rsplit(", ", 2)[0]


def _said(chat: Conversation | None) -> list[Any] | None:
    if chat is None:
        return None
    return [[[dict(m.fields), m.trained] for m in chat.messages], [dict(tool) for tool in chat.tools], chat.given]


def _row(text: str, files: Sequence[Path]) -> Row:
    fields, chat, rejected, begins, ends, line, file = json.loads(text)
    path = None if file is None else files[file]
    return Row(line, fields, _heard(chat), path, _heard(rejected), begins, ends)


def _heard(value: list[Any] | None) -> Conversation | None:
    if value is None:
        return None
    messages, tools, given = value
    return Conversation(tuple(Message(fields, trained) for fields, trained in messages), tuple(tools), given)
