"""ties: trim, elect a sign, merge what agrees (Yadav et al. 2023, arXiv 2306.01708)."""

from collections.abc import Sequence

from lowrank.core.combination.consensus import consensus
from lowrank.core.combination.rowwise import combine_rows
from lowrank.core.combination.term import Options, Term
from lowrank.core.combination.trimming import trim
from lowrank.core.truncation import LowRank


def ties(terms: Sequence[Term], options: Options) -> LowRank:
    """TIES of the task vectors τ_i = w_i·ΔW_i of one weight, at the best rank-r approximation of the result.

    1. trim: keep the `density` of entries of each τ_i that are largest in magnitude;
    2. elect: the sign of the sum of what is left, entry by entry;
    3. merge: the mean of the entries that have this sign.

    The paper trims over all weights of a model together, here (as in PEFT and mergekit) over one. A w_i counts as part
    of its task vector, in the vote and in the mean; with equal weights w the result is w times the paper's. PEFT's
    `ties` does this to A and to B each on their own, which is another function of ΔW; its `ties_svd` does it to ΔW as
    here, but votes without the weights.
    """
    return combine_rows(terms, trim(terms, options.density), consensus, options)
