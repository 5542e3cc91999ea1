"""Which rows of a fused projection a part such as `q` owns.

A fused weight holds several projections in one matrix. GPT-2 and Phi-3 lay them one after another; BLOOM and GPT-NeoX
repeat (q, k, v) for every head. Both are a regular pattern: `count` runs of `width` rows, `stride` apart.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowBlock:
    """`count` runs of `width` output rows; run i starts at row `start + i·stride`."""

    start: int
    width: int
    stride: int = 0
    count: int = 1

    @property
    def size(self) -> int:
        """How many rows the block has in all."""
        return self.width * self.count

    def indices(self) -> Tensor:
        """The row numbers, ascending within each run: (size,)."""
        runs = torch.arange(self.count).unsqueeze(1) * self.stride + self.start
        return (runs + torch.arange(self.width)).flatten()


def row_indices(parts: tuple[RowBlock, ...], device: torch.device) -> Tensor:
    """The rows of all parts, part after part: (Σ size,)."""
    return torch.cat([part.indices() for part in parts]).to(device)
