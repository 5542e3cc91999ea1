"""ΔW = s·B·A taken apart into its singular values and directions, without forming it.

B = Q_B·R_B and Aᵀ = Q_A·R_A give s·B·A = Q_B·(s·R_B·R_Aᵀ)·Q_Aᵀ. The core in the middle is r×r and has all of ΔW's
singular values; its singular vectors become ΔW's by one product with Q_B and Q_A. O((d + k)·r²) instead of
O(d·k·min(d, k)), in float64 throughout.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.core.finite import require_finite

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, slots=True)
class DeltaSVD:
    """ΔW = u·diag(sigma)·vᵀ with the n directions that ΔW really has: u (d, n), sigma (n,) descending, v (k, n)."""

    u: Tensor
    sigma: Tensor
    v: Tensor

    @property
    def rank(self) -> int:
        """n: the rank of ΔW, as float64 can tell it."""
        return self.sigma.shape[0]


def singular_values(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """σ(s·B·A), descending, in float64: a (r, k), b (d, r) → (min(r, d, k),).

    What lies below float64's rounding of the product is given as exactly 0, so that a change which cancels out
    (B = 0, or PiSSA's factors before the first step) is seen as none.
    """
    r_b = torch.linalg.qr(_wide(b), mode="r").R
    r_a = torch.linalg.qr(_wide(a).t(), mode="r").R
    core = r_b @ r_a.t()
    require_finite(core * scale, "ΔW")
    sigma: Tensor = torch.linalg.svdvals(core) * abs(scale)
    return torch.where(sigma > _rounding(r_b, r_a, scale), sigma, 0.0)


def delta_norm(a: Tensor, b: Tensor, scale: float) -> float:
    """‖s·B·A‖_F, without forming the product."""
    return float(torch.linalg.vector_norm(singular_values(a, b, scale)))


def delta_svd(a: Tensor, b: Tensor, scale: float) -> DeltaSVD:
    """The thin singular value decomposition of s·B·A, in float64: a (r, k), b (d, r)."""
    q_b, r_b = torch.linalg.qr(_wide(b))
    q_a, r_a = torch.linalg.qr(_wide(a).t())
    core = r_b @ r_a.t() * scale
    require_finite(core, "ΔW")
    left, sigma, right = torch.linalg.svd(core, full_matrices=False)
    n = int((sigma > _rounding(r_b, r_a, scale)).sum())
    return DeltaSVD(q_b @ left[:, :n], sigma[:n], q_a @ right[:n].t())


def right_directions(a: Tensor) -> Tensor:
    """The right singular vectors of A alone, as columns, strongest first: a (r, k) → (k, n).

    They span what ΔW's do, in another order; Hu et al. 2022 compare these.
    """
    q, r = torch.linalg.qr(_wide(a).t())
    require_finite(r, "A")
    left, sigma, _ = torch.linalg.svd(r, full_matrices=False)
    n = int((sigma > EPS * max(a.shape) * sigma.amax()).sum())
    directions: Tensor = q @ left[:, :n]
    return directions


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().double()


def _rounding(r_b: Tensor, r_a: Tensor, scale: float) -> Tensor:
    """What float64 may leave of a singular value that is 0: relative to ‖B‖·‖A‖, since B·A may cancel."""
    norms: Tensor = torch.linalg.matrix_norm(r_b) * torch.linalg.matrix_norm(r_a)
    return norms * (EPS * max(r_b.shape[1], 8) * abs(scale))
