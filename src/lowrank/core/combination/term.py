"""What a combination method is given."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One adapter's share of a combined change: w·ΔW = factor·B·A, with factor = w·s.

    a: (r, k), b: (d, r); the ranks of several terms may differ, d and k may not.
    """

    a: Tensor
    b: Tensor
    factor: float = 1.0

    def rows(self, which: slice) -> Tensor:
        """The rows `which` of w·ΔW, (n, k)."""
        return (self.b[which] @ self.a).mul_(self.factor)


@dataclass(frozen=True, slots=True)
class Options:
    """rank: of the result, or None for the method's own; density: share of entries kept by the methods that drop some
    (0 to 1); seed: for those that drop at random."""

    rank: int | None = None
    density: float = 1.0
    seed: int = 0


def stacked(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """(A, B) with B·A = Σ factor_i·B_i·A_i and no cross terms: A (Σr, k) and B (d, Σr) side by side.

    The factor goes into B, its root into both would need a sign.
    """
    return torch.cat([term.a for term in terms]), torch.cat([term.b * term.factor for term in terms], dim=1)


def largest_rank(terms: Sequence[Term]) -> int:
    """The largest rank of the terms: what a method without one of its own compresses to."""
    return max(term.a.shape[0] for term in terms)
