"""How much of a rank a spectrum uses: every question about "which rank" that the singular values σ can answer.

All take σ (n,), descending and not negative, and give 0 for a change that is zero.
"""

import torch
from torch import Tensor


def effective_rank(sigma: Tensor) -> float:
    """exp(−Σ p·ln p) with p = σ/Σσ: n for n equal directions, 1 for a single one (Roy & Vetterli 2007)."""
    total = sigma.sum()
    if not total > 0:
        return 0.0
    p = sigma / total
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def stable_rank(sigma: Tensor) -> float:
    """‖ΔW‖_F² / ‖ΔW‖₂² = Σσ² / σ₁²: at most the rank, and little moved by small σ."""
    if sigma.numel() == 0 or not sigma[0] > 0:
        return 0.0
    return float((sigma / sigma[0]).square().sum())


def energy_kept(sigma: Tensor) -> Tensor:
    """Σ_{i≤n} σ_i² / Σ σ² for n = 1, 2, ...: the share of ‖ΔW‖_F² that the best rank-n change keeps, (n,)."""
    squares = sigma.square()
    total = squares.sum()
    return squares.cumsum(0) / total if total > 0 else torch.zeros_like(squares)


def rank_for_energy(sigma: Tensor, share: float) -> int:
    """The smallest rank that keeps `share` of ‖ΔW‖_F², 0 < share ≤ 1."""
    kept = energy_kept(sigma)
    if kept.numel() == 0 or not kept[-1] > 0:
        return 0
    wanted = share * (1 - 1e-12)  # so that 10 % by 9 of 10 equal directions is met in spite of rounding
    return int((kept < wanted).sum()) + 1
