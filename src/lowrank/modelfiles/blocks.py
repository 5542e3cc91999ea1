"""Rows of a tensor's values, read block by block into memory that is used again."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lowrank.files.regular import read_into
from lowrank.files.safetensors import READABLE
from lowrank.modelfiles.tensors import MadeWhole, Source, StoredEntry
from lowrank.modelfiles.workspace import Workspace


@contextmanager
def opened(source: Source | None) -> Iterator[int]:
    """A read-only descriptor of the source's file, -1 where there is none; what is made as a whole stays that long."""
    kept = hold(source)
    descriptor = -1 if source is None else os.open(source.shard.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        del kept
        if descriptor >= 0:
            os.close(descriptor)


def hold(source: Source | None) -> object:
    """What keeps a weight that is made as a whole from being made again for its next rows; None for all others."""
    if source is None or not isinstance(source.entry, StoredEntry):
        return None
    form = source.entry.form
    return form.hold() if isinstance(form, MadeWhole) else None


def read_entry_rows(
    source: Source, descriptor: int, columns: int, rows: slice, workspace: Workspace, role: str
) -> Tensor:
    """Rows (n', m) of a tensor of the base, in its own dtype."""
    if isinstance(source.entry, StoredEntry):
        form = source.entry.form
        into = getattr(form, "rows_into", None)  # of `ReadInto`, for which isinstance takes as long as a row
        numbers: Tensor = form.rows(rows) if into is None else into(rows, workspace, role)
        return numbers.view(rows.stop - rows.start, -1)
    dtype = READABLE[source.entry.dtype]
    block, memory = workspace.take(role, (rows.stop - rows.start, columns), dtype)
    offset = source.entry.offset + rows.start * columns * dtype.itemsize
    read_into(descriptor, memory, offset, source.shard.path)
    return block


def read_slices(
    descriptor: int,
    offset: int,
    path: Path,
    columns: int,
    dtype: torch.dtype,
    slices: Sequence[slice],
    workspace: Workspace,
    role: str,
) -> Tensor:
    """Rows of some slices of a matrix that lies at `offset` in a file, one after another, (n', m), in one memory.

    A few rows of many tensors cost what is done around a row, not the row. Valid until the role is taken again.
    """
    count, row_bytes, done = sum(rows.stop - rows.start for rows in slices), columns * dtype.itemsize, 0
    numbers, memory = workspace.take(role, (count, columns), dtype)
    for rows in slices:
        until = done + (rows.stop - rows.start) * row_bytes
        read_into(descriptor, memory[done:until], offset + rows.start * row_bytes, path)
        done = until
    return numbers


def whole(source: Source) -> Tensor:
    """All rows of a tensor of the base, (n, m), in memory of their own. For what needs all at once."""
    return some_rows(source, slice(0, source.entry.shape[0]))


def some_rows(source: Source, rows: slice) -> Tensor:
    """Rows (n', m) of a tensor of the base, in memory of their own: a file that shrinks is an error, never a signal."""
    entry = source.entry
    with opened(source) as descriptor:
        return read_entry_rows(source, descriptor, prod(entry.shape[1:]), rows, Workspace(), "rows")


def flat(
    source: Source, start: int = 0, stop: int | None = None, workspace: Workspace | None = None, role: str = "flat"
) -> Tensor:
    """Numbers `start` to `stop` of a tensor as they lie in the files, (n',), all where none are given.

    What a stored form reads of its parts, some at a time: they are never mapped, and no part is kept. In new memory
    where no workspace is given.
    """
    entry, path = source.entry, source.shard.path
    dtype = READABLE[entry.dtype]
    count = (prod(entry.shape) if stop is None else stop) - start
    numbers, memory = (workspace or Workspace()).take(role, (count,), dtype)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        read_into(descriptor, memory, entry.offset + start * dtype.itemsize, path)
    finally:
        os.close(descriptor)
    return numbers


def as_bytes(source: Source) -> Source:
    """The tensor's bytes, whatever its dtype."""
    return Source(source.shard, replace(source.entry, dtype="U8", shape=(source.entry.nbytes,)))
