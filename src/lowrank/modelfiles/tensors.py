"""Where a tensor of a base lies: in a weight file as it is, or in a form that several tensors of the files make up."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from lowrank.core.stored import Stored
from lowrank.files.safetensors import Entry, Layout
from lowrank.modelfiles.workspace import Workspace


@dataclass(frozen=True)
class Shard:
    """One weight file of the base: its name in the folder, where its bytes really lie, and its layout."""

    name: str
    path: Path
    layout: Layout


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the base."""

    shard: Shard
    entry: Entry


class Form(Protocol):
    """How a weight is held by several tensors of the files. parts: these, by the role that they have."""

    parts: dict[str, Source]

    def rows(self, rows: slice) -> Tensor:
        """Rows of the weight as a matrix of stored rows, (n', m), new memory; no more of its parts is read."""
        ...


@runtime_checkable
class ReadInto(Form, Protocol):
    """A form whose rows are read into memory that is used again."""

    def rows_into(self, rows: slice, workspace: Workspace, role: str) -> Tensor:
        """The rows that `rows` gives, valid until another block is read in this role."""
        ...


@runtime_checkable
class MadeWhole(Form, Protocol):
    """A form whose rows are there only when all are."""

    def hold(self) -> object:
        """What keeps all rows, from the first that is read, until it is let go."""
        ...


@runtime_checkable
class PackedForm(Form, Protocol):
    """A form of one matrix, into which another can be put."""

    def stored(self) -> Stored:
        """What reads the whole: new tensors, read from the files and kept by the answer alone."""
        ...

    def parts_of(self, stored: Stored) -> dict[str, Tensor]:
        """The parts of another matrix in this form that differ from one matrix to the next, as the files have them."""
        ...

    def assembled(self, parts: dict[str, Tensor]) -> Stored:
        """What reads these parts, and of the others this weight's own."""
        ...


@runtime_checkable
class PackedStack(Form, Protocol):
    """A form of all experts' matrices, each of which another can take the place of.

    transposed: whether a `Stored` of it is the transposed of the matrix that the files' tensor has.
    """

    transposed: bool

    def unstacked(self, parts: Mapping[str, Tensor]) -> Iterator[Stored]:
        """What reads each expert, one after another, from these parts, and of the others this tensor's own."""
        ...

    def stacked(self, experts: Sequence[Stored]) -> dict[str, Tensor]:
        """The parts of experts in this form, as the files have them."""
        ...


@dataclass(frozen=True, slots=True)
class StoredEntry(Entry):
    """A weight that the files hold in a form of its own: its name, shape and dtype once it is read; no bytes."""

    form: Form
