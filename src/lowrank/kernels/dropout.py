"""Dropout on the way to A: which entries of x are kept, drawn once and remembered at one bit each.

torch draws its masks on CPU with one thread, 5 ns an entry: more than a small layer's whole product takes. Here 64
entries are drawn at a time, as the bits of integers. A bit that is 1 with probability q = 0.q₁q₂…qₙ (binary) comes from
n fair bits: beginning with 0, or-ed with a fair bit where a digit of q is 1 and and-ed with one where it is 0, from the
last digit to the first. On a GPU torch draws fast, and the mask is drawn again in backward from the same seed.

The kept entries are not scaled by 1/q: that goes into s, which costs nothing.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

DIGITS = 16
CLOSE = 1e-3  # how far p and q may be from what was asked, relatively; s takes the q drawn, so nothing is biased


@dataclass(frozen=True, slots=True)
class Mask:
    """Zeros and ones for x (T, k), ones with probability `kept`.

    On CPU they are in `bits`, (⌈T·k/64⌉,); elsewhere they are drawn again from the seed.
    """

    kept: float
    seed: int
    bits: Tensor | None

    def like(self, x: Tensor) -> Tensor:
        """The mask in x's dtype: (T, k), the same each time."""
        if self.bits is None:
            generator = torch.Generator(x.device).manual_seed(self.seed)
            return x.new_empty(x.shape).bernoulli_(self.kept, generator=generator)
        eights = _table(x.dtype).index_select(0, self.bits.view(torch.uint8).int())  # (⌈T·k/64⌉·8, 8)
        return eights.view(-1)[: x.numel()].view(x.shape)


def draw(probability: float, x: Tensor) -> Mask:
    """A mask for x (..., k) that drops an entry with `probability`, from torch's default generator."""
    seed = int(torch.randint(2**62, ()))
    if x.device.type != "cpu":
        return Mask(1 - probability, seed, None)
    digits = _digits(1 - probability)
    words = -(-max(x.numel(), 1) // 64)  # one also for no entry (an idle expert): torch cannot view nothing as bytes
    raw = np.random.SFC64(seed).random_raw((len(digits), words))
    fair = torch.from_numpy(raw.view(np.int64))
    bits = torch.zeros_like(fair[0])
    for digit, word in zip(reversed(digits), fair, strict=True):
        bits = bits.bitwise_or_(word) if digit else bits.bitwise_and_(word)
    return Mask(sum(digit / 2**place for place, digit in enumerate(digits, 1)), seed, bits)


@cache
def _digits(kept: float) -> tuple[int, ...]:
    """The shortest binary fraction that is close to `kept` and, up to DIGITS, closest: its digits after the point."""
    for n in range(1, DIGITS + 1):
        units = min(max(round(kept * 2**n), 1), 2**n - 1)
        if abs(units / 2**n - kept) <= CLOSE * min(kept, 1 - kept):
            break
    return tuple(units >> place & 1 for place in reversed(range(n)))


@cache
def _table(dtype: torch.dtype) -> Tensor:
    """The bits of every byte, lowest first: (256, 8)."""
    return (torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1).to(dtype)
