"""Which rows of a fused projection a part such as `q` owns.

A fused weight holds several projections in one matrix. GPT-2 and Phi-3 lay them one after another; BLOOM and GPT-NeoX
repeat (q, k, v) for every head. Both are a regular pattern: `count` runs of `width` rows, `stride` apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowBlock:
    """`count` runs of `width` output rows; run i starts at row `start + i·stride`.

    Raises ValueError for numbers that mean no rows, or the same row twice.
    """

    start: int
    width: int
    stride: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """The numbers may come from a file."""
        if self.start < 0 or self.width < 1 or self.count < 1 or (self.count > 1 and self.stride < self.width):
            raise ValueError(f"{self} means no rows of a matrix")

    @property
    def size(self) -> int:
        """How many rows the block has in all."""
        return self.width * self.count

    @property
    def end(self) -> int:
        """One more than the last row."""
        return self.start + (self.count - 1) * self.stride + self.width

    def indices(self) -> Tensor:
        """The row numbers, ascending within each run: (size,)."""
        stride = self.stride if self.count > 1 else 0  # that of a single run says nothing, and nothing has checked it
        runs = torch.arange(self.count).unsqueeze(1) * stride + self.start
        return (runs + torch.arange(self.width)).flatten()


def row_indices(parts: tuple[RowBlock, ...], device: torch.device) -> Tensor:
    """The rows of all parts, part after part: (Σ size,)."""
    return torch.cat([part.indices() for part in parts]).to(device)


def are_disjoint(parts: Sequence[RowBlock], rows: int) -> bool:
    """True where the parts are different rows of a matrix that has `rows`; allocates for no more than these."""
    if not parts or max(part.end for part in parts) > rows or sum(part.size for part in parts) > rows:
        return False
    taken = torch.zeros(rows, dtype=torch.bool)
    for part in parts:
        indices = part.indices()
        if taken[indices].any():
            return False
        taken[indices] = True
    return True
