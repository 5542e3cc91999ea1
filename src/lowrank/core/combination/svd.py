"""svd: the weighted sum of the changes, cut to the rank of an adapter."""

from collections.abc import Sequence

from lowrank.core.combination.term import Options, Term, largest_rank, stacked
from lowrank.core.recompress import recompress
from lowrank.core.truncation import Cut, LowRank


def svd(terms: Sequence[Term], options: Options) -> LowRank:
    """The best approximation of Σ w_i·s_i·B_i·A_i of rank `options.rank`, by default the largest r_i.

    The same as `linear` but for that default, which is PEFT's `svd`. PEFT forms the dense ΔW, decomposes it in full and
    (measured with 0.21) applies the scale twice; here the sum is never formed.
    """
    return recompress(*stacked(terms), Cut(options.rank or largest_rank(terms)))
