"""How many singular values to keep: a rank, a share of the energy, or all that are more than rounding."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Cut:
    """Keep at most `rank` singular values, and no more than it takes for the share `energy` of ‖ΔW‖²_F.

    With neither, everything is kept that the result's precision can hold. rank ≥ 1; 0 < energy ≤ 1.
    """

    rank: int | None = None
    energy: float | None = None

    def size(self, sigma: Tensor, total: float, eps: float) -> int:
        """How many of the descending `sigma` (n,) to keep, at least one; total: ‖ΔW‖²_F; eps: of the result's dtype."""
        most = len(sigma) if self.rank is None else min(self.rank, len(sigma))
        if self.energy is not None:
            reached = torch.cumsum(sigma.double().square(), 0) >= self.energy * total * (1 - 1e-12)
            most = min(most, int(reached.logical_not().sum()) + 1)
        if self.rank is None:
            most = min(most, int((sigma > sigma[:1] * eps).sum()))
        return max(most, 1)


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A change ΔW ≈ B·A with a scale of one, and what it leaves out.

    a: (r, k) and b: (d, r), balanced: both carry √σ. sigma: (r,) in float64, descending. total: ‖ΔW‖²_F of what was
    compressed. shortfall: an estimate of the share of it that the best B·A of this rank would hold beyond this one;
    0 where this one is the best.
    """

    a: Tensor
    b: Tensor
    sigma: Tensor
    total: float
    shortfall: float = 0.0

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    @property
    def energy(self) -> float:
        """‖B·A‖²_F."""
        return float(self.sigma.square().sum())

    @property
    def kept(self) -> float:
        """The share of ‖ΔW‖²_F that is kept, from 0 to 1; a change of zero is kept whole."""
        return min(1.0, self.energy / self.total) if self.total > 0 else 1.0


def balanced(u: Tensor, sigma: Tensor, vt: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(A, B) = (√σ·Vᵀ, U·√σ) in `dtype`: u (d, r), sigma (r,), vt (r, k)."""
    root = sigma.sqrt()
    return (root.unsqueeze(1) * vt).to(dtype).contiguous(), (u * root).to(dtype).contiguous()


def check_rank(rank: int | None) -> None:
    """Raise ConfigError for a rank that is no whole number of at least 1."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank must be a whole number of at least 1, not {rank!r}")


def check_energy(energy: float | None) -> None:
    """Raise ConfigError for an energy that is no share above 0 and up to 1."""
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy must be a share of ‖ΔW‖² above 0 and up to 1, not {energy!r}")
