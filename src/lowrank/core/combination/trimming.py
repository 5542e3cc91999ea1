"""Keeping the entries of largest magnitude of a matrix that is seen in blocks of rows."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lowrank.core.combination.rowwise import Thin
from lowrank.core.combination.term import Term
from lowrank.core.merging import row_blocks

DIGIT = 16
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def trim(terms: Sequence[Term], density: float) -> Thin:
    """A `Thin` that zeroes all but the ⌈density·d·k⌉ largest entries of each term; all that equal the last one stay."""
    limits = [_limit(term, density) for term in terms]

    def thin(which: int, block: Tensor, first_row: int) -> Tensor:
        del first_row
        return torch.where(block.abs() >= limits[which], block, 0)

    return thin


def _limit(term: Term, density: float) -> Tensor:
    d, k = term.b.shape[0], term.a.shape[1]
    kept = min(d * k, -int(-density * d * k // 1))

    def blocks() -> Iterable[Tensor]:
        return (term.rows(rows) for rows in row_blocks(d, k))

    return kth_magnitude(blocks, max(kept, 1), term.a.dtype)


def kth_magnitude(blocks: Callable[[], Iterable[Tensor]], k: int, dtype: torch.dtype) -> Tensor:
    """The k-th largest |x| over all blocks, exactly, as a scalar of `dtype`.

    The bits of non-negative floats order like integers, so the answer is found by its leading digits of 16 bits: one
    pass and one histogram for each.
    """
    integer = INTEGERS[dtype]
    prefix = 0
    for shift in range(torch.finfo(dtype).bits - DIGIT, -1, -DIGIT):
        counts = torch.zeros(1 << DIGIT, dtype=torch.int64)
        for block in blocks():
            bits = block.abs().view(integer).flatten()
            digits = bits >> shift
            chosen = digits[(digits >> DIGIT) == prefix] & ((1 << DIGIT) - 1)
            counts += torch.bincount(chosen, minlength=1 << DIGIT)
        above = counts.flip(0).cumsum(0)
        place = int((above < k).sum())
        k -= int(above[place - 1]) if place else 0
        prefix = (prefix << DIGIT) | ((1 << DIGIT) - 1 - place)
    return torch.tensor(prefix, dtype=integer).view(dtype)
