"""dare_ties: drop at random and rescale, then elect a sign and merge what agrees."""

from collections.abc import Sequence

from lowrank.core.combination.consensus import consensus
from lowrank.core.combination.dropping import drop
from lowrank.core.combination.rowwise import combine_rows
from lowrank.core.combination.term import Options, Term
from lowrank.core.truncation import LowRank


def dare_ties(terms: Sequence[Term], options: Options) -> LowRank:
    """DARE (Yu et al. 2023, §3.2) as the first step of TIES in the place of trimming, on w_i·ΔW_i.

    See `dare_linear` and `ties` for the steps, and for how PEFT's methods of these names differ.
    """
    return combine_rows(terms, drop(options.density, options.seed), consensus, options)
