"""dare_linear: drop at random, rescale, sum (Yu et al. 2023, arXiv 2311.03099)."""

from collections.abc import Sequence

from lowrank.core.combination.dropping import drop
from lowrank.core.combination.rowwise import combine_rows, total
from lowrank.core.combination.term import Options, Term
from lowrank.core.truncation import LowRank


def dare_linear(terms: Sequence[Term], options: Options) -> LowRank:
    """Σ_i m_i ⊙ w_i·ΔW_i / p with m_i ~ Bernoulli(p), p = `density`, at the best rank-r approximation.

    As in the paper, entries of ΔW are dropped, so the expectation is the plain sum. What dropping adds has no low rank,
    and compressing takes most of it away again: expect a low `kept`, and a result near that of `linear`. PEFT's
    `dare_linear` drops entries of A and B instead; its `dare_linear_svd` is this one.
    """
    return combine_rows(terms, drop(options.density, options.seed), total, options)
