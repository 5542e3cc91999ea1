"""LoftQ: start from what quantising took off the weight (Li et al. 2023, arXiv 2310.08659), for Q(W0) that stays.

A, B with s·B·A the best rank-r part of W0 − Q(W0). The paper alternates: it quantises W0 − s·B·A again, several rounds,
and so moves the frozen weight too. Here that stays Q(W0), so that the adapter belongs to the base that everybody has;
then a second round would find the same factors.
"""

import torch
from torch import Tensor

EXACT = 2048  # up to this side the decomposition is whole; noise has a flat spectrum, which sketches see badly
ITERATIONS = 8


def loftq(residual: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A, B) of W0 − Q(W0), (d, k) in float32: A (r, k), B (d, r)."""
    if min(residual.shape) <= EXACT:
        u, sigma, vh = torch.linalg.svd(residual, full_matrices=False)
    else:
        u, sigma, v = torch.svd_lowrank(residual, q=min(2 * rank, *residual.shape), niter=ITERATIONS)
        vh = v.t()
    root = (sigma[:rank] / scale).sqrt()
    return (root.unsqueeze(1) * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()
