"""Checking a result before it gets its name: what was moved is the base's, what was merged is W0 + Σ ΔW.

`sample` looks at rows and places chosen by the tensor's name, so that a second run looks at the same ones; `full` looks
at every byte and recomputes every row.
"""

import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from lowrank.core.merging import row_blocks, share_left
from lowrank.errors import MergeError
from lowrank.files.regular import read_into
from lowrank.files.safetensors import DTYPES, READABLE, read_layout
from lowrank.merge.disk.exact import ExactRows
from lowrank.merge.disk.recipe import Recipe, ResultFile
from lowrank.merge.disk.stack_recipes import matrices
from lowrank.merge.disk.stored_rows import read_rows
from lowrank.modelfiles.blocks import opened, read_slices
from lowrank.modelfiles.bytes import CHUNK
from lowrank.modelfiles.pool import run_tasks
from lowrank.modelfiles.workspace import Workspace

SAMPLED_ROWS = 8
SAMPLED_PLACES = 2
PLACE = 4096  # bytes


@dataclass(slots=True)
class Findings:
    """What was looked at.

    rows: merged rows recomputed; compared: bytes of untouched tensors compared; worst: the largest error in parts of
    what is allowed; surviving: {tensor: share of ‖ΔW‖² that is left after rounding}.
    """

    rows: int = 0
    compared: int = 0
    worst: float = 0.0
    surviving: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Check:
    file: ResultFile
    recipe: Recipe
    offset: int


def verify_files(
    folder: Path,
    files: Iterable[ResultFile],
    *,
    full: bool,
    threads: int,
    meanwhile: Callable[[], None] = lambda: None,
) -> Findings:
    """Check the files in `folder` against what they were made from. Raises MergeError for the first difference."""
    files = tuple(files)
    for file in files:
        written = read_layout(folder / file.name)
        if written.entries != file.layout.entries:
            raise MergeError(f"verification: {file.name} does not hold the tensors it should, the result is discarded")
    findings, lock = Findings(), threading.Lock()
    run_tasks(_checks(files), lambda: _Verifier(folder, full, findings, lock).do, threads, meanwhile)
    names = [check.recipe.name for check in _checks(files)]
    findings.surviving = {name: findings.surviving[name] for name in names if name in findings.surviving}
    return findings


def _checks(files: Iterable[ResultFile]) -> Iterator[_Check]:
    """Every tensor, of a stack that is merged every matrix."""
    for file in files:
        for recipe, entry in zip(file.recipes, file.layout.entries, strict=True):
            for matrix, start in matrices(recipe) if recipe.nbytes else ():
                yield _Check(file, matrix, entry.offset + start)


