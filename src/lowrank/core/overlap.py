"""Two changes of one weight side by side: do they say the same, and would they disturb each other when added up?"""

import math

import torch
from torch import Tensor

from lowrank.core.spectrum import DeltaSVD


def inner_product(one: DeltaSVD, other: DeltaSVD) -> float:
    """⟨ΔW₁, ΔW₂⟩ = tr(ΔW₁ᵀ·ΔW₂) = Σ_ij σ_i·σ'_j·(u_iᵀu'_j)·(v_iᵀv'_j), with no matrix of the weight's size."""
    left, right = one.u.t() @ other.u, one.v.t() @ other.v
    return float(one.sigma @ (left * right) @ other.sigma)


def cosine(one: DeltaSVD, other: DeltaSVD) -> float | None:
    """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖_F·‖ΔW₂‖_F), in [−1, 1]; None where one of them is zero."""
    norms = norm(one) * norm(other)
    return max(-1.0, min(1.0, inner_product(one, other) / norms)) if norms > 0 else None


def norm(change: DeltaSVD) -> float:
    """‖ΔW‖_F."""
    return float(torch.linalg.vector_norm(change.sigma))


def interference(own: DeltaSVD, other: DeltaSVD) -> float | None:
    """‖ΔW'·V‖_F / ‖ΔW·V‖_F, V the input directions that ΔW reads: what ΔW' adds there beside what ΔW does there.

    0 when ΔW' reads only inputs that ΔW ignores, so that merging both leaves ΔW's answers alone; 1 when it adds as
    much as ΔW itself. None where ΔW is zero.
    """
    mine = norm(own)
    added = torch.linalg.vector_norm(other.sigma.unsqueeze(1) * (other.v.t() @ own.v))
    return float(added) / mine if mine > 0 else None


def random_interference(own: DeltaSVD, other: DeltaSVD) -> float | None:
    """What `interference` would be (root mean square) if the two read unrelated directions: ‖ΔW'‖/‖ΔW‖·√(n/k)."""
    mine, k = norm(own), own.v.shape[0]
    return norm(other) / mine * math.sqrt(own.rank / k) if mine > 0 else None


def growth(one: DeltaSVD, other: DeltaSVD) -> float | None:
    """‖ΔW₁ + ΔW₂‖_F / √(‖ΔW₁‖² + ‖ΔW₂‖²): 1 for unrelated changes, up to √2 for equal ones, 0 for opposite ones."""
    alone = norm(one) ** 2 + norm(other) ** 2
    both = alone + 2 * inner_product(one, other)
    return math.sqrt(max(both, 0.0) / alone) if alone > 0 else None


def merged_factors(one: DeltaSVD, other: DeltaSVD) -> tuple[Tensor, Tensor]:
    """(A, B) with B·A = ΔW₁ + ΔW₂: (n + n', k) and (d, n + n')."""
    b = torch.cat([one.u * one.sigma, other.u * other.sigma], dim=1)
    return torch.cat([one.v, other.v], dim=1).t(), b
