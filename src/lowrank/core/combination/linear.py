"""linear: the weighted sum of the changes."""

from collections.abc import Sequence

from lowrank.core.combination.term import Options, Term, stacked
from lowrank.core.recompress import recompress
from lowrank.core.truncation import Cut, LowRank


def linear(terms: Sequence[Term], options: Options) -> LowRank:
    """ΔW = Σ w_i·s_i·B_i·A_i, exact: concatenated factors, then the best of rank `options.rank` by QR and a small SVD.

    Without a rank the result has the smallest one that holds the sum to rounding, at most Σ r_i. PEFT's `linear` sums
    the factors instead, (Σ √w·B_i)·(Σ √w·A_i), which adds a cross term B_i·A_j for every pair of adapters and needs
    equal ranks; the two agree only for a single adapter.
    """
    return recompress(*stacked(terms), Cut(options.rank))