class _Verifier:
    """One thread's way to check a tensor."""

    def __init__(self, folder: Path, full: bool, findings: Findings, lock: threading.Lock) -> None:
        self._folder, self._full, self._findings, self._lock = folder, full, findings, lock
        self._workspace = Workspace()

    def do(self, check: _Check) -> None:
        """Check one tensor of the result."""
        path = self._folder / check.file.name
        with ExitStack() as stack:
            result = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, result)
            source = stack.enter_context(opened(check.recipe.source))
            if check.recipe.repacked is not None:
                self._repacked(check, result)
            elif check.recipe.moved:
                self._compare(check, source, result)
            elif check.recipe.contributions:
                self._recompute(check, source, result)
            else:
                self._convert(check, source, result)

    def _compare(self, check: _Check, source: int, result: int) -> None:
        assert check.recipe.source is not None
        start, path = check.recipe.source.entry.offset, check.recipe.source.shard.path
        compared = 0
        for offset, count in _places(check.recipe, self._full):
            _, old = self._workspace.take("old", (count,), torch.uint8)
            _, new = self._workspace.take("new", (count,), torch.uint8)
            read_into(source, old, start + offset, path)
            read_into(result, new, check.offset + offset, path)
            if old != new:
                raise MergeError(f"verification: {check.recipe.name} should be the base's own and is not")
            compared += count
        with self._lock:
            self._findings.compared += compared

    def _repacked(self, check: _Check, result: int) -> None:
        assert check.recipe.repacked is not None
        share = check.recipe.repacked.check(self._written(check, result, [slice(0, check.recipe.matrix[0])]))
        if share is not None:
            with self._lock:
                self._findings.surviving[check.recipe.name] = share

    def _convert(self, check: _Check, source: int, result: int) -> None:
        for rows in chain.from_iterable(_pieces(check.recipe, self._full)):
            stored = read_rows(check.recipe, source, rows, self._workspace)
            wanted = stored.to(DTYPES[check.recipe.dtype]).contiguous()
            if not torch.equal(wanted.view(torch.uint8), self._written(check, result, [rows]).view(torch.uint8)):
                raise MergeError(f"verification: {check.recipe.name} is not what it was converted from")

    def _recompute(self, check: _Check, source: int, result: int) -> None:
        exact_rows = ExactRows(check.recipe)
        count, worst, lost, changed = 0, 0.0, 0.0, 0.0
        for piece in _pieces(check.recipe, self._full):
            stored = self._stored(check, source, piece)
            written = self._written(check, result, piece).double()
            numbers = torch.cat([torch.arange(rows.start, rows.stop) for rows in piece])
            exact, allowed = exact_rows(stored, numbers)
            error = (written - exact).abs_()
            if not bool((error <= allowed).all()):
                wrong = int(numbers[(error <= allowed).all(1).logical_not().nonzero()[0]])
                raise MergeError(
                    f"verification: row {wrong} of {check.recipe.name} is not W0 + ΔW within one rounding; the result "
                    "is discarded"
                )
            worst = max(worst, float((error / allowed).nan_to_num_().max()))
            lost += float(error.square_().sum())
            changed += float((exact - stored).square_().sum())
            count += len(numbers)
        with self._lock:
            self._findings.rows += count
            self._findings.worst = max(self._findings.worst, worst)
            self._findings.surviving[check.recipe.name] = share_left(lost, changed)

    def _stored(self, check: _Check, source: int, piece: Sequence[slice]) -> Tensor:
        """W0's rows of the slices one after another, in float64."""
        recipe = check.recipe
        origin = recipe.source
        if origin is None or not recipe.as_in_files or piece[-1].stop > origin.entry.shape[0]:
            return _together(read_rows(recipe, source, rows, self._workspace) for rows in piece)
        place = (source, origin.entry.offset, origin.shard.path, recipe.matrix[1], READABLE[origin.entry.dtype])
        return read_slices(*place, piece, self._workspace, "stored").double()

    def _written(self, check: _Check, result: int, piece: Sequence[slice]) -> Tensor:
        """The result's rows of the slices one after another, in its dtype."""
        path, recipe = self._folder / check.file.name, check.recipe
        place = (result, check.offset, path, recipe.matrix[1], READABLE[recipe.dtype])
        return read_slices(*place, piece, self._workspace, "written")


def _together(blocks: Iterable[Tensor]) -> Tensor:
    """Rows one after another in float64, each copied before the memory of the next is the same."""
    return torch.cat([block.to(torch.float64, copy=True) for block in blocks])


def _pieces(recipe: Recipe, full: bool) -> Iterator[list[slice]]:
    """The rows to look at, in pieces to compute at once: every block of all, or the last, owned and some other rows."""
    count = recipe.matrix[0]
    if full or count <= SAMPLED_ROWS:
        yield from ([rows] for rows in row_blocks(*recipe.matrix))
        return
    chosen = random.Random(recipe.name).sample(range(count - 1), SAMPLED_ROWS - 1)
    owned = [row for rows in recipe.rows for row in rows.indices]
    yield [slice(row, row + 1) for row in sorted({*chosen, count - 1, *owned})]


def _places(recipe: Recipe, full: bool) -> Iterator[tuple[int, int]]:
    """(offset, count) of the bytes to compare: all, or the end and some others."""
    size = recipe.nbytes
    if full or size <= PLACE * SAMPLED_PLACES:
        for offset in range(0, size, CHUNK):
            yield offset, min(CHUNK, size - offset)
        return
    chosen = random.Random(recipe.name)
    for _ in range(SAMPLED_PLACES - 1):
        yield chosen.randrange(size - PLACE), PLACE
    yield size - PLACE, PLACE
