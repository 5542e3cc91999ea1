"""Rows on disk: JSON in an Arrow column, made into rows again when they are asked for."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from lowrank.data.cache import store
from lowrank.data.cache.table import Table
from lowrank.data.rows import Conversation, Message, Row

ROWS = 2048  # in a batch


@dataclass(frozen=True, slots=True)
class StoredRows(Sequence[Row]):
    """Rows of a mapped table, or those at some of its places."""

    table: Table
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> "StoredRows": ...
    def __getitem__(self, at: int | slice) -> "Row | StoredRows":
        if isinstance(at, slice):
            return self.choose(range(len(self))[at])
        batch, row = self.table.find(self.places[at])
        return _row(batch.column("row")[row].as_py())

    def __iter__(self) -> Iterator[Row]:
        return (self[at] for at in range(len(self)))

    def choose(self, indices: Sequence[int]) -> "StoredRows":
        """The rows at these places."""
        return StoredRows(self.table, [self.places[i] for i in indices])


def load(key: str) -> tuple[Mapping[str, Any], StoredRows] | None:
    """(what was kept beside them, the rows) of a key, where they are kept."""
    found = store.get(key) if key else None
    return None if found is None else (found.header, _stored(found))


def keep(key: str, header: Mapping[str, Any], rows: Sequence[Row]) -> Sequence[Row]:
    """The rows as they are kept from now on; as they came, where they cannot be."""
    import pyarrow

    schema = pyarrow.schema([("row", pyarrow.large_string())])
    try:
        found = store.put(key, header, schema, _batches(rows, schema)) if key else None
    except ValueError:  # a value that JSON does not know: dates, bytes
        return rows
    return rows if found is None else _stored(found)


def _stored(found: store.Stored) -> StoredRows:
    table = Table(found.batches)
    return StoredRows(table, range(len(table)))


def _batches(rows: Sequence[Row], schema: Any) -> Iterator[Any]:
    """The rows as record batches. Raises ValueError for a row that JSON would not give back as it is."""
    import pyarrow

    for start in range(0, len(rows), ROWS):
        texts = [_text(row) for row in rows[start : start + ROWS]]
        yield pyarrow.record_batch([pyarrow.array(texts, pyarrow.large_string())], schema=schema)


def _text(row: Row) -> str:
    value = [row.line, row.fields, _said(row.chat), None if row.path is None else str(row.path), _said(row.rejected)]
    try:
        text = json.dumps(value)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if json.loads(text) != value:
        raise ValueError("a value that is not JSON's")
    return text


def _said(chat: Conversation | None) -> list[Any] | None:
    if chat is None:
        return None
    return [[[dict(m.fields), m.trained] for m in chat.messages], [dict(tool) for tool in chat.tools], chat.given]


def _row(text: str) -> Row:
    line, fields, chat, path, rejected = json.loads(text)
    return Row(line, fields, _heard(chat), None if path is None else Path(path), _heard(rejected))


def _heard(value: list[Any] | None) -> Conversation | None:
    if value is None:
        return None
    messages, tools, given = value
    return Conversation(tuple(Message(fields, trained) for fields, trained in messages), tuple(tools), given)
