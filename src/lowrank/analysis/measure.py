"""The figures of one module's ΔW that need nothing but its factors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.analysis.changes import Change
from lowrank.core.ranks import effective_rank, energy_kept, rank_for_energy, stable_rank
from lowrank.core.spectrum import singular_values

SHARES = (0.90, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Measure:
    """ΔW of one module. shape: (d, k); rank: as given; sigma: ΔW's singular values, descending.

    norm: ‖ΔW‖_F; effective_rank: by entropy; rank_for: {share of energy: rank that keeps it}.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    rank: int
    parts: tuple[str, ...]
    scale: float
    dora: bool
    started: bool
    parameters: int
    sigma: tuple[float, ...]
    norm: float
    effective_rank: float
    stable_rank: float
    rank_for: dict[float, int]

    def kept_by(self, rank: int) -> float:
        """The squared norm that the best change of this rank would keep: Σ_{i≤rank} σ_i²."""
        return sum(value**2 for value in self.sigma[:rank])


def measure(change: Change) -> Measure:
    """The figures of one change."""
    sigma = singular_values(change.a, change.b, change.scale)
    return Measure(
        path=change.path,
        kind=change.kind,
        shape=change.shape,
        rank=change.rank,
        parts=change.parts,
        scale=change.scale,
        dora=change.magnitude is not None,
        started=change.started,
        parameters=change.parameters,
        sigma=tuple(sigma.tolist()),
        norm=float(torch.linalg.vector_norm(sigma)),
        effective_rank=effective_rank(sigma),
        stable_rank=stable_rank(sigma),
        rank_for={share: rank_for_energy(sigma, share) for share in SHARES},
    )


def mean_energy_kept(measures: list[Measure]) -> list[float]:
    """The share of Σ‖ΔW‖_F² over all modules that rank 1, 2, ... everywhere would keep."""
    longest = max((len(m.sigma) for m in measures), default=0)
    squares = torch.zeros(longest, dtype=torch.float64)
    for m in measures:
        squares[: len(m.sigma)] += torch.tensor(m.sigma, dtype=torch.float64).square()
    return _cumulated(squares)


def _cumulated(squares: Tensor) -> list[float]:
    kept: list[float] = energy_kept(squares.sqrt()).tolist()
    return kept
