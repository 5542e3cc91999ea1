"""Small numbers times scales: int8 rows, int8 and FP8 with a scale for a tensor, a channel, a group or a block."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank.core.stored.base import Stored

PER_127 = 7.874015718698502e-3  # as bitsandbytes writes 1/127


class Numbers(Stored):
    """numbers: (d, k), one for each of W0's."""

    numbers: Tensor

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """(d, k)."""
        return self.numbers.shape

    @property
    def held(self) -> Tensor:
        """The small numbers."""
        return self.numbers


@dataclass(frozen=True, eq=False)
class Int8Rows(Numbers):
    """bitsandbytes' LLM.int8() weight: numbers (d, k) int8, absmax (d,) of every row; W0 = numbers·absmax/127.

    The activations are not rounded to eight bits here, as bitsandbytes' own layer does.
    """

    scheme: ClassVar[str] = "bitsandbytes int8"
    numbers: Tensor
    absmax: Tensor
    dtype: torch.dtype = torch.float32

    @property
    def form(self) -> str:
        """Its usual name."""
        return "int8"

    def rows(self, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """W0[rows], in the order of bitsandbytes' own product."""
        wide = self.numbers[rows].float()  # first, which takes half as long as a product of two dtypes
        wide.mul_(self.absmax[rows].view(-1, 1)).mul_(PER_127)
        return wide.to(self.dtype).to(dtype or self.dtype)


@dataclass(frozen=True, eq=False)
class Scaled(Numbers):
    """W0 = numbers·scale: numbers (d, k) int8 or FP8; scales (⌈d/rows⌉, ⌈k/columns⌉), one for each block.

    block: (rows, columns) that share a scale; (1, k) is a scale for a channel, (d, k) one for the tensor. The product
    is formed in float32 and rounded to dtype; `zero` points (of the scales' shape) are taken off first. lead: how many
    rows of the first block come before the first of `numbers`, which are some rows of a matrix then.
    """

    scheme: ClassVar[str] = "scaled"
    numbers: Tensor
    scales: Tensor
    block: tuple[int, int]
    dtype: torch.dtype
    zero: Tensor | None = None
    lead: int = 0

    def rows(self, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """W0[rows]."""
        wide = self.numbers[rows].float()
        if self.zero is not None:
            wide -= self._spread(self.zero, rows)
        wide *= self._spread(self.scales, rows)
        return wide.to(self.dtype).to(dtype or self.dtype)

    def _spread(self, scales: Tensor, rows: slice) -> Tensor:
        """What every number of the rows is scaled by, as far as broadcasting does not do it."""
        tall, wide = self.block
        start, stop = rows.start + self.lead, rows.stop + self.lead
        first = start // tall
        some = scales[first : -(-stop // tall)].float()
        if some.shape[1] > 1:
            some = some.repeat_interleave(wide, 1)[:, : self.shape[1]]
        if len(scales) == 1:
            return some
        return some.repeat_interleave(tall, 0)[start - first * tall : stop - first * tall]
