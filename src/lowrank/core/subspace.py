"""How much two sets of directions share (Hu et al. 2022, arXiv 2106.09685, §7.2)."""

import math

import torch
from torch import Tensor


def similarity_grid(one: Tensor, other: Tensor) -> Tensor:
    """φ(i, j) = ‖U_iᵀ·V_j‖_F² / min(i, j) for every i and j at once: one (n, p), other (n, q) → (p, q).

    U_i are the first i columns of `one`, V_j the first j of `other`; both have orthonormal columns, strongest first.
    1: the smaller of the two subspaces lies in the larger. 0: they are orthogonal. Entry [i−1, j−1] is φ(i, j).
    """
    shared = (one.t() @ other).square().cumsum(0).cumsum(1)
    return (shared / _smaller(*shared.shape)).clamp(0, 1)


def random_grid(n: int, p: int, q: int) -> Tensor:
    """What φ(i, j) is on average for directions drawn at random from n dimensions: max(i, j)/n, (p, q).

    E‖U_iᵀV_j‖_F² = i·j/n for independent uniformly random subspaces.
    """
    i, j = _counts(p, q)
    return torch.maximum(i, j) / n


def random_spread(n: int, i: int, j: int) -> float:
    """The standard deviation of φ(i, j) for directions drawn at random from n dimensions.

    Var‖U_iᵀV_j‖_F² = 2·i·j·(n−i)·(n−j) / (n²·(n−1)·(n+2)), the variance of tr(P·Q) of two random projections.
    """
    if n < 2:
        return 0.0
    variance = 2 * i * j * (n - i) * (n - j) / (n**2 * (n - 1) * (n + 2))
    return math.sqrt(variance) / min(i, j)


def _counts(p: int, q: int) -> tuple[Tensor, Tensor]:
    i = torch.arange(1, p + 1, dtype=torch.float64).unsqueeze(1)
    return i.expand(p, q), torch.arange(1, q + 1, dtype=torch.float64).expand(p, q)


def _smaller(p: int, q: int) -> Tensor:
    return torch.minimum(*_counts(p, q))
