"""MXFP4 (OCP microscaling): blocks of 32 FP4 numbers that share a power of two, as gpt-oss stores its experts."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank.core.stored.base import Stored

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BIAS = 127
LARGEST_POWER = 2  # of a number of the code: 6 is 1.5·2²


@dataclass(frozen=True, eq=False)
class Mxfp4(Stored):
    """blocks: uint8 (d, k/32, 16), the first number of a byte in its low half; scales: uint8 (d, k/32), 2^(s − 127)."""

    scheme: ClassVar[str] = "MXFP4"
    blocks: Tensor
    scales: Tensor
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """(d, k)."""
        d, groups, width = self.blocks.shape
        return torch.Size((d, groups * width * 2))

    @property
    def held(self) -> Tensor:
        """The packed numbers."""
        return self.blocks

    def rows(self, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """W0[rows]: exact in bfloat16 wherever 2^(s − 127) is."""
        bytes_ = self.blocks[rows].int()
        code = torch.tensor(E2M1, device=bytes_.device)
        numbers = torch.stack([code[bytes_ & 15], code[bytes_ >> 4]], dim=-1).flatten(2)  # (n', k/32, 32)
        values = torch.ldexp(numbers, (self.scales[rows].int() - BIAS).unsqueeze(-1))
        return values.flatten(1).to(self.dtype).to(dtype or self.dtype)
