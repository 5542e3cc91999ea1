"""magnitude_prune: keep the largest entries of each change, and sum."""

from collections.abc import Sequence

from lowrank.core.combination.rowwise import combine_rows, total
from lowrank.core.combination.term import Options, Term
from lowrank.core.combination.trimming import trim
from lowrank.core.truncation import LowRank


def magnitude_prune(terms: Sequence[Term], options: Options) -> LowRank:
    """Σ_i w_i·trim(ΔW_i): the `density` of entries of each ΔW_i that are largest in magnitude, nothing rescaled.

    The baseline of Yu et al. 2023 (§4.3), at the best rank-r approximation. PEFT's `magnitude_prune` prunes A and B
    each on their own; its `magnitude_prune_svd` is this one.
    """
    return combine_rows(terms, trim(terms, options.density), total, options)
