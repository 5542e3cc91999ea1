"""What the result will hold: every tensor of it, where its values come from, and in which file it goes."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowrank.core.token_rows import TokenRows
from lowrank.files.safetensors import FLOATS, Layout, nbytes_of
from lowrank.merge.disk.adapters import Contribution
from lowrank.modelfiles.tensors import Shard, Source, StoredEntry


class Repacked(Protocol):
    """A merged weight that goes back into the base's stored form, or an expert's into the files' order of numbers."""

    def parts(self) -> dict[str, Tensor]:
        """The tensors that hold it, by role, computed anew."""
        ...

    def check(self, written: Tensor) -> float | None:
        """The share of ‖ΔW‖² that is left, unless the plan knows. Raises MergeError where a number is not right."""
        ...


@dataclass(frozen=True, slots=True)
class Recipe:
    """One tensor of the result: (replacement, else source) + Σ ΔW, rounded once to `dtype`.

    dtype: the format's word; replacement: the adapter's own full copy; contributions: what is added, in order;
    rows: single rows that adapters own, which take the place of the tensor's own before anything is added;
    repacked: what computes the packed numbers of a weight that goes back into a stored form, instead of all that.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Source | None = None
    replacement: Tensor | None = None
    contributions: tuple[Contribution, ...] = ()
    repacked: Repacked | None = None
    rows: tuple[TokenRows, ...] = ()

    @property
    def moved(self) -> bool:
        """True where the result's bytes are the base's."""
        return (
            self.source is not None
            and self.as_in_files
            and not self.contributions
            and self.repacked is None
            and self.source.entry.dtype == self.dtype
        )

    @property
    def as_in_files(self) -> bool:
        """True where what is merged into, or converted, lies in the base's file as numbers in rows."""
        return self.source is not None and self.replacement is None and not self.rows and not self.was_stored

    @property
    def was_stored(self) -> bool:
        """True where the base has the tensor in a stored form, and the result as numbers."""
        return self.source is not None and isinstance(self.source.entry, StoredEntry)

    @property
    def nbytes(self) -> int:
        """The tensor's length in the result."""
        return nbytes_of(self.dtype, self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(n, m): the shape as a matrix of stored rows; vectors are columns."""
        rows = self.shape[0] if self.shape else 1
        return rows, math.prod(self.shape[1:])

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of W0 where it comes from; a replacement is first rounded to that of the tensor it replaces."""
        if self.source is not None and self.source.entry.dtype in FLOATS:
            return FLOATS[self.source.entry.dtype]
        assert self.replacement is not None
        return self.replacement.dtype


@dataclass(frozen=True, slots=True)
class ResultFile:
    """One weight file of the result. recipes and layout.entries correspond; shard: the base's file it follows."""

    name: str
    layout: Layout
    recipes: tuple[Recipe, ...]
    shard: Shard

    @property
    def unchanged(self) -> bool:
        """True where the whole file is the base's, byte for byte."""
        return self.layout.header == self.shard.layout.header and all(recipe.moved for recipe in self.recipes)
