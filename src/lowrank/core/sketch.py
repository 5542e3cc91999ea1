"""The spectrum of a sum of matrices that come one at a time, and of which none is kept.

A two-sided randomised sketch (Tropp, Yurtsever, Udell & Cevher 2017, arXiv 1609.00048): of G = Σ G_i only G·Ω (d, m)
and Ψ·G (l, k) are kept, for Gaussian Ω (k, m) and Ψ (l, d). Both are linear in G, so terms are added as they come. With
Q = orth(G·Ω), G ≈ Q·(Ψ·Q)⁺·(Ψ·G), whose expected squared error is at most 4·Σ_{i>R} σ_i² for m = 2R + 1, l = 2m + 1
(their Theorem 4.3).

Where the tail is long, that core holds noise of it, and its singular values are too large. So energies are measured on
Gaussian directions T (k, t) that the approximation has not seen (as Tropp et al. 2019, arXiv 1902.08651, §6 do for its
error): for any U, E‖Uᵀ·G·T‖²_F / t = ‖Uᵀ·G‖²_F, and the same figure of Ĝ, which is known without T, takes the variance
down to that of what Ĝ misses. That gives, without bias, the energy that each direction of Ĝ holds of G, and ‖G‖²_F.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank.core.finite import require_finite

UNSEEN = 32  # t: what Ĝ misses is estimated with a relative standard deviation of at most √(2/32) = 25 %


@dataclass(frozen=True, slots=True)
class Spectrum:
    """sigma (n,), float64, descending: the first singular values of G; total: ‖G‖²_F; exact: neither is estimated.

    Where they are estimated, sigma² are the energies that the directions of Ĝ hold of G.
    """

    sigma: Tensor
    total: float
    exact: bool


@dataclass(slots=True)
class Directions:
    """The random matrices of all sketches of one run, the same for sides of one length. rank: R."""

    rank: int
    seed: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _kept: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def range_width(self) -> int:
        """m."""
        return 2 * self.rank + 1

    @property
    def other_width(self) -> int:
        """l."""
        return 2 * self.range_width + 1

    def right(self, k: int) -> Tensor:
        """(Ω, T) side by side, (k, m + UNSEEN)."""
        return self._drawn(k, self.range_width + UNSEEN)

    def left(self, d: int) -> Tensor:
        """Ψ, (l, d)."""
        return self._drawn(d, -self.other_width).t()

    def _drawn(self, side: int, width: int) -> Tensor:
        """Standard normal, (side, |width|); the sign tells the two sides of a square matrix apart."""
        key = (side, width)
        if key not in self._kept:
            number = (self.seed * 1_000_003 + side) * 2 + (width < 0)
            generator = torch.Generator().manual_seed(number % 2**63)
            self._kept[key] = torch.randn(side, abs(width), generator=generator).to(self.device)
        return self._kept[key]


class Sketch:
    """What is kept of G (d, k). Where a sketch would be no smaller than G, that is G itself, and all is exact."""

    def __init__(self, d: int, k: int, directions: Directions) -> None:
        """An empty sum, in float32."""
        self.directions = directions
        device, m, other = directions.device, directions.range_width, directions.other_width
        self.exact = d * k <= d * (m + UNSEEN) + other * k or min(d, k) <= other
        self.whole = torch.zeros(d, k, device=device) if self.exact else None
        self.range = None if self.exact else torch.zeros(d, m + UNSEEN, device=device)
        self.other = None if self.exact else torch.zeros(other, k, device=device)

    def add(self, term: Tensor) -> None:
        """In place: G += term, (d, k)."""
        term = term.float()
        if self.whole is not None:
            self.whole += term
            return
        assert self.range is not None and self.other is not None
        d, k = term.shape
        self.range.addmm_(term, self.directions.right(k))
        self.other.addmm_(self.directions.left(d), term)

    def spectrum(self) -> Spectrum:
        """The first R singular values of what was added, and ‖G‖²_F."""
        rank = self.directions.rank
        if self.whole is not None:
            whole = self.whole.double()
            require_finite(whole, "the sum")
            sigma = torch.linalg.svdvals(whole).cpu()
            return Spectrum(sigma[:rank], float(sigma.square().sum()), True)
        assert self.range is not None and self.other is not None
        both, other = self.range.double(), self.other.double()
        d, k = both.shape[0], other.shape[1]
        m = self.directions.range_width
        q = torch.linalg.qr(both[:, :m]).Q
        core = torch.linalg.lstsq(self.directions.left(d).double() @ q, other).solution  # (m, k): Ĝ = q·core
        require_finite(core, "the sum")
        u, sigma, _ = torch.linalg.svd(core, full_matrices=False)
        unseen = self.directions.right(k)[:, m:].double()
        seen, truth = core @ unseen, both[:, m:]  # q·seen = Ĝ·T, truth = G·T
        missed = (u.t() @ (q.t() @ truth)).square().sum(1) - (u.t() @ seen).square().sum(1)
        squares = (sigma.square() + missed / UNSEEN).clamp_min(0).sort(descending=True).values.cpu()
        total = float(sigma.square().sum() + (truth.square().sum() - seen.square().sum()) / UNSEEN)
        return Spectrum(squares[:rank].sqrt(), max(total, float(squares.sum())), False)
