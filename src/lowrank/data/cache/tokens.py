"""Examples on disk: lists of numbers in Arrow columns, made into Python's when a batch needs them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

from lowrank.data.cache import store
from lowrank.data.cache.table import Table
from lowrank.data.cache.warned import repeat
from lowrank.data.examples import Encoded, Example

ROWS = 2048  # in a batch


@dataclass(frozen=True, slots=True)
class StoredExamples(Sequence[Example]):
    """The examples of a mapped table."""

    table: Table

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        batch, row = self.table.find(at)
        ids, labels, types = (_values(column, row) for column in batch.columns)
        assert ids is not None and labels is not None
        return Example(ids, labels, types)

    def __iter__(self) -> Iterator[Example]:
        return (self[at] for at in range(len(self)))


def load(key: str) -> Encoded | None:
    """The data set that is kept under the key; its warnings are said again."""
    found = store.get(key) if key else None
    if found is None:
        return None
    repeat(found.header["warned"])
    return Encoded(StoredExamples(Table(found.batches)), **found.header["counts"], reused=True)


def keep(key: str, data: Encoded, warned: Sequence[str]) -> Encoded:
    """The data set as it is kept from now on; as it came, where it cannot be."""
    if not key:
        return data
    counts = {name: getattr(data, name) for name in ("cut", "dropped", "split", "rewritten")}
    of = _schema(data.examples)
    found = store.put(key, {"counts": counts, "warned": list(warned)}, of, _batches(data.examples, of))
    return data if found is None else replace(data, examples=StoredExamples(Table(found.batches)))


def _schema(examples: Sequence[Example]) -> Any:
    """ids and type_ids are whole numbers; labels are, unless they are numbers to predict."""
    import pyarrow

    whole = all(isinstance(label, int) for example in examples for label in example.labels)
    numbers = pyarrow.int32() if whole else pyarrow.float64()
    kinds = {"ids": pyarrow.int32(), "labels": numbers, "type_ids": pyarrow.int8()}
    return pyarrow.schema([(name, pyarrow.large_list(kind)) for name, kind in kinds.items()])


def _batches(examples: Sequence[Example], of: Any) -> Iterator[Any]:
    """The examples as record batches of this schema."""
    import pyarrow

    for start in range(0, len(examples), ROWS):
        part = examples[start : start + ROWS]
        columns = [[e.ids for e in part], [e.labels for e in part], [e.type_ids for e in part]]
        yield pyarrow.record_batch(
            [pyarrow.array(column, field.type) for column, field in zip(columns, of, strict=True)], schema=of
        )


def _values(column: Any, row: int) -> list[Any] | None:
    found = column[row]
    return found.values.to_numpy(zero_copy_only=True).tolist() if found.is_valid else None
