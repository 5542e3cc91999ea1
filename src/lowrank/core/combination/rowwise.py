"""Methods that are not linear in ΔW, without a d×k matrix: entries of a block of rows at a time, then recompressed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.core.combination.term import Options, Term, largest_rank
from lowrank.core.merging import row_blocks
from lowrank.core.randomised import compress
from lowrank.core.truncation import Cut, LowRank

Thin = Callable[[int, Tensor, int], Tensor]  # (which term, a block of its rows, number of the first row) → the block
Merge = Callable[[Sequence[Tensor]], Tensor]  # the terms' blocks → the combined block


@dataclass(frozen=True, slots=True)
class Combined:
    """merge(thin(w_1·ΔW_1), thin(w_2·ΔW_2), ...) as a `core.randomised.Rows`, recomputed at every pass."""

    terms: Sequence[Term]
    thin: Thin
    merge: Merge

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k)."""
        return self.terms[0].b.shape[0], self.terms[0].a.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the terms."""
        return self.terms[0].a.dtype

    def blocks(self) -> Iterator[Tensor]:
        """The combined matrix, a block of rows at a time."""
        for rows in row_blocks(*self.shape):
            yield self.merge([self.thin(i, term.rows(rows), rows.start) for i, term in enumerate(self.terms)])


def combine_rows(terms: Sequence[Term], thin: Thin, merge: Merge, options: Options) -> LowRank:
    """The combination at rank `options.rank`, by default the largest of the terms.

    The combined matrix has no low rank of its own, so much of it is lost: `kept` says how much stays.
    """
    rank = options.rank or largest_rank(terms)
    return compress(Combined(terms, thin, merge), Cut(rank), seed=options.seed)


def total(blocks: Sequence[Tensor]) -> Tensor:
    """Σ of the terms' blocks."""
    return torch.stack(list(blocks)).sum(0)
