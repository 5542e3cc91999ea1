"""cat: the factors side by side, as they are."""

from collections.abc import Sequence

from lowrank.core.combination.term import Options, Term, stacked
from lowrank.core.spectrum import singular_values
from lowrank.core.truncation import LowRank


def cat(terms: Sequence[Term], options: Options) -> LowRank:
    """ΔW = Σ w_i·s_i·B_i·A_i as [w_1·s_1·B_1, w_2·s_2·B_2, ...]·[A_1; A_2; ...]: exact, of rank Σ r_i.

    PEFT's `cat` is the same change. `linear` is the same change at the smallest rank that holds it.
    """
    del options  # the rank is what it is
    a, b = stacked(terms)
    sigma = singular_values(a, b, 1.0)
    return LowRank(a, b, sigma, float(sigma.square().sum()))
