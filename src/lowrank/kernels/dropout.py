"""Dropout on the way to A: which entries of x are kept, drawn once and remembered at one bit each.

torch draws its masks on CPU with one thread, 5 ns an entry: more than a small layer's whole product takes. Here 64
entries are drawn at a time, as the bits of integers. A bit that is 1 with probability q = 0.q₁q₂…qₙ (binary) comes from
n fair bits: beginning with 0, or-ed with a fair bit where a digit of q is 1 and and-ed with one where it is 0, from the
last digit to the first. On a GPU torch draws fast, and the mask is drawn again in backward from the same seed.

The kept entries are not scaled by 1/q: that goes into s, which costs nothing.

Projections of one input (q, k and v; gate and up) read it through one mask, as in the paper's own code, where they are
one layer with one dropout (`MergedLinear` of github.com/microsoft/LoRA). For each of them the law is the same as with a
mask of its own, and an entry is drawn, kept and applied once instead of three times.
"""

import weakref
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lowrank.kernels.hooks import watcher
from lowrank.kernels.remembered import Remembered

DIGITS = 16
CLOSE = 5e-3  # how far p and q may be from what was asked, relatively; s takes the q drawn, so nothing is biased
BLOCK = 1 << 21  # bytes of a temporary that is read while still in the processor's caches
FEW_WORDS = 1024  # below, what numpy's calls cost counts for more than what they do

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Mask:
    """Zeros and ones for x (T, k), ones with probability `kept`.

    On CPU they are in `bits`, (⌈T·k/64⌉,); elsewhere they are drawn again from the seed.
    """

    kept: float
    seed: int
    bits: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """mask∘x, (T, k), the same each time."""
        if self.bits is None:
            return self._ones(x).mul_(x)
        ones = self._all_ones(x)
        return ones.bitwise_and_(x.view(ones.dtype)).view(x.dtype)

    def numbers(self, shape: torch.Size) -> Tensor:
        """The zeros and ones as bytes in x's shape (..., k), on CPU: autograd differentiates x times them."""
        assert self.bits is not None
        ones = np.unpackbits(self.bits.numpy().view(np.uint8), bitorder="little", count=shape.numel())
        return torch.from_numpy(ones).view(shape)

    def add_product_(self, onto: Tensor, ds: Tensor, a: Tensor) -> None:
        """onto += mask∘(dS·A), in place: onto (T, k), ds (T, r), a (r, k)."""
        if self.bits is None:
            onto.addcmul_(self._ones(onto), ds @ a)
            return
        block = max(8, BLOCK // (a.shape[1] * a.dtype.itemsize) & -8)  # 8 rows always begin with a byte
        for start in range(0, onto.shape[0], block):
            product = ds[start : start + block] @ a
            ones = self._all_ones(product, start * a.shape[1] // 8)
            product.view(ones.dtype).bitwise_and_(ones)
            onto[start : start + block].add_(product)

    def _ones(self, x: Tensor) -> Tensor:
        """1 where x is kept, drawn again from the seed."""
        generator = torch.Generator(x.device).manual_seed(self.seed)
        return x.new_empty(x.shape).bernoulli_(self.kept, generator=generator)

    def _all_ones(self, x: Tensor, start: int = 0) -> Tensor:
        """Integers as wide as x's entries, of ones where x is kept, from byte `start` on.

        An `and` with them takes a quarter of the time of a product with 0 and 1.
        """
        assert self.bits is not None
        chosen = self.bits.view(torch.uint8)[start : start + -(-x.numel() // 8)]
        eights = _table(x.dtype.itemsize).index_select(0, chosen.int())  # (⌈T·k/8⌉, 8)
        return eights.view(-1)[: x.numel()].view(x.shape)


@dataclass(slots=True)
class _Shared:
    """A mask, and who has read x through it."""

    mask: Mask
    readers: "set[weakref.ref[object]]"  # not their ids, which go to others when they are gone


_shared: Remembered[_Shared] = Remembered()


def shared(probability: float, x: Tensor, reader: object) -> Mask:
    """The mask of all that read this tensor one after the other; for one that reads it again, a new mask.

    A block that checkpointing computes again must draw what it drew before, so nothing is shared between blocks: they
    are told apart by their hooks or, where checkpointing is reentrant, by x: there, what a block is given comes from
    outside of its no_grad in the first pass, and is a leaf in the second.
    """
    given = x.requires_grad and (x.is_leaf or not torch.is_grad_enabled())
    if given or x.is_inference():  # of a tensor made in inference mode torch does not say whether it was written to
        return draw(probability, x)
    key = (probability, watcher())
    last, me = _shared.of(x, key), weakref.ref(reader)
    if last is None or me in last.readers:
        last = _shared.keep(x, key, _Shared(draw(probability, x), set()))
    last.readers.add(me)
    return last.mask


def draw(probability: float, x: Tensor) -> Mask:
    """A mask for x (..., k) that drops an entry with `probability`, from torch's default generator."""
    seed = int(torch.randint(2**62, ()))
    if x.device.type != "cpu":
        return Mask(1 - probability, seed, None)
    digits = _digits(1 - probability)
    words = -(-max(x.numel(), 1) // 64)  # one also for no entry (an idle expert): torch cannot view nothing as bytes
    random, bits = np.random.SFC64(seed), np.zeros(words, dtype=np.uint64)
    at_once = len(digits) if words < FEW_WORDS else 1  # the same numbers, by one call
    for place in range(0, len(digits), at_once):
        fair = random.random_raw(words * at_once).reshape(at_once, words)
        for digit, row in zip(digits[::-1][place:], fair, strict=False):
            (np.bitwise_or if digit else np.bitwise_and)(bits, row, out=bits)
    return Mask(
        sum(digit / 2**place for place, digit in enumerate(digits, 1)), seed, torch.from_numpy(bits.view(np.int64))
    )


@cache
def _digits(kept: float) -> tuple[int, ...]:
    """The shortest binary fraction that is close to `kept` and, up to DIGITS, closest: its digits after the point."""
    for n in range(1, DIGITS + 1):
        units = min(max(round(kept * 2**n), 1), 2**n - 1)
        if abs(units / 2**n - kept) <= CLOSE * min(kept, 1 - kept):
            break
    return tuple(units >> place & 1 for place in reversed(range(n)))


@cache
def _table(width: int) -> Tensor:
    """The bits of every byte, lowest first, each as `width` bytes of ones or zeros: (256, 8)."""
    return -(torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1).to(_INTEGERS[width])
