"""Writing the result's weights: reading, arithmetic and writing overlap, and the disk starts while they run."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowrank.core.merging import Change, merge_block, row_blocks
from lowrank.files.safetensors import READABLE
from lowrank.merge.disk.changes import check_finite, compute_dtype, make_changes
from lowrank.merge.disk.recipe import Recipe, ResultFile
from lowrank.merge.disk.stack_recipes import matrices
from lowrank.merge.disk.stored_rows import read_rows
from lowrank.modelfiles.blocks import hold, opened
from lowrank.modelfiles.bytes import clone, move, write_from
from lowrank.modelfiles.pool import run_tasks
from lowrank.modelfiles.workspace import Workspace

BLOCKS_AT_ONCE = 16  # a task's row blocks: enough to be worth a hand-over, few enough to share out a large tensor
MOVE_AT_ONCE = 2**23  # bytes: a few milliseconds, since whoever has a block to write meanwhile must wait
SYNC_AFTER = 2**26  # bytes


class Changes:
    """The changes of one tensor, made when its first rows are merged and shared by the threads that merge others."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._lock = recipe, threading.Lock()
        self._made: tuple[Change, ...] | None = None
        self._packed: Tensor | None = None
        self._kept: object = None

    def packed(self, recipe: Recipe) -> Tensor:
        """The packed numbers of a weight that goes back into a stored form, made once for all of its rows."""
        with self._lock:
            if self._packed is None:
                assert recipe.repacked is not None
                self._packed = recipe.repacked.parts()["weight"].reshape(recipe.matrix)
            return self._packed

    def get(self) -> tuple[Change, ...]:
        """One Change per contribution, in order."""
        with self._lock:
            if self._made is None:
                self._kept = hold(self._recipe.source)
                self._made = make_changes(self._recipe)
            return self._made


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes of the base's file that go into the result's as they are."""

    file: ResultFile
    start: int
    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Blocks of rows of one tensor, or of one matrix of a stack, to compute and write."""

    file: ResultFile
    recipe: Recipe
    offset: int
    changes: Changes
    blocks: tuple[slice, ...]


def write_files(
    folder: Path, files: Iterable[ResultFile], threads: int, advance: Callable[[int], None] = lambda _: None
) -> None:
    """Write every file into `folder`: headers first, then the tensors in the order of the files.

    advance: called from any thread with the number of bytes that were written. When this returns, everything is written
    but not yet synced. Raises MergeError for values that are not finite.
    """
    files = tuple(files)
    for file in files:
        with open(folder / file.name, "xb") as new:
            new.write(file.layout.header)
            new.truncate(file.layout.size)
    syncer = Syncer(folder, files)
    turns = {file.name: threading.Lock() for file in files}

    def written(file: ResultFile, count: int) -> None:
        syncer.count(file, count)
        advance(count)

    run_tasks(_tasks(files), lambda: _Writer(folder, turns, written).do, threads, syncer.step)


def _tasks(files: Iterable[ResultFile]) -> Iterator[Move | Rows]:
    """File after file; within one, moving and merging keep step, so that the disk and the cores are busy together."""
    for file in files:
        waiting = deque(_in_step(list(_moves(file)), list(_merges(file))))
        while waiting:
            yield waiting.popleft()  # and forget it: with a tensor's last task its factors are to go


def _in_step(moves: list[Move], merges: list[Rows]) -> list[Move | Rows]:
    """Both in their order, each spread evenly over the whole."""
    kinds: tuple[Sequence[Move | Rows], ...] = (moves, merges)
    both = [(i / len(tasks), task) for tasks in kinds for i, task in enumerate(tasks)]
    return [task for _, task in sorted(both, key=lambda pair: pair[0])]


def _merges(file: ResultFile) -> Iterator[Rows]:
    for recipe, entry in zip(file.recipes, file.layout.entries, strict=True):
        for matrix, start in () if recipe.moved or not recipe.nbytes else matrices(recipe):
            changes, blocks = Changes(matrix), tuple(row_blocks(*matrix.matrix))
            for first in range(0, len(blocks), BLOCKS_AT_ONCE):
                yield Rows(file, matrix, entry.offset + start, changes, blocks[first : first + BLOCKS_AT_ONCE])


