"""The best low-rank approximation of a matrix that is only ever seen in blocks of rows.

Block Krylov iteration on MᵀM (Halko, Martinsson & Tropp 2011, arXiv 0909.4061; Musco & Musco 2015, arXiv 1504.05477):
every pass over the matrix adds a block of directions to an orthonormal basis K and M·K to the projection of M on it.
The singular values of M·K never exceed those of M and approach them, so the energy that is kept is known, not
estimated; estimated is how much the best approximation of that rank would hold beyond it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowrank.core.finite import require_finite
from lowrank.core.truncation import Cut, LowRank, balanced

OVERSAMPLE = 16
MOST_PASSES = 30


class Rows(Protocol):
    """A matrix (d, k), given as blocks of consecutive rows, the same at every pass."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k)."""

    @property
    def dtype(self) -> torch.dtype:
        """float32 or wider."""

    def blocks(self) -> Iterator[Tensor]:
        """The blocks (n_i, k), Σ n_i = d."""


@dataclass(frozen=True, slots=True)
class Dense:
    """A matrix in memory, as one block."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix."""
        return self.matrix.dtype

    def blocks(self) -> Iterator[Tensor]:
        """The whole matrix."""
        yield self.matrix


class _Projection:
    """An orthonormal basis K (k, m) of row space, M·K (d, m) and its Gram matrix, which grow with every pass."""

    def __init__(self, source: Rows) -> None:
        d, k = source.shape
        self.basis = torch.empty(k, 0, dtype=source.dtype)
        self.image = torch.empty(d, 0, dtype=torch.float64)
        self.gram = torch.empty(0, 0, dtype=torch.float64)
        self.total = 0.0

    def grow(self, block: Tensor, image: Tensor) -> None:
        """In place: `block` (k, l) joins the basis and M·block (d, l) its image."""
        new = image.double()
        self.basis = torch.cat([self.basis, block], dim=1)
        cross = self.image.t() @ new
        self.gram = torch.cat([torch.cat([self.gram, cross], 1), torch.cat([cross.t(), new.t() @ new], 1)])
        self.image = torch.cat([self.image, new], dim=1)

    def energies(self) -> Tensor:
        """σ² of M·K, descending, (m,)."""
        squares: Tensor = torch.linalg.eigvalsh(self.gram)
        return squares.flip(0).clamp_min(0)


def compress(source: Rows, cut: Cut, *, tolerance: float = 1e-3, seed: int = 0) -> LowRank:
    """B·A ≈ M under `cut`, in as many passes over M as it takes for the shortfall to be below `tolerance`.

    tolerance: a share of the energy that is kept. Where the basis comes to span the whole smaller side, or M itself has
    a low rank, the result is exact up to rounding; small matrices are so from the start. O(d·k·r) a pass and
    O((d + k)·r) memory.
    """
    limit = min(source.shape)
    width = (limit // 8 if cut.rank is None else cut.rank) + OVERSAMPLE
    width = limit if 2 * width >= limit else width
    projection = _Projection(source)
    block = _start(source, width, seed, projection)
    held, shortfall = [0.0], 0.0
    for _ in range(MOST_PASSES):
        following = _pass(source, block, projection)
        require_finite(following, "the matrix")
        energies = projection.energies()
        held.append(_held(energies, cut, projection.total))
        shortfall = _shortfall(projection, energies, cut, held, limit)
        if shortfall == 0 or (len(held) > 2 and shortfall <= tolerance * held[-1]):
            break
        block = _orthonormal(following, projection.basis, limit)
    return _result(source, projection, cut, shortfall)


def _start(source: Rows, width: int, seed: int, projection: _Projection) -> Tensor:
    """orth(Mᵀ·Ω), (k, width), for a Gaussian Ω; ‖M‖²_F comes with the same pass."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.zeros(source.shape[1], width, dtype=source.dtype)
    for block in source.blocks():
        omega = torch.randn(block.shape[0], width, generator=generator, dtype=source.dtype)
        mixed.addmm_(block.t(), omega)
        norms = torch.linalg.vector_norm(block, dim=1)  # by rows, so that float32 is wide enough for each
        projection.total += float(norms.double().square().sum())
    require_finite(mixed, "the matrix")
    start: Tensor = torch.linalg.qr(mixed).Q
    return start


def _pass(source: Rows, block: Tensor, projection: _Projection) -> Tensor:
    """In place: `block` (k, l) joins the basis and M·block its image. Returns MᵀM·block, (k, l)."""
    image = torch.empty(source.shape[0], block.shape[1], dtype=source.dtype)
    following = torch.zeros_like(block)
    start = 0
    for rows in source.blocks():
        part = image[start : start + rows.shape[0]]
        torch.mm(rows, block, out=part)
        following.addmm_(rows.t(), part)
        start += rows.shape[0]
    projection.grow(block, image)
    return following


def _orthonormal(block: Tensor, basis: Tensor, limit: int) -> Tensor:
    """What `block` adds to `basis`, as orthonormal columns: twice, because once leaves rounding errors of the first."""
    block = block[:, : limit - basis.shape[1]]
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.t() @ block)).Q
    return block


def _held(energies: Tensor, cut: Cut, total: float) -> float:
    """The energy that the cut keeps of what was found so far."""
    held = float(energies[: cut.rank].sum())
    return held if cut.energy is None else min(held, cut.energy * total)


def _shortfall(projection: _Projection, energies: Tensor, cut: Cut, held: Sequence[float], limit: int) -> float:
    """How much energy the best approximation may hold beyond `held[-1]`; held: after every pass, 0 before the first.

    Zero where the basis has all of M, or what is held is all that was asked for. Otherwise it follows from the gains of
    the passes: on spectra with gaps they fall like a geometric series, whose rest is known; on the flattest ones what
    is missing falls with the square of the number of passes, and is at most the last gain times that number.
    """
    missing = max(projection.total - float(energies.sum()), 0.0)
    wanted = projection.total * (1.0 if cut.energy is None else cut.energy)
    if projection.basis.shape[1] >= limit or missing <= 1e-6 * projection.total or held[-1] >= wanted:
        return 0.0
    if cut.rank is None:
        return max(wanted - held[-1], 0.0)
    gain, bound = held[-1] - held[-2], min(wanted - held[-1], missing)
    if len(held) < 4:
        return min(gain * len(held), bound)
    falling = gain / max(held[-2] - held[-3], 1e-300)
    rest = 2 * gain * falling / (1 - falling) if falling < 1 else bound
    return max(min(gain * len(held), rest, bound), 0.0)


def _result(source: Rows, projection: _Projection, cut: Cut, shortfall: float) -> LowRank:
    """M·K·W and K·W for the eigenvectors W of the Gram matrix: where σ is inexact, it cancels in their product."""
    squares, w = torch.linalg.eigh(projection.gram)
    sigma, w = squares.flip(0).clamp_min(0).sqrt(), w.flip(1)
    total = projection.total
    size = cut.size(sigma, total, torch.finfo(source.dtype).eps)
    sigma, w = sigma[:size], w[:, :size]
    inverse = torch.where(sigma > sigma[:1] * 1e-12, 1 / sigma, 0.0)
    u, v = projection.image @ (w * inverse), projection.basis.double() @ w
    a, b = balanced(u, sigma, v.t(), source.dtype)
    return LowRank(a, b, sigma, total, shortfall / total if total > 0 else 0.0)
