"""How strongly ΔW pushes the directions it acts on, beside what W0 does there (Hu et al. 2022, §7.3, Table 7)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.core.spectrum import DeltaSVD


@dataclass(frozen=True, slots=True)
class Amplification:
    """Norms of W0 inside r-dimensional pairs of subspaces (U, V), all Frobenius.

    change: ‖ΔW‖; weight: ‖W0‖; along_change: ‖Uᵀ·W0·V‖ with U, V the directions of ΔW; along_own: the same with W0's
    own r leading directions; along_random: with random ones, as root mean square.
    """

    rank: int
    change: float
    weight: float
    along_change: float
    along_own: float
    along_random: float

    @property
    def factor(self) -> float | None:
        """‖ΔW‖_F / ‖Uᵀ·W0·V‖_F: by how much the directions ΔW acts on, present in W0, are amplified. None for 0/0."""
        return self.change / self.along_change if self.along_change > 0 else None


def amplification(weight: Tensor, change: DeltaSVD, leading: Tensor, weight_norm: float) -> Amplification:
    """weight: W0 (d, k); leading: W0's singular values, at least the first `change.rank`; weight_norm: ‖W0‖_F.

    For random directions E‖Uᵀ·W0·V‖_F² = r²/(d·k)·‖W0‖_F², so nothing is drawn.
    """
    d, k = weight.shape
    r = change.rank
    inner = change.u.to(weight).t() @ (weight @ change.v.to(weight))
    return Amplification(
        rank=r,
        change=float(torch.linalg.vector_norm(change.sigma)),
        weight=weight_norm,
        along_change=float(torch.linalg.vector_norm(inner)),
        along_own=float(torch.linalg.vector_norm(leading[:r])),
        along_random=r / math.sqrt(d * k) * weight_norm,
    )
