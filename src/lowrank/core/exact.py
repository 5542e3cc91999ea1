"""The best low-rank approximation of a matrix in memory, decomposed in full: the yardstick of `core.randomised`."""

import torch
from torch import Tensor

from lowrank.core.finite import require_finite
from lowrank.core.truncation import Cut, LowRank, balanced


def decompose(matrix: Tensor, cut: Cut) -> LowRank:
    """B·A ≈ M under `cut` by the full SVD, in the matrix's dtype: O(d·k·min(d, k)). matrix: (d, k)."""
    require_finite(matrix, "the matrix")
    u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
    total = float(sigma.double().square().sum())
    size = cut.size(sigma, total, torch.finfo(matrix.dtype).eps)
    a, b = balanced(u[:, :size], sigma[:size], vt[:size], matrix.dtype)
    return LowRank(a, b, sigma[:size].double(), total)
