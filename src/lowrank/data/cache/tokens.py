"""Examples on disk: lists of numbers in Arrow columns, made into Python's when a batch needs them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

from lowrank.data.cache.store import Stored
from lowrank.data.cache.table import Table
from lowrank.data.examples import IGNORED, Encoded, Example


@dataclass(frozen=True, eq=False)
class StoredExamples(Sequence[Example]):
    """The examples of a stored table."""

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

    @cached_property
    def lengths(self) -> Any:
        """(rows,) how many tokens each has, from where the lists begin: no token is read."""
        import numpy

        edges = [batch.column(0).offsets.to_numpy() for batch in self.table.batches]
        return numpy.concatenate([numpy.diff(offsets) for offsets in edges]) if edges else numpy.zeros(0, numpy.int64)


def encoded(found: Stored, reused: bool = False) -> Encoded:
    """The data set that is stored."""
    counts = found.header["counts"]
    totals = tuple(found.header["totals"])
    return Encoded(StoredExamples(Table(found.batches)), **counts, reused=reused, totals=totals)


def token_schema(whole: bool) -> Any:
    """ids and type_ids are whole numbers; labels are, unless they are numbers to predict."""
    import pyarrow

    kinds = {
        "ids": pyarrow.int32(),
        "labels": pyarrow.int32() if whole else pyarrow.float64(),
        "type_ids": pyarrow.int8(),
    }
    return pyarrow.schema([(name, pyarrow.large_list(kind)) for name, kind in kinds.items()])


def token_batch(examples: Sequence[Example], of: Any) -> Any:
    """The examples as one record batch of this schema."""
    import pyarrow

    columns = [[e.ids for e in examples], [e.labels for e in examples], [e.type_ids for e in examples]]
    arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, of, strict=True)]
    return pyarrow.record_batch(arrays, schema=of)


def totals(batch: Any) -> tuple[int, int, float, float]:
    """(tokens, labels that count, the least label, the largest) of a record batch that is not empty."""
    ids, labels = (batch.column(number).values.to_numpy() for number in (0, 1))
    return len(ids), int((labels != IGNORED).sum()), labels.min().item(), labels.max().item()


def _values(column: Any, row: int) -> list[Any] | None:
    found = column[row]
    return found.values.to_numpy(zero_copy_only=True).tolist() if found.is_valid else None
