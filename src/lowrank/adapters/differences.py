"""Two checkpoints side by side: which tensors they share, and what one has beyond the other."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank.core.merging import row_blocks
from lowrank.errors import MergeError
from lowrank.files.safetensors import FLOATS
from lowrank.modelfiles.base import BaseFiles, Source
from lowrank.modelfiles.blocks import as_bytes, some_rows, whole
from lowrank.modelfiles.names import resolve
from lowrank.modelfiles.tensors import StoredEntry
from lowrank.modelfiles.tied import has_head, head_of, may_be_tied


@dataclass(frozen=True, slots=True)
class Difference:
    """T_tuned − T_base of one tensor, as both store it, never kept: blocks of rows are formed when they are asked for.

    It is a `core.randomised.Rows` where the tensor has two dimensions.
    """

    name: str
    base: Source
    tuned: Source

    def __str__(self) -> str:
        """The tensor's name."""
        return self.name

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m) as stored; vectors are columns."""
        shape = self.base.entry.shape or (1,)
        return shape[0], math.prod(shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """float32, or float64 where either tensor is that."""
        dtypes = [FLOATS[source.entry.dtype] for source in (self.base, self.tuned)]
        return torch.promote_types(torch.promote_types(*dtypes), torch.float32)

    def blocks(self) -> Iterator[Tensor]:
        """Rows of the difference, block by block. Raises MergeError for values that are not finite."""
        base, tuned = _as_matrix(self.base), _as_matrix(self.tuned)
        for rows in row_blocks(*self.shape):
            block = some_rows(tuned, rows).to(self.dtype) - some_rows(base, rows).to(self.dtype)
            if not block.isfinite().all():
                raise MergeError(f"{self.name} holds values that are not finite, so its change has no low rank")
            yield block

    def dense(self) -> Tensor:
        """All rows, (n, m)."""
        dense = torch.empty(self.shape, dtype=self.dtype)
        for rows, block in zip(row_blocks(*self.shape), self.blocks(), strict=True):
            dense[rows] = block
        return dense

    def norm(self) -> float:
        """‖T_tuned − T_base‖_F."""
        norms = (float(torch.linalg.vector_norm(block, dtype=torch.float64)) for block in self.blocks())
        return math.hypot(*norms)

    @property
    def comparable(self) -> bool:
        """True where both are floating-point tensors of one shape, with a value at all."""
        one, other = self.base.entry, self.tuned.entry
        return one.shape == other.shape and one.dtype in FLOATS and other.dtype in FLOATS and one.nbytes > 0

    @property
    def identical(self) -> bool:
        """True where the values are equal bit by bit."""
        one, other = self.base.entry, self.tuned.entry
        if one.shape != other.shape:
            return False
        if one.dtype != other.dtype:
            return self.comparable and not any(block.any() for block in self.blocks())
        if isinstance(one, StoredEntry) or isinstance(other, StoredEntry):
            return self.comparable and not any(block.any() for block in self.blocks())
        left, right = as_bytes(self.base), as_bytes(self.tuned)
        pieces = row_blocks(one.nbytes, 1)
        return all(torch.equal(some_rows(left, piece), some_rows(right, piece)) for piece in pieces)


def stored(source: Source) -> Tensor:
    """The whole tensor, (n, m), in memory of its own."""
    return whole(_as_matrix(source))


def _as_matrix(source: Source) -> Source:
    """The same tensor; a single number is a matrix too."""
    return Source(source.shard, replace(source.entry, shape=source.entry.shape or (1,)))


@dataclass(frozen=True, slots=True)
class Pairing:
    """shared: the tensors of both, in the base's order and under its names; alone: (name, whose) of the others."""

    shared: tuple[Difference, ...]
    alone: tuple[tuple[str, str], ...]


def pair(base: BaseFiles, tuned: BaseFiles) -> Pairing:
    """Every tensor of the base with its counterpart; leading parts of names may differ between the two.

    An output head that is stored nowhere because it is tied to the embedding stands for itself, with that table's
    values: a change of the table changes it too. Raises MergeError where no tensor has a counterpart.
    """
    ours, theirs = _sources(base), _sources(tuned)
    counterpart = _counterparts(ours, theirs)
    _complete(ours, theirs, counterpart, base)
    shared = tuple(Difference(name, ours[name], theirs[other]) for name, other in counterpart.items())
    if not shared:
        raise MergeError(
            f"{base.folder} and {tuned.folder} have no tensor in common: they are not the same kind of model"
        )
    found = set(counterpart.values())
    alone = [(name, "base") for name in ours if name not in counterpart]
    alone += [(name, "tuned") for name in theirs if name not in found]
    return Pairing(shared, tuple(alone))


def _sources(files: BaseFiles) -> dict[str, Source]:
    return {name: Source(*place) for name, place in files.tensors.items()}


def _counterparts(ours: Mapping[str, Source], theirs: Mapping[str, Source]) -> dict[str, str]:
    """{our name: their name}; where the names differ, modules are found by the structure of their paths."""
    if ours.keys() == theirs.keys():
        return {name: name for name in ours}
    own, other = ({name.rpartition(".")[0] for name in names} - {""} for names in (ours, theirs))

    def fits(one: str, another: str) -> bool:
        pairs = [(ours[name], theirs.get(another + name.removeprefix(one))) for name in ours if _owner(name) == one]
        return all(found is not None and mine.entry.shape == found.entry.shape for mine, found in pairs)

    modules = {"": ""} | resolve(sorted(own), other, fits).modules
    candidates = {name: _join(modules[_owner(name)], name) for name in ours if _owner(name) in modules}
    return {name: candidate for name, candidate in candidates.items() if candidate in theirs}


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _join(module: str, name: str) -> str:
    """The tensor of `name`'s last part in another module."""
    return f"{module}." * bool(module) + name.rpartition(".")[2]


def _complete(ours: dict[str, Source], theirs: dict[str, Source], counterpart: dict[str, str], base: BaseFiles) -> None:
    """In place: add the tied output head, where one of the two does not store it."""
    if not has_head(base.config) or not may_be_tied(base.config):
        return
    for name in list(counterpart):
        head = head_of(name.removesuffix(".weight"))
        if head is None or f"{head}.weight" in counterpart:
            continue
        other = counterpart[name]
        ours.setdefault(f"{head}.weight", ours[name])
        their_head = head_of(other.removesuffix(".weight"))
        theirs.setdefault(f"{their_head}.weight", theirs[other])
        counterpart[f"{head}.weight"] = f"{their_head}.weight"
