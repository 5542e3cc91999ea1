"""bitsandbytes' four-bit forms (Dettmers et al. 2023, arXiv 2305.14314): NF4 and FP4, plain or double quantised.

The matrix is flat, row after row, in blocks of `block` numbers. A number is code[i]·absmax[block], i four bits; a byte
holds two, the first in its high half. Double quantisation stores absmax in eight bits: code₂[j]·absmax₂ + offset.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from lowrank.core.stored.base import Memory, Stored, put


@dataclass(frozen=True, slots=True)
class Nested:
    """absmax in eight bits: absmax (n,) uint8; code (256,), scales (⌈n/block⌉,), offset in float32."""

    absmax: Tensor
    code: Tensor
    scales: Tensor
    offset: Tensor
    block: int

    def values(self, start: int, stop: int) -> Tensor:
        """absmax[start:stop] in float32."""
        scaled = self.code[self.absmax[start:stop].int()]
        return scaled * _spread(self.scales, self.block, start, stop) + self.offset


@dataclass(frozen=True, eq=False)
class FourBit(Stored):
    """packed: uint8, flat; absmax: float32 (blocks,) or `Nested`; code: (16,) float32; kind: "nf4" or "fp4"."""

    scheme: ClassVar[str] = "bitsandbytes 4-bit"
    packed: Tensor
    absmax: Tensor | Nested
    code: Tensor
    block: int
    shape: torch.Size
    dtype: torch.dtype
    kind: str = "nf4"

    @property
    def held(self) -> Tensor:
        """The packed numbers."""
        return self.packed

    @property
    def form(self) -> str:
        """Its kind, and whether its scales are quantised too."""
        return self.kind.upper() + (", double quantised" if isinstance(self.absmax, Nested) else "")

    @property
    def nbytes(self) -> int:
        """Packed numbers and scales."""
        nested = isinstance(self.absmax, Nested)
        scales = self.absmax.absmax.numel() + 4 * self.absmax.scales.numel() if nested else 4 * self.absmax.numel()  # type: ignore[union-attr]
        return self.packed.numel() + scales

    @cached_property
    def _pairs(self) -> Tensor:
        """The two numbers of every byte, before they are scaled, (256,).

        Two float32 numbers are moved as one of 64 bits, which takes a quarter of the time of a row of a table.
        """
        pairs = torch.stack([self.code.repeat_interleave(16), self.code.repeat(16)], dim=1)
        return pairs.view(torch.int64).flatten()

    def rows(self, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """W0[rows]: code·absmax in float32, rounded to the form's dtype."""
        k = self.shape[1]
        return self.numbers(rows.start * k, rows.stop * k).to(dtype or self.dtype).view(-1, k)

    def numbers(self, start: int, stop: int, memory: Memory | None = None, role: str = "numbers") -> Tensor:
        """Those of W0 from `start` to `stop`, row after row, (n',), in the form's dtype.

        In new memory, the caller's own, where no other is given.
        """
        first, last = start // 2, -(-stop // 2)
        wide = None if memory is None else memory.take(f"{role}, wide", (last - first,), torch.int64)[0]
        index = put(self.packed[first:last], torch.int32, memory, "index")
        pairs = torch.index_select(self._pairs, 0, index, out=wide).view(torch.float32)
        numbers = pairs[start - 2 * first : stop - 2 * first]
        scaled = scaled_blocks(numbers, self.scales(start, stop), self.block, start)
        return scaled if self.dtype is torch.float32 else put(scaled, self.dtype, memory, role)

    def holding(self, packed: Tensor, absmax: Tensor | Nested, shape: torch.Size) -> "FourBit":
        """Other numbers in the same code."""
        other = type(self)(packed, absmax, self.code, self.block, shape, self.dtype, self.kind)
        other.__dict__["_pairs"] = self._pairs  # made once
        return other

    def scales(self, start: int, stop: int) -> Tensor:
        """absmax of the blocks that hold the numbers from `start` to `stop`."""
        first, last = start // self.block, -(-stop // self.block)
        return self.absmax.values(first, last) if isinstance(self.absmax, Nested) else self.absmax[first:last].float()


def scaled_blocks(numbers: Tensor, scales: Tensor, block: int, start: int) -> Tensor:
    """numbers·scale of each one's block, in place: numbers (n,), the first of them number `start` of the whole."""
    if start % block == 0 and len(numbers) % block == 0:
        numbers.view(-1, block).mul_(scales.unsqueeze(1))
        return numbers
    return numbers.mul_(_spread(scales, block, start % block, start % block + len(numbers)))


def _spread(scales: Tensor, block: int, start: int, stop: int) -> Tensor:
    """The scale of every number from `start` to `stop`."""
    first = start // block
    some = scales[first : -(-stop // block)].repeat_interleave(block)
    return some[start - first * block : stop - first * block]
