"""The experts of a layer, E matrices that are held in a stored form each: any of them can be read alone."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank.core.stored.base import Stored
from lowrank.core.stored.requantise import requantise


class StoredStack(Stored):
    """W0 (E, d, k), or (E, k, d) where `transposed`, as the module of experts has it; rows are experts.

    `of_expert` is how products read it: one expert's matrix, always (d, k), and no other's.
    """

    shape: torch.Size
    transposed: bool

    @abstractmethod
    def of_expert(self, expert: int) -> Stored:
        """W_e, (d, k)."""

    def requantised(self, stack: Tensor) -> "StoredStack":
        """`stack`, (E, n, m) in float32, in this form. Raises NotImplementedError for forms that are only read."""
        raise NotImplementedError(f"experts stored as {self.form} are read here, and not written")

    def rows(self, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """Some experts' matrices as the module has them, (e', n, m)."""
        whole = torch.empty(rows.stop - rows.start, *self.shape[1:], dtype=dtype or self.dtype, device=self.device)
        for place, expert in zip(whole, range(rows.start, rows.stop), strict=True):
            matrix = self.of_expert(expert).matrix(dtype)
            place.copy_(matrix.t() if self.transposed else matrix)
        return whole


@dataclass(frozen=True, eq=False)
class OneAboveAnother(Stored):
    """Matrices of one form as the row blocks of one, (Σ dᵢ, k): a gate, and an up projection under it."""

    scheme: ClassVar[str] = "row blocks"
    blocks: tuple[Stored, ...]

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """(Σ dᵢ, k)."""
        return torch.Size((sum(block.shape[0] for block in self.blocks), self.blocks[0].shape[1]))

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """That of the blocks."""
        return self.blocks[0].dtype

    @property
    def held(self) -> Tensor:
        """The first block's numbers."""
        return self.blocks[0].held

    @property
    def nbytes(self) -> int:
        """That of the blocks."""
        return sum(block.nbytes for block in self.blocks)

    def rows(self, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """W0[rows], over the blocks that they lie in."""
        found, start = [], 0
        for block in self.blocks:
            here = slice(max(rows.start - start, 0), min(rows.stop - start, block.shape[0]))
            if here.start < here.stop:
                found.append(block.matrix(dtype) if here == slice(0, block.shape[0]) else block.rows(here, dtype))
            start += block.shape[0]
        return found[0] if len(found) == 1 else torch.cat(found)


@dataclass(frozen=True, eq=False)
class HeldStack(StoredStack):
    """Experts that were quantised one by one, as Linear layers are. experts: of each its row blocks, all of one size.

    packed: the numbers of all, (E, m, n), of which every block's are a view.
    """

    scheme: ClassVar[str] = "experts"
    experts: tuple[tuple[Stored, ...], ...]
    packed: Tensor
    transposed: bool

    @staticmethod
    def of(experts: Sequence[Sequence[Stored]], transposed: bool) -> "HeldStack":
        """The stack of matrices that were quantised, [expert][row block]."""
        packed = torch.stack([torch.stack([block.held for block in blocks]) for blocks in experts]).flatten(1, -2)
        return HeldStack(tuple(map(tuple, experts)), packed, transposed).over(packed)

    def over(self, packed: Tensor) -> "HeldStack":
        """The same whose numbers are these, (E, m, n), and whose scales lie where they do."""
        experts = tuple(
            tuple(
                _over(block, numbers.view(block.held.shape))
                for block, numbers in zip(blocks, of_expert.chunk(len(blocks)), strict=True)
            )
            for blocks, of_expert in zip(self.experts, packed, strict=True)
        )
        return HeldStack(experts, packed, self.transposed)

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """(E, n, m)."""
        d, k = OneAboveAnother(self.experts[0]).shape
        return torch.Size((len(self.experts), k, d) if self.transposed else (len(self.experts), d, k))

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """That of every matrix."""
        return self.experts[0][0].dtype

    @property
    def held(self) -> Tensor:
        """The packed numbers of all."""
        return self.packed

    @property
    def form(self) -> str:
        """That of every matrix."""
        return self.experts[0][0].form

    @property
    def block(self) -> Any:
        """How many numbers share a scale, where the form has blocks."""
        return getattr(self.experts[0][0], "block", None)

    @property
    def nbytes(self) -> int:
        """Numbers and scales of all."""
        return sum(block.nbytes for blocks in self.experts for block in blocks)

    def of_expert(self, expert: int) -> Stored:
        """W_e, (d, k)."""
        blocks = self.experts[expert]
        return blocks[0] if len(blocks) == 1 else OneAboveAnother(blocks)

    def requantised(self, stack: Tensor) -> "HeldStack":
        """`stack`, (E, n, m) in float32, in the same form, matrix by matrix."""
        experts = [
            [requantise(rows.contiguous(), like) for rows, like in zip(matrix.chunk(len(held)), held, strict=True)]
            for matrix, held in zip(stack.mT if self.transposed else stack, self.experts, strict=True)
        ]
        return HeldStack.of(experts, self.transposed)


def _over(stored: Any, numbers: Tensor) -> Stored:
    """The same form over other numbers, its scales on their device."""
    own = {field.name: getattr(stored, field.name) for field in fields(stored)}
    moved = {name: _to(value, numbers.device) for name, value in own.items() if value is not stored.held}
    (place,) = (name for name, value in own.items() if value is stored.held)
    return replace(stored, **moved, **{place: numbers})  # type: ignore[no-any-return]


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if hasattr(value, "__dataclass_fields__"):  # `Nested`
        return replace(value, **{field.name: _to(getattr(value, field.name), device) for field in fields(value)})
    return value
