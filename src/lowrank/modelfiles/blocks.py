"""Rows of a tensor's values, read block by block into memory that is used again."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

from lowrank.files.regular import TruncatedError, read_into
from lowrank.files.safetensors import READABLE
from lowrank.modelfiles.tensors import MadeWhole, Source, StoredEntry

CACHE_LINE = 64  # bytes; arithmetic is slower where a tensor does not begin with one


class Workspace:
    """Memory that one thread uses again for every block, by the role it has."""

    def __init__(self) -> None:
        self._memory: dict[str, bytearray] = {}
        self._last: dict[str, tuple[tuple[object, ...], Tensor, memoryview]] = {}

    def take(self, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, memoryview]:
        """A tensor of this shape, its content undefined, and its bytes; valid until the role is taken again."""
        last = self._last.get(role)
        if last is None or last[0] != (*shape, dtype):
            last = self._last[role] = ((*shape, dtype), *self._view(role, shape, dtype))
        return last[1:]

    def _view(self, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, memoryview]:
        count = prod(shape) * dtype.itemsize
        if len(self._memory.get(role, b"")) < count + CACHE_LINE:
            self._memory[role] = bytearray(count + CACHE_LINE)
        whole = torch.frombuffer(self._memory[role], dtype=torch.uint8)
        first = -whole.data_ptr() % CACHE_LINE
        memory = memoryview(self._memory[role])[first : first + count]
        return whole[first : first + count].view(dtype).view(*shape), memory


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
    form = source.entry.form if source is not None and isinstance(source.entry, StoredEntry) else None
    return form.hold() if isinstance(form, MadeWhole) else None


def read_entry_rows(
    source: Source, descriptor: int, columns: int, rows: slice, workspace: Workspace, role: str
) -> Tensor:
    """Rows (n', m) of a tensor of the base, in its own dtype."""
    if isinstance(source.entry, StoredEntry):
        return source.entry.form.rows(rows).view(rows.stop - rows.start, -1)
    dtype = READABLE[source.entry.dtype]
    block, memory = workspace.take(role, (rows.stop - rows.start, columns), dtype)
    offset = source.entry.offset + rows.start * columns * dtype.itemsize
    read_into(descriptor, memory, offset, source.shard.path)
    return block


def whole(source: Source) -> Tensor:
    """All rows of a tensor of the base, (n, m), in memory of their own. For what needs all at once."""
    return some_rows(source, slice(0, source.entry.shape[0]))


def some_rows(source: Source, rows: slice) -> Tensor:
    """Rows (n', m) of a tensor of the base, in memory of their own: a file that shrinks is an error, never a signal."""
    entry = source.entry
    with opened(source) as descriptor:
        return read_entry_rows(source, descriptor, prod(entry.shape[1:]), rows, Workspace(), "rows")


def mapped_flat(source: Source) -> Tensor:
    """The numbers of a part of a stored form, (n,), mapped from the file: a quantised model is to take no memory.

    A file that shrinks while it is used so ends the process.
    """
    entry = source.entry
    dtype = READABLE[entry.dtype]
    if not entry.nbytes:
        return torch.empty(0, dtype=dtype)
    start = entry.offset - entry.offset % mmap.ALLOCATIONGRANULARITY
    end = entry.offset + entry.nbytes
    with open(source.shard.path, "rb") as file:
        if os.fstat(file.fileno()).st_size < end:
            raise TruncatedError(source.shard.path)
        both = mmap.PROT_READ | mmap.PROT_WRITE
        pages = mmap.mmap(file.fileno(), end - start, flags=mmap.MAP_PRIVATE, prot=both, offset=start)
    flat = torch.frombuffer(pages, dtype=torch.uint8, offset=entry.offset - start, count=entry.nbytes)
    if entry.offset % dtype.itemsize:
        flat = flat.clone()  # a header of odd length puts its tensors where they cannot be read in place
    return flat.view(dtype)
