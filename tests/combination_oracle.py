"""The slow, obvious versions of the combination methods: dense float64 matrices, whole, by the definitions."""

import torch
from torch import Tensor

from lowrank.core.combination.dropping import kept
from lowrank.core.combination.term import Term
from lowrank.core.merging import row_blocks


def dense(term: Term) -> Tensor:
    """w·ΔW, (d, k), in float64."""
    return term.factor * (term.b.double() @ term.a.double())


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank, by a full SVD."""
    u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


def trimmed(matrix: Tensor, density: float) -> Tensor:
    """All but the ⌈density·n⌉ largest magnitudes set to zero, by sorting."""
    count = -int(-density * matrix.numel() // 1)
    limit = matrix.abs().flatten().sort(descending=True).values[count - 1]
    return torch.where(matrix.abs() >= limit, matrix, 0)


def dropped(matrix: Tensor, density: float, seed: int, which: int) -> Tensor:
    """With the masks the method draws, block by block."""
    mask = torch.cat([kept(matrix[rows].shape, density, seed, which, rows.start) for rows in row_blocks(*matrix.shape)])
    return torch.where(mask, matrix / density, 0)


def disjoint_mean(matrices: list[Tensor]) -> Tensor:
    """TIES' election and merge, entry by entry in Python."""
    result = torch.zeros_like(matrices[0])
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            values = [float(m[i, j]) for m in matrices]
            agreeing = [v for v in values if v * sum(values) > 0]
            result[i, j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


def combined(method: str, terms: list[Term], density: float = 1.0, seed: int = 0) -> Tensor:
    """What the method makes of the terms before any compression."""
    matrices = [dense(term) for term in terms]
    thin = {
        "linear": lambda i, m: m,
        "cat": lambda i, m: m,
        "svd": lambda i, m: m,
        "ties": lambda i, m: trimmed(m, density),
        "magnitude_prune": lambda i, m: trimmed(m, density),
        "dare_linear": lambda i, m: dropped(m, density, seed, i),
        "dare_ties": lambda i, m: dropped(m, density, seed, i),
    }[method]
    thinned = [thin(i, m) for i, m in enumerate(matrices)]
    return disjoint_mean(thinned) if method in ("ties", "dare_ties") else torch.stack(thinned).sum(0)
