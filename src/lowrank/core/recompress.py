"""Factors of high rank to factors of low rank: the best ones there are, without forming ΔW."""

import torch
from torch import Tensor

from lowrank.core.finite import require_finite
from lowrank.core.truncation import Cut, LowRank, balanced


def recompress(a: Tensor, b: Tensor, cut: Cut) -> LowRank:
    """The best approximation of B·A under `cut` in the Frobenius and every other unitarily invariant norm.

    B = Q_B·R_B and Aᵀ = Q_A·R_A give B·A = Q_B·(R_B·R_Aᵀ)·Q_Aᵀ; the SVD of the R×R core, cut to r, is the SVD of B·A
    cut to r (Eckart-Young). a: (R, k), b: (d, R) → (r, k), (d, r). O((d + k)·R²): Q stays as reflectors and meets only
    the r vectors that stay. All in float64; the result has the dtype of the inputs, float32 or wider.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    left, left_tau, r_b = _householder(b.detach().double())
    right, right_tau, r_a = _householder(a.detach().double().t())
    core = r_b @ r_a.t()
    require_finite(core, "ΔW")
    u, sigma, vt = torch.linalg.svd(core, full_matrices=False)
    total = float(sigma.square().sum())
    size = cut.size(sigma, total, torch.finfo(dtype).eps)
    sigma = sigma[:size]
    u, v = _apply(left, left_tau, u[:, :size]), _apply(right, right_tau, vt[:size].t())
    a, b = balanced(u, sigma, v.t(), dtype)
    return LowRank(a, b, sigma, total)


def _householder(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(reflectors, τ, R) of matrix (n, m): Q, (n, min(n, m)), stays implicit."""
    packed, tau = torch.geqrf(matrix)
    size = min(matrix.shape)
    return packed[:, :size], tau, packed[:size].triu()


def _apply(reflectors: Tensor, tau: Tensor, core: Tensor) -> Tensor:
    """Q·core, (n, r), for core (m, r)."""
    padded = core.new_zeros(reflectors.shape[0], core.shape[1])
    padded[: core.shape[0]] = core
    return torch.ormqr(reflectors, tau, padded)
