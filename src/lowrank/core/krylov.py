"""The leading singular triplets of a matrix that is only multiplied with, by block Krylov iteration.

Musco & Musco 2015 (arXiv 1504.05477): the space spanned by Ω, (WᵀW)·Ω, (WᵀW)²·Ω, ... holds the leading directions after
far fewer products than plain power iteration needs. It is grown until ‖Wᵀ·u − σ·v‖ is small for every wanted triplet,
so the error is measured, not hoped for.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowrank.core.finite import require_finite

BLOCK = 16  # columns multiplied at once
DENSE = 160  # min(d, k) up to which a full decomposition is quicker than any iteration
LONGEST = 24  # steps
CACHED = 2**19  # entries of a block of rows that stays in a core's cache between two products
TOLERANCE = 1e-3


class Matrix(Protocol):
    """A real (d, k) matrix W that can be applied."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k)."""

    def there_and_back(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(W·x, Wᵀ·W·x) in one pass over W: (k, n) → (d, n), (k, n)."""


@dataclass(frozen=True, slots=True)
class Sum:
    """W0 + B·A, not added up: weight (d, k); a (R, k), b (d, R) of its dtype, or None for W0 alone."""

    weight: Tensor
    a: Tensor | None = None
    b: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k)."""
        return self.weight.shape[0], self.weight.shape[1]

    def there_and_back(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Block of rows by block of rows, so that each comes from memory once for both products."""
        y = x.new_empty(self.shape[0], x.shape[1])
        back = torch.zeros_like(x)
        inner = None if self.a is None else self.a @ x
        step = max(1, CACHED // max(self.shape[1], 1))
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            torch.matmul(self.weight[rows], x, out=y[rows])
            if self.b is not None and inner is not None:
                y[rows].addmm_(self.b[rows], inner)
            back.addmm_(self.weight[rows].t(), y[rows])
        if self.a is not None and self.b is not None:
            back.addmm_(self.a.t(), self.b.t() @ y)
        return y, back


@dataclass(frozen=True, slots=True)
class Triplets:
    """u (d, n), sigma (n,) descending, v (k, n); error (n,) = ‖Wᵀ·u_i − σ_i·v_i‖ / σ_1, while W·v_i = σ_i·u_i holds."""

    u: Tensor
    sigma: Tensor
    v: Tensor
    error: Tensor

    def flipped(self) -> "Triplets":
        """The triplets of Wᵀ, whose errors are the same to first order."""
        return Triplets(self.v, self.sigma, self.u, self.error)


def leading(matrix: Matrix, n: int, start: Tensor, keep: int = 0, tolerance: float = TOLERANCE) -> Triplets:
    """The n leading singular triplets of `matrix` to `error` ≤ tolerance, and up to `keep` in all as they come.

    start: (k, l), the block to begin with, random or a guess; the result has its dtype and device. After LONGEST steps
    what was reached is given; `error` says what that is. Small matrices are decomposed in full, with error 0.
    """
    smaller = min(matrix.shape)
    keep = min(max(keep, n), smaller)
    width = start.shape[1]
    if smaller <= max(DENSE, 3 * (keep + width)):
        return _exact(matrix, keep, start)
    space = _Space(matrix, start)
    least, most = keep // width + 2, min(max(LONGEST, keep // width + 2), (smaller - 1) // width)
    for step in range(1, most + 1):
        space.grow()
        looks = step >= least and (step <= 6 or step % 3 == 0)  # a look costs ever more as the space grows
        if looks and bool((space.errors(n) <= tolerance).all()):
            break
    return space.triplets(keep)


def random_block(columns: int, rows: int, seed: int, like: Tensor) -> Tensor:
    """A standard normal (rows, columns) start, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32).to(like)


def _exact(matrix: Matrix, n: int, like: Tensor) -> Triplets:
    eye = torch.eye(matrix.shape[1], dtype=like.dtype, device=like.device)
    dense, _ = matrix.there_and_back(eye)
    require_finite(dense, "W")
    u, sigma, vh = torch.linalg.svd(dense.double(), full_matrices=False)
    return Triplets(u[:, :n].to(like), sigma[:n].to(like), vh[:n].t().to(like), torch.zeros(n).to(like))


class _Space:
    """The growing Krylov space of WᵀW: v (k, w) orthonormal, and y = W·v (d, w)."""

    def __init__(self, matrix: Matrix, start: Tensor) -> None:
        self.matrix = matrix
        self.v = start.new_empty(matrix.shape[1], 0)
        self.y = start.new_empty(matrix.shape[0], 0)
        self.block = start.shape[1]
        self._next = start  # Wᵀ·W·(the newest block of v), not yet part of the space

    def grow(self) -> None:
        """In place: one block more."""
        new = torch.linalg.qr(self._outside(self._next)).Q
        new = torch.linalg.qr(self._outside(new)).Q  # once more, since rounding left some of v in it
        image, self._next = self.matrix.there_and_back(new)
        require_finite(self._next, "W")
        self.v = torch.cat([self.v, new], dim=1)
        self.y = torch.cat([self.y, image], dim=1)

    def _outside(self, x: Tensor) -> Tensor:
        return x - self.v @ (self.v.t() @ x)

    def errors(self, n: int) -> Tensor:
        """The errors of the n leading triplets, without a product with W: Wᵀ·y leaves the space only by `_next`."""
        squares, right = torch.linalg.eigh((self.y.t() @ self.y).double())
        sigma = squares.flip(0)[:n].clamp_min(0).sqrt()
        ends = right.flip(1)[-self.block :, :n]
        lengths = torch.linalg.vector_norm(self._outside(self._next).double() @ ends, dim=0)
        wide = sigma.clamp_min(torch.finfo(torch.float32).eps * sigma[0])
        relative: Tensor = lengths / (wide * sigma[0]).clamp_min(1e-300)
        return relative

    def triplets(self, n: int) -> Triplets:
        basis, small = torch.linalg.qr(self.y)
        left, sigma, right = torch.linalg.svd(small, full_matrices=False)
        return Triplets(basis @ left[:, :n], sigma[:n], self.v @ right[:n].t(), self.errors(n).to(sigma))
