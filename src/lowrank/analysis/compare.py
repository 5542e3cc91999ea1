"""Two adapters of one base, module by module: the same directions, the same change, and would they get on merged?"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lowrank.analysis.changes import Change
from lowrank.core import overlap
from lowrank.core.ranks import rank_for_energy
from lowrank.core.spectrum import DeltaSVD, delta_svd, right_directions, singular_values
from lowrank.core.subspace import random_grid, random_spread, similarity_grid

Grid = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Similarity:
    """φ(i, j) on one side of ΔW. grid[i−1][j−1]: φ(i, j), i directions of ours, j of theirs; dimension: the space's.

    random and spread are mean and standard deviation of φ(i, j) at the last entry, for directions drawn at random. The
    mean at every other entry is max(i, j)/dimension.
    """

    dimension: int
    grid: Grid
    random: float
    spread: float

    @property
    def whole(self) -> float:
        """φ of all directions of both."""
        return self.grid[-1][-1]

    def at(self, n: int) -> float:
        """φ(n, n), or the nearest that the smaller of the two has."""
        i, j = min(n, len(self.grid)), min(n, len(self.grid[0]))
        return self.grid[i - 1][j - 1]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One module in two adapters.

    left, right: similarity of the left and right singular directions of ΔW; a: of A alone, as in Hu et al. 2022;
    None where one of the two changes is zero. norms: ‖ΔW‖_F of ours and theirs. cosine: of the two ΔW as vectors.
    growth: ‖ΔW₁ + ΔW₂‖/√(‖ΔW₁‖² + ‖ΔW₂‖²). disturbed_by: what theirs adds on the inputs that ours reads, relative to
    what ours does there; disturbs: the reverse; the two `random_` figures are what unrelated directions would give.
    rank_for_90: of the sum of the two changes.
    """

    path: str
    ranks: tuple[int, int]
    norms: tuple[float, float]
    left: Similarity | None
    right: Similarity | None
    a: Similarity | None
    cosine: float | None
    growth: float | None
    disturbed_by: float | None
    random_disturbed_by: float | None
    disturbs: float | None
    random_disturbs: float | None
    rank_for_90: int


@dataclass(frozen=True, slots=True)
class Unshared:
    """Modules that could not be compared: only in one adapter, or of another shape."""

    only_ours: tuple[str, ...]
    only_theirs: tuple[str, ...]
    other_shape: tuple[str, ...]


def compare(ours: Change, theirs: Change) -> Comparison:
    """The comparison of two changes of the same (d, k)."""
    one, other = (delta_svd(change.a, change.b, change.scale) for change in (ours, theirs))
    some = one.rank > 0 and other.rank > 0
    return Comparison(
        path=ours.path,
        ranks=(ours.rank, theirs.rank),
        norms=(overlap.norm(one), overlap.norm(other)),
        left=similarity(one.u, other.u) if some else None,
        right=similarity(one.v, other.v) if some else None,
        a=similarity(right_directions(ours.a), right_directions(theirs.a)) if some else None,
        cosine=overlap.cosine(one, other),
        growth=overlap.growth(one, other),
        disturbed_by=overlap.interference(one, other),
        random_disturbed_by=overlap.random_interference(one, other),
        disturbs=overlap.interference(other, one),
        random_disturbs=overlap.random_interference(other, one),
        rank_for_90=_joint_rank(one, other),
    )


def similarity(one: Tensor, other: Tensor) -> Similarity:
    """φ of two sets of orthonormal columns, strongest first: (n, p) and (n, q)."""
    n, p, q = *one.shape, other.shape[1]
    grid: list[list[float]] = similarity_grid(one, other).tolist()
    return Similarity(
        dimension=n,
        grid=tuple(map(tuple, grid)),
        random=float(random_grid(n, p, q)[-1, -1]),
        spread=random_spread(n, p, q),
    )


def mean_grid(similarities: Sequence[Similarity]) -> Grid:
    """The mean of several grids over the entries that all of them have."""
    rows = min(len(s.grid) for s in similarities)
    columns = min(len(s.grid[0]) for s in similarities)
    return tuple(
        tuple(sum(s.grid[i][j] for s in similarities) / len(similarities) for j in range(columns)) for i in range(rows)
    )


def _joint_rank(one: DeltaSVD, other: DeltaSVD) -> int:
    return rank_for_energy(singular_values(*overlap.merged_factors(one, other), 1.0), 0.9)
