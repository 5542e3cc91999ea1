"""TIES' second and third steps: elect a sign for every entry, and average the terms that have it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def consensus(blocks: Sequence[Tensor]) -> Tensor:
    """γ = sgn(Σ_i x_i); the mean of those x_i ≠ 0 with sgn(x_i) = γ, and 0 where there are none (Yadav 2023, §3)."""
    stacked = torch.stack(list(blocks))  # (n, rows, k)
    agreeing = stacked.sign() == stacked.sum(0).sign()
    agreeing &= stacked != 0
    return torch.where(agreeing, stacked, 0).sum(0) / agreeing.sum(0).clamp_min(1)