def _moves(file: ResultFile) -> Iterator[Move]:
    """What is taken over, neighbours together."""
    runs: list[Move] = []
    for recipe, entry in zip(file.recipes, file.layout.entries, strict=True):
        if recipe.moved and recipe.source is not None:
            start, count = recipe.source.entry.offset, recipe.nbytes
            last = runs[-1] if runs else Move(file, 0, 0, 0)
            if last.start + last.count == start and last.offset + last.count == entry.offset:
                runs[-1] = Move(file, last.start, last.offset, last.count + count)
            else:
                runs.append(Move(file, start, entry.offset, count))
    for run in runs:
        yield from _in_pieces(run)


def _in_pieces(run: Move) -> Iterator[Move]:
    """Pieces that end on multiples of their size in the result: page cache that is filled so costs a third less."""
    done = 0
    while done < run.count:
        count = min(MOVE_AT_ONCE - (run.offset + done) % MOVE_AT_ONCE, run.count - done)
        yield Move(run.file, run.start + done, run.offset + done, count)
        done += count


class _Writer:
    """One thread's way to carry out tasks.

    turns: {file: lock}. The kernel lets one thread at a time write to a file, and the others wait for it on a core that
    spins; waiting here instead leaves the core to those who compute.
    """

    def __init__(
        self, folder: Path, turns: dict[str, threading.Lock], written: Callable[[ResultFile, int], None]
    ) -> None:
        self._folder, self._turns, self._written, self._workspace = folder, turns, written, Workspace()

    def do(self, task: Move | Rows) -> None:
        """Carry out one task."""
        result = os.open(self._folder / task.file.name, os.O_RDWR | os.O_CLOEXEC)
        try:
            if isinstance(task, Move):
                self._move(task, result)
            else:
                self._merge(task, result)
        finally:
            os.close(result)

    def _move(self, task: Move, result: int) -> None:
        path = task.file.shard.path
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with self._turns[task.file.name]:
                move(source, task.start, result, task.offset, task.count, path)
        finally:
            os.close(source)
        self._written(task.file, task.count)

    def _merge(self, task: Rows, result: int) -> None:
        recipe = task.recipe
        changes = task.changes.get() if recipe.repacked is None else ()
        row_bytes = recipe.matrix[1] * READABLE[recipe.dtype].itemsize
        with opened(recipe.source) as source:
            for rows in task.blocks:
                if recipe.repacked is None:
                    stored = read_rows(recipe, source, rows, self._workspace)
                else:
                    stored = task.changes.packed(recipe)[rows]
                rounded, memory = self._round(recipe, stored, changes, rows)
                check_finite(recipe, stored, rounded)
                with self._turns[task.file.name]:
                    write_from(result, memory, task.offset + rows.start * row_bytes)
                self._written(task.file, len(memory))

    def _round(
        self, recipe: Recipe, stored: Tensor, changes: tuple[Change, ...], rows: slice
    ) -> tuple[Tensor, memoryview]:
        rounded, memory = self._workspace.take("rounded", tuple(stored.shape), READABLE[recipe.dtype])
        if changes:
            dtype = compute_dtype(recipe)
            wide, _ = self._workspace.take("wide", tuple(stored.shape), torch.promote_types(torch.float32, dtype))
            stored = merge_block(stored.to(dtype), changes, rows, wide)
        return rounded.copy_(stored), memory


class Syncer:
    """Sends what is written on its way to the disk while more is computed, so that the last sync has little to do."""

    def __init__(self, folder: Path, files: tuple[ResultFile, ...]) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._dirty = dict.fromkeys((file.name for file in files), 0)

    def count(self, file: ResultFile, count: int) -> None:
        """Remember that `count` bytes were written; from any thread."""
        with self._lock:
            self._dirty[file.name] += count

    def step(self) -> None:
        """Sync the file with most to sync, where that is worth it."""
        name = max(self._dirty, key=self._dirty.__getitem__, default=None)
        if name is None or self._dirty[name] < SYNC_AFTER:
            return
        with self._lock:
            self._dirty[name] = 0
        sync_data(self._folder / name)


def sync_data(path: Path) -> None:
    """Make a file's content durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        getattr(os, "fdatasync", os.fsync)(descriptor)
    finally:
        os.close(descriptor)


def link_or_clone(source: Path, result: Path, how: str) -> bool:
    """Give the result an untouched file without copying it; False where the file system cannot."""
    if how == "reflink":
        return clone(source, result)
    try:
        os.link(source, result)
    except OSError:
        return False
    return True
