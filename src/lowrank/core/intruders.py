"""Intruder dimensions: leading singular vectors of W0 + ΔW that are unlike every singular vector of W0.

Shuttleworth et al. 2024 (arXiv 2410.21228). For the leading left singular vectors y of W0 + ΔW the question is
max_i |x_iᵀy| over *all* left singular vectors x_i of W0. The leading ones of W0 are found and compared; for all others
the largest possible |x_iᵀy| is bounded, so that the full decomposition of W0 is not needed:

    y's squared components along the x_i are masses at the points σ_i². A Lanczos recurrence of W0·W0ᵀ started at y
    gives polynomials p_0..p_m orthonormal for these masses, and no mass at a point t exceeds 1/Σ p_j(t)²
    (the Christoffel function).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.core.krylov import TOLERANCE, Triplets

THRESHOLD = 0.5
LEADING = 10
LANCZOS_STEPS = 72
STEPS_AT_ONCE = 12
GRID = 1024
ZOOMS = 4
ENDED = 1e-5


@dataclass(frozen=True, slots=True)
class Intruders:
    """What the leading singular vectors y_1, y_2, ... of W0 + ΔW are.

    similarity: the largest |x_iᵀy| found; at_most: what no |x_iᵀy| exceeds, over every x_i; sigma: the singular values
    of W0 + ΔW that belong to them.
    """

    sigma: list[float]
    similarity: list[float]
    at_most: list[float]

    @property
    def certain(self) -> int:
        """How many y are intruders: no x_i is as similar as THRESHOLD."""
        return sum(bound < THRESHOLD for bound in self.at_most)

    @property
    def undecided(self) -> int:
        """How many y have no similar x_i among those found, but might have one among those not found."""
        return sum(found < THRESHOLD <= bound for found, bound in zip(self.similarity, self.at_most, strict=True))


def find_intruders(weight: Tensor, known: Triplets, tuned: Triplets, tolerance: float = TOLERANCE) -> Intruders:
    """Compare the leading directions of W0 + ΔW with W0's: weight W0 (d, k), known of W0, tuned of W0 + ΔW.

    Only those of `known` that are found to `tolerance` count as found. The paper compares left singular vectors. So do
    we where d ≤ k; where d > k it is the right ones, since W0's left ones then are no basis, and every y that leaves
    their span would be called new for that alone.
    """
    if weight.shape[0] > weight.shape[1]:
        weight, known, tuned = weight.t(), known.flipped(), tuned.flipped()
    trusted = known.u[:, known.error <= tolerance]
    overlap = trusted.t() @ tuned.u[:, :LEADING]  # (found, n)
    similarity = torch.cat([overlap.abs(), overlap.new_zeros(1, overlap.shape[1])]).amax(0)
    rest = tuned.u[:, :LEADING] - trusted @ overlap
    bound = torch.linalg.vector_norm(rest, dim=0)  # no component of what is left of y is longer than that
    open_ones = (similarity < THRESHOLD) & (bound >= THRESHOLD)
    if open_ones.any():
        bound[open_ones] *= largest_components(weight, rest[:, open_ones] / bound[open_ones]).to(bound)
    at_most = torch.maximum(similarity, bound).clamp_max(1)
    return Intruders(tuned.sigma[:LEADING].tolist(), similarity.tolist(), at_most.tolist())


def largest_components(weight: Tensor, y: Tensor) -> Tensor:
    """Upper bounds of max_i |x_iᵀy| over the left singular vectors x_i of W0 (d, k), for unit columns y (d, n) → (n,).

    The recurrence is followed until every bound is below THRESHOLD, or LANCZOS_STEPS long.
    """
    recurrence = _Recurrence(weight, y)
    bounds = torch.ones(y.shape[1], dtype=torch.float64)
    while recurrence.steps < LANCZOS_STEPS and bool((bounds >= THRESHOLD).any()):
        for _ in range(STEPS_AT_ONCE):
            recurrence.step()
        bounds = recurrence.bounds()
    return bounds


class _Recurrence:
    """The Lanczos recurrences of W0·W0ᵀ from every column of y at once, each reorthogonalised in full.

    alpha[j], beta[j]: (n,), the coefficients of β_j·p_{j+1}(t) = (t − α_j)·p_j(t) − β_{j−1}·p_{j−1}(t);
    open[j]: whether p_{j+1} exists. A recurrence ends when β_j is 0 but for rounding: y then has j + 1 masses, and the
    polynomials so far already give them.
    """

    def __init__(self, weight: Tensor, y: Tensor) -> None:
        self.weight = weight
        self.vectors = [y]
        self.alpha: list[Tensor] = []
        self.beta: list[Tensor] = []
        self.open: list[Tensor] = []

    @property
    def steps(self) -> int:
        return len(self.alpha)

    def step(self) -> None:
        """In place: one coefficient pair more."""
        last = self.vectors[-1]
        # as thin rows from the left: with few columns on the right, the same products take ten times as long
        image = ((last.t() @ self.weight) @ self.weight.t()).t()
        alpha = (image.double() * last.double()).sum(0)
        basis = torch.stack(self.vectors)  # (steps + 1, d, n)
        for _ in range(2):
            image = image - torch.einsum("jdn,jn->dn", basis, torch.einsum("jdn,dn->jn", basis, image))
        length = torch.linalg.vector_norm(image.double(), dim=0)
        ended = length <= ENDED * alpha.amax()
        self.alpha.append(alpha)
        self.beta.append(torch.where(ended, 1.0, length))
        self.open.append(~ended & self.open[-1] if self.open else ~ended)
        self.vectors.append(image / self.beta[-1].to(image))

    def bounds(self) -> Tensor:
        """max over t of (Σ_j p_j(t)²)^(−1/2), (n,): on a grid, then ever closer to where that is largest."""
        points = self._points()
        least, best = self._total(points).min(0, keepdim=True)
        for _ in range(ZOOMS):
            low = points.gather(0, (best - 1).clamp_min(0))
            high = points.gather(0, (best + 1).clamp_max(len(points) - 1))
            points = low + (high - low) * torch.linspace(0, 1, 65, dtype=low.dtype, device=low.device).unsqueeze(1)
            nearer, best = self._total(points).min(0, keepdim=True)
            least = torch.minimum(least, nearer)
        return least.squeeze(0).rsqrt().cpu()

    def _total(self, points: Tensor) -> Tensor:
        """Σ_j p_j(t)² at every point, (m, n)."""
        before, now = torch.zeros_like(points), torch.ones_like(points)
        total = now.clone()
        for j in range(self.steps - 1):
            following = (points - self.alpha[j]) * now
            if j:
                following -= self.beta[j - 1] * before
            before, now = now, torch.where(self.open[j], following / self.beta[j], 0.0)
            total += now.square()
        return total

    def _points(self) -> Tensor:
        """Where to look first, ascending, (m, n): the nodes of the recurrence, near which a large mass shows as a sharp

        peak, and a grid between 0 and the last of them, dense at both ends, where polynomials move fastest.
        """
        off = torch.stack(self.beta[:-1], dim=1)  # (n, steps − 1)
        jacobi = torch.diag_embed(torch.stack(self.alpha, dim=1)) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
        nodes = torch.linalg.eigvalsh(jacobi).t()
        angles = torch.linspace(0, torch.pi, GRID, dtype=torch.float64, device=nodes.device).unsqueeze(1)
        return torch.cat([nodes, nodes[-1] * (1 - angles.cos()) / 2]).sort(0).values
